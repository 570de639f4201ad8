"""Every command and every Python block of the README and of the site, run in their order, page by page.

    make docs

A page has a folder of its own, with made data where it says /path/to/..., a finished run where it begins with one, and
pictures of the names that it gives. Trainings are made small by further overrides: an eighth of the width, small
images, one epoch. What is not run is in NOT_RUN, with the reason.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from detection.cli import main
from detection.config import find_recipe, read_recipe
from detection.data.events import draw_recordings
from detection.data.synthetic import draw_scene

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from fake_data import voc_object, write_voc  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "experiments.md")  # runs of days; tests/test_readme.py knows its verbs and recipes
NOT_RUN = {
    "make": "the demo and the suite have runs of their own",
    "pip": "installs",
    "torchrun": "tests/test_torchrun.py runs it",
    "hoyer-det web": "serves until it is stopped; tests/test_web.py runs it",
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SMALL = ["--model.backbone.width", "0.125", "--train.epochs", "1", "--data.workers", "0", "--train.compile", "False"]
DETECTOR = ["--model.min_size", "64", "--model.max_size", "96", "--train.batch_size", "2"]


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yield ("python", text) or ("shell", one command), in the order of the page."""
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            yield "python", text
        elif not language:
            for line in re.sub(r"\\\n\s*", "", text).splitlines():
                if line.strip():
                    yield "shell", line


def write_pictures(folder: Path) -> None:
    """Write image.jpg, folder/, shots/ and film.mp4, drawn."""
    scenes = [draw_scene(96, 3, np.random.default_rng(seed)).image for seed in range(3)]
    for name, image in zip(("image.jpg", "folder/a.png", "shots/b.png"), scenes, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / name)
    film = cv2.VideoWriter(str(folder / "film.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (96, 96))
    for image in scenes:
        film.write(np.ascontiguousarray(image[..., ::-1]))
    film.release()


def write_yolo(root: Path, split: str, names: list[str]) -> None:
    """Write drawn scenes as a YOLO set: root/SPLIT/{images,labels}."""
    (root / "data.yaml").parent.mkdir(parents=True, exist_ok=True)
    classes = "names: [circle, square, triangle, star]\n"
    (root / "data.yaml").write_text(classes + "train: train/images\nval: valid/images\n" * (split != "."))
    for number, name in enumerate(names):
        scene = draw_scene(96, 3, np.random.default_rng(number))
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.image).save(root / split / "images" / f"{name}.png")
        centres, sizes = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 192, (scene.boxes[:, 2:] - scene.boxes[:, :2]) / 96
        rows = [
            f"{label - 1} {x} {y} {w} {h}\n" for label, (x, y), (w, h) in zip(scene.labels, centres, sizes, strict=True)
        ]
        (root / split / "labels" / f"{name}.txt").write_text("".join(rows))


def write_data(folder: Path) -> None:
    """Write small sets below folder/data, and a recording, recording.dat.

    In the layouts of BCCD, VOC, CIFAR-10 as folders and Imagenette, and in YOLO's.
    """
    write_yolo(folder / "data/blood", "train", [f"a{number}" for number in range(8)])
    write_yolo(folder / "data/blood", "valid", ["b0", "b1"])
    shutil.copytree(folder / "data/blood", folder / "data/folder")
    write_yolo(folder / "data/films", ".", [f"film{letter}_{number}" for letter in "abcd" for number in range(3)])
    draw_recordings(folder / "recordings", num_train=1, num_val=1, size=64, seed=0)
    shutil.copy(folder / "recordings/val/000001_td.dat", folder / "recording.dat")
    objects = {f"i{number}": [voc_object(name, (3, 3, 30, 25))] for number, name in enumerate(("RBC", "WBC", "RBC"))}
    for split in ("BCCD/trainval", "BCCD/test"):
        write_voc(folder / "data/bccd", objects, split)
    objects = {f"i{number}": [voc_object(name, (3, 3, 30, 25))] for number, name in enumerate(("person", "car", "dog"))}
    for split in ("VOC2007/train", "VOC2007/val", "VOC2007/trainval", "VOC2012/trainval", "VOC2007/test"):
        write_voc(folder / "data/VOCdevkit", objects, split)
    noise = np.random.default_rng(0)
    folders = [f"cifar10/{split}/{name}" for split in ("train", "test") for name in CIFAR]
    folders += [f"imagenette/{split}/{name}" for split in ("train", "val") for name in ("n01440764", "n02102040")]
    for name in folders:
        (folder / "data" / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                folder / f"data/{name}/{number}.png"
            )


def smaller(words: list[str]) -> list[str]:
    """Return a command's words with overrides that make its training small."""
    verb, *rest = ["2" if before == "--images" else word for before, word in zip(["", *words], words, strict=False)]
    words = [verb, *rest] if verb != "compare" else [verb, *(word for word in rest if word != "1")]  # one seed
    if verb not in ("train", "compare") or "--help" in rest or "--resume" in rest:
        return words
    recipe = read_recipe(find_recipe(rest[0]))
    # A part of the zoo has its own width.
    extra = SMALL[2:] if recipe.model.backbone.weights or "zoo:" in " ".join(rest) else list(SMALL)
    if recipe.task == "detection":
        extra += DETECTOR
        if recipe.data.format.startswith("synthetic"):
            extra += ["--data.scenes.num_train", "4", "--data.scenes.num_val", "2", "--data.scenes.size", "64"]
    else:
        extra += ["--train.batch_size", "8"]
        if recipe.data.format == "cifar10":
            extra += ["--data.format", "folder", "--data.train", "train", "--data.val", "test"]
        if recipe.data.format.startswith("synthetic"):
            extra += ["--data.num_train", "8", "--data.num_val", "8"]
    # The page's own values come last, and so hold.
    return [verb, rest[0], *extra, *(word for word in rest[1:] if word != "--download")]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Finished runs by the names that pages give them."""
    root = tmp_path_factory.mktemp("trained")
    runs = {"demo": "hoyer", "hoyer": "hoyer", "fixed": "fixed", "twin": "relu"}
    with contextlib.chdir(root):
        for name, neuron in runs.items():
            words = ["train", "scenes_retinanet_resnet18", "--out", f"runs/{name}"]
            main(smaller([*words, "--model.backbone.activation", neuron]))
    return {name: root / "runs" / name for name in runs}


def before(page: Path, folder: Path, trained: dict[str, Path]) -> None:
    """Put into a page's folder what it begins with: the runs that it names before it trains them, data, pictures."""
    write_pictures(folder)
    write_data(folder)
    text = page.read_text(encoding="utf-8")
    for name, run in trained.items():
        made = re.search(rf"^hoyer-det train .*--out runs/{name}$", text, flags=re.MULTILINE)
        if f"runs/{name}" in text and not made:
            shutil.copytree(run, folder / "runs" / name)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page, tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before(page, tmp_path, trained)
    failed = []
    for kind, text in blocks(page):
        if kind == "python":
            if "# my_neurons.py" in text:  # a file to write: tests/test_extension.py has it
                compile(text, str(page), "exec")
                continue
            places = os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=places)
            status, said = done.returncode, done.stderr
        else:
            program, *words = shlex.split(text.replace("/path/to", "data"))
            if {program, " ".join([program, *words[:1]])} & NOT_RUN.keys():
                continue
            assert program == "hoyer-det", f"{page.name}: neither run nor left out with a reason: {text}"
            status, said = 0, ""
            try:
                main(smaller(words))
            except SystemExit as end:
                status = end.code or 0
        if status:
            failed.append(f"{text}: status {status} {said}")
    assert not failed, "\n".join(failed)
