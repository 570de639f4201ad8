"""The wheel: what is in it, and that its command works where there is no source tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from packaging.tags import sys_tags
from PIL import Image
from setuptools import find_packages
from test_formats import NAMES, write_flat_voc, write_roboflow, write_yolo
from test_formats import whole as drawn_sets

import detection
from backbones import zoo
from detection.runs import Run

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, once."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("backbones", "detection", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_kernels*"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command.append("--config-settings=--build-option=--compression=stored")  # weights hardly become smaller
    subprocess.run([*command, "--wheel-dir", str(folder / "out"), str(folder)], check=True, capture_output=True)
    (built,) = (folder / "out").iterdir()
    return built


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory) -> list[str]:
    """`hoyer-det` of an environment with the wheel and this one's dependencies, but not its source tree.

    A .pth file names the folder of the dependencies. The .pth files in that folder, one of which may name the source
    tree, are not followed from there.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    install = ["--python", str(folder), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    (packages,) = folder.glob("lib/*/site-packages")
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return [str(folder / "bin" / "hoyer-det")]


@pytest.fixture
def run(command, tmp_path):
    """run(arguments...) -> the finished `hoyer-det`, in an empty folder."""

    def call(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return call


def test_every_package_is_listed():
    found = {*find_packages(str(ROOT), include=["backbones*", "detection*"]), "detection.recipes"}
    assert sorted(found) == PROJECT["tool"]["setuptools"]["packages"]


def test_version_is_that_of_the_package(wheel):
    tag = wheel.name.removeprefix(f"hoyer_det-{detection.__version__}-").removesuffix(".whl")
    assert tag in map(str, sys_tags())  # of this Python and platform: the kernels are compiled for it


def test_every_file_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        compiled = {name for name in archive.namelist() if Path(name).name.startswith("_kernels")}
        names = {name for name in archive.namelist() if ".dist-info/" not in name} - compiled
        recipes = {f"detection/recipes/{path.name}": path for path in (ROOT / "configs").glob("*.yaml")}
        assert len(recipes) > 15
        files = dict(recipes)
        for folder in ("backbones", "detection"):
            for path in (ROOT / folder).rglob("*"):
                left_out = "__pycache__" in path.parts or path.name.startswith("_kernels")
                if path.is_file() and not left_out and not path.parent.name.startswith("."):
                    files[path.relative_to(ROOT).as_posix()] = path
        assert names == files.keys()
        kept = [name for name in names if "/zoo/" in name or "/recipes/" in name or "/templates/" in name]
        assert len(kept) >= 4 * len(zoo.names()) + len(recipes) + 2
        for name in kept:
            assert archive.read(name) == files[name].read_bytes()


def test_the_environment_has_no_source_tree(command):
    code = "import sys, backbones, detection; from backbones.deploy.events import available; "
    code += "print(backbones.__file__, detection.__file__, available()[0], *sys.path, sep='\\n')"
    python = Path(command[0]).with_name("python")
    done = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=python.parent)
    *modules, kernels = done.stdout.splitlines()[:3]
    places = done.stdout.splitlines()[3:]
    if os.environ.get("REQUIRE_REAL_DATA") or shutil.which("c++"):
        assert kernels != "torch"  # compiled when the wheel was built
    assert all(Path(module).is_relative_to(python.parents[1]) for module in modules)
    assert str(ROOT) not in places


def test_recipes_and_zoo_without_the_sources(run):
    listed = run("recipes").stdout
    assert "scenes_retinanet_resnet18" in listed and "voc_ssd300_vgg16" in listed
    text = (ROOT / "configs" / "cifar10_vgg11.yaml").read_text()
    assert run("recipes", "show", "cifar10_vgg11").stdout == text
    error = run("train", "scenes_retinanet_resnet", status=2).stderr
    said = "scenes_retinanet_resnet: no such recipe, file or folder (keys stand behind it); did you mean"
    assert f"{said} 'scenes_retinanet_resnet18'?" in error


def test_trains_and_reports_without_the_sources(run, tmp_path):
    small = ["--data.scenes.num_train", "16", "--data.scenes.num_val", "4", "--data.workers", "0"]
    small += ["--model.backbone.width", "0.125", "--train.epochs", "1"]
    run("train", "scenes_retinanet_resnet18", *small)
    trained = Run.open(tmp_path / "runs" / "scenes_retinanet_resnet18")
    assert trained.finished and trained.history()[-1].metrics["AP50"] >= 0
    assert trained.info().command == f"hoyer-det train scenes_retinanet_resnet18 {' '.join(small)}"
    done = run("report", "runs/scenes_retinanet_resnet18")
    assert done.stdout.startswith("runs/scenes_retinanet_resnet18/report.html: ")
    page = (tmp_path / "runs" / "scenes_retinanet_resnet18" / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "hoyer-det report" in page


def test_predicts_without_the_sources(run, tmp_path):
    Image.new("RGB", (128, 128), (90, 120, 60)).save(tmp_path / "image.png")
    done = run("predict", "zoo:scenes_retinanet_resnet18", "image.png")
    assert "written to predictions/scenes_retinanet_resnet18" in done.stdout
    folder = tmp_path / "predictions" / "scenes_retinanet_resnet18"
    assert {path.name for path in folder.iterdir()} == {"image.png", "predictions.json", "images.json"}


ROAD = """
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from detection.cli import main

small = "--train.epochs 1 --train.precision no --train.batch_size 2 --data.workers 0"
small += " --model.min_size 64 --model.max_size 96"
for name in sys.argv[1:]:
    for line in (
        f"check-data {name}",
        f"init {name} --out {name}.yaml",
        f"train {name}.yaml --out runs/{name} {small}",
        f"evaluate runs/{name}",
        f"predict runs/{name} image.png --score 0.05 --out found_{name}",
        f"export runs/{name} --nms --out {name}.onnx",
    ):
        print(f"> {line}")
        main(line.split())
    session = onnxruntime.InferenceSession(f"{name}.onnx")
    pixels = np.asarray(Image.open("image.png"), np.float32).transpose(2, 0, 1)[None] / 255
    np.savez(f"{name}.npz", **dict(zip(("boxes", "scores", "labels"), session.run(None, {"images": pixels}))))
"""


def test_a_folder_of_a_labelling_tool_becomes_a_file_that_gives_boxes(command, tmp_path):
    """Through check-data, init, train, evaluate, predict, export --nms and onnxruntime, with the wheel alone."""
    layouts = {"yolo": write_yolo, "voc": write_flat_voc, "roboflow": write_roboflow}
    for name, write in layouts.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name, drawn_sets(number=8))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)).save(tmp_path / "image.png")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    python = str(Path(command[0]).with_name("python"))
    road = [python, "-P", "-c", ROAD, *layouts]
    done = subprocess.run(road, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("training can go on") == len(layouts)
    for name in layouts:
        assert f"next: hoyer-det train {name}.yaml" in done.stdout
        assert set(Run.open(tmp_path / "runs" / name).config.data.classes) == set(NAMES)
        rows = json.loads((tmp_path / f"found_{name}" / "predictions.json").read_text())
        found, exported = [row["bbox"] for row in rows], np.load(tmp_path / f"{name}.npz")
        x1, y1, x2, y2 = exported["boxes"].T
        assert len(found) == len(exported["boxes"]) > 0
        np.testing.assert_allclose([row["score"] for row in rows], exported["scores"], atol=1e-4)
        ours, theirs = np.array(found), np.stack([x1, y1, x2 - x1, y2 - y1], axis=1)
        np.testing.assert_allclose(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)], atol=1e-2)
