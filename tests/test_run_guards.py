"""Runs are used with their own recipe, weights and data, or refused: none of them changes without a word."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import run_tool
from PIL import Image
from test_resume import CLASSIFICATION, DETECTION, copy_of, expect_equal, refusal, stop_after, write_recipe

from backbones import read_tensors, tensors_to_bytes
from detection.config import load_config
from detection.data.dataset import DetectionDataset
from detection.runs import Run
from detection.tasks import task_of


def write_images(root: Path) -> Path:
    """Noise of two brightnesses in one folder per class."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 16), ("val", 4)):
        for name, brightness in (("dark", 60), ("light", 255)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number // 2):
                pixels = rng.integers(0, brightness, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """A run that was stopped in its second epoch, and the same one that was not."""
    folder = tmp_path_factory.mktemp("guards")
    images = {"format": "folder", "root": str(write_images(folder / "images")), "size": 32, "workers": 0}
    recipe = write_recipe(folder, CLASSIFICATION | {"data": images}, train={"batch_size": 4})
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_tool(monkeypatch, "train_cls", recipe, "--out", folder / "whole")
        stop_after(monkeypatch, 6)
        with pytest.raises(SystemExit):
            run_tool(monkeypatch, "train_cls", recipe, "--out", folder / "stopped")
    return folder / "stopped", folder / "whole"


# The recipe


def test_a_finished_run_is_not_said_to_have_another_recipe(attempt, runs, monkeypatch, capsys, tmp_path):
    run = copy_of(runs[1], tmp_path)
    with attempt("wrong values"):
        sentence = refusal(monkeypatch, capsys, "train_cls", "--resume", run, "--train.epochs", "9")
        assert f"{run} has finished: trained with train.epochs 2, wanted is 9" in sentence
    run_tool(monkeypatch, "train_cls", "--resume", run, "--train.save_minutes", "7")  # of which no number depends
    assert capsys.readouterr().out == f"{run}: finished already, nothing to go on with\n"


# The weights


def change(path: Path, value: float) -> str:
    """Make one number of a weights file another one, and return its tensor's name; the file itself is sound."""
    tensors, text = read_tensors(path)
    name = next(name for name, each in tensors.items() if each.is_floating_point() and each.dim() == 4)
    tensors[name].view(-1)[0] = value
    path.write_bytes(tensors_to_bytes(tensors, text))
    return name


def use(kind: str, run: Path, recipe: Path) -> list:
    """The command line of something that needs the weights of a run."""
    image = run.parent / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    out = ["--out", str(run.parent / "out")]
    training = ["train_cls", str(recipe), *out]
    return {
        "evaluate": ["evaluate", run],
        "predict": ["predict", run, str(image), *out],
        "export": ["export", run, *out],
        "report": ["report", run, "--out", str(run.parent / "out.html")],
        "robustness": ["robustness", run, *out],
        "analyze": ["analyze", run],
        "backbone": [*training, "--model.backbone.weights", run],
        "teacher": [*training, "--distillation.teacher", run],
    }[kind]


USES = ["evaluate", "predict", "export", "report", "robustness", "analyze", "backbone", "teacher"]


@pytest.mark.parametrize("kind", USES)
def test_weights_of_another_training_are_refused(attempt, runs, monkeypatch, capsys, tmp_path, kind):
    run = copy_of(runs[1], tmp_path)
    change(run / "last.safetensors", 0.125)
    with attempt("damaged files"):
        sentence = refusal(monkeypatch, capsys, *use(kind, run, runs[1].parent / "recipe.yaml"))
        logged = Run.open(run).info().sha256["last.safetensors"]
        assert f"{run / 'last.safetensors'}: its SHA-256 is not the one in run.json ({logged[:16]}...)" in sentence
        assert {path.name for path in tmp_path.iterdir()} == {"run", "image.png"}


@pytest.mark.parametrize("kind", USES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(attempt, runs, monkeypatch, capsys, tmp_path, kind, value):
    run = copy_of(runs[1], tmp_path)
    name = change(run / "last.safetensors", value)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"sha256": Run.open(run).checksums()}))
    with attempt("damaged files"):
        sentence = refusal(monkeypatch, capsys, *use(kind, run, runs[1].parent / "recipe.yaml"))
        assert "last.safetensors: " in sentence
        assert f"{name.removeprefix('backbone.')} has numbers that are not finite" in sentence
        assert {path.name for path in tmp_path.iterdir()} == {"run", "image.png"}


def test_a_report_of_the_log_alone_says_which_weights_are_there(runs, monkeypatch, tmp_path):
    run = copy_of(runs[1], tmp_path)
    change(run / "last.safetensors", 0.125)
    run_tool(monkeypatch, "report", run, "--log-only")
    page = (run / "report.html").read_text()
    assert Run.open(run).info().sha256["last.safetensors"] in page and "This page was made from the log alone." in page


# The data


def repaint(root: Path) -> None:
    """One channel of one pixel is another."""
    path = root / "train" / "dark" / "0.png"
    pixels = np.array(Image.open(path))
    pixels[3, 4, 1] ^= 1
    Image.fromarray(pixels).save(path)


def swap(root: Path) -> None:
    """Two images of the validation data are in each other's class."""
    one, other = root / "val" / "dark" / "1.png", root / "val" / "light" / "0.png"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (repaint, "train had 16 usable images, now 16, or other boxes or pixels"),
        (lambda root: (root / "train" / "dark" / "0.png").unlink(), "train had 16 usable images, now 15, "),
        (swap, "val had 4 usable images, now 4, or other boxes or pixels"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(attempt, runs, monkeypatch, capsys, tmp_path, spoil, sentence):
    run = copy_of(runs[0], tmp_path)
    root = tmp_path / "images"
    shutil.copytree(runs[0].parent / "images", root)
    spoil(root)
    with attempt("wrong values"):
        message = refusal(monkeypatch, capsys, "train_cls", "--resume", run, "--data.root", str(root))
        assert f"{run}: the data have changed since the run began: {sentence}" in message
        assert "put the data back, or begin a new run" in message
    run_tool(monkeypatch, "train_cls", "--resume", run, "--data.root", runs[0].parent / "images")
    expect_equal(run, runs[1])


def test_the_fingerprint_of_boxes(tmp_path):
    scenes = {"num_train": 2, "num_val": 2, "size": 64}
    recipe = write_recipe(tmp_path, DETECTION, data={"scenes": scenes})
    one, same = (task_of(load_config(recipe, [])).read("train") for _ in range(2))
    assert one.fingerprint() == same.fingerprint() and len(one.fingerprint()) == 64
    record, *others = one.annotations.records
    assert len(record.boxes) > 0
    changes = {
        "a box": {"boxes": record.boxes + np.float32(0.5)},
        "a label": {"labels": (record.labels + 1) % 3},
        "an ignored object": {"ignore": ~record.ignore},
        "an orientation": {"upright": not record.upright},
        "an image": {"path": others[0].path},
    }
    found = {one.fingerprint()}
    for each in changes.values():
        annotations = replace(one.annotations, records=(replace(record, **each), *others))
        found.add(DetectionDataset(annotations, one.transform).fingerprint())
    assert len(found) == 1 + len(changes)
