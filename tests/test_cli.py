"""The command `hoyer-det`: help, errors in a sentence before torch is imported, recipes, summaries, the scripts."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, run_tool

import detection
from detection.cli import VERBS, export, main, recipes, zoo
from detection.cli.common import check_run, parse_recipe, recipe_parser, run_verb
from detection.config import read_recipe, recipe_names
from detection.exporters import SUFFIXES
from detection.runs import Run, command_line
from detection.tasks.classification import ClassificationTask
from detection.tasks.detection import DetectionTask
from detection.training.signals import Interrupted

SLOW = ("torch", "torchvision", "accelerate", "albumentations", "matplotlib", "pycocotools", "cv2")
# In a process of its own: status and output of each command line, and what was imported until then.
CALLS = """
import contextlib, io, json, sys
from detection.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    text, status = io.StringIO(), 0
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            main(arguments)
        except SystemExit as stop:
            status = stop.code or 0
    found.append([status, text.getvalue(), [name for name in json.loads(sys.argv[2]) if name in sys.modules]])
print(json.dumps(found))
"""


def call(capsys, *arguments, status: int = 0) -> str:
    """Output of a command line that ends with this status: of standard error, unless it is 0."""
    ended = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        ended = stop.code or 0
    found = capsys.readouterr()
    assert ended == status, found.err
    return found.err if status else found.out


def call_alone(*command_lines: list[str], cwd=ROOT) -> list[tuple[int, str, list[str]]]:
    """(status, output, slow packages imported until then) of command lines, in one process of their own."""
    command = [sys.executable, "-c", CALLS, json.dumps(command_lines), json.dumps(SLOW)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    return [tuple(found) for found in json.loads(done.stdout.splitlines()[-1])]


# Help


def test_help_names_every_verb_and_every_verb_has_a_file(capsys):
    text = call(capsys, "--help")
    for verb, words in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(words)}$", text, re.MULTILINE)
        module = importlib.import_module(f"detection.cli.{verb.replace('-', '_')}")
        assert callable(module.main) and module.__doc__
    assert call(capsys, "-h") == text
    assert call(capsys, "--version") == f"hoyer-det {detection.__version__}\n"


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("train", ["--out", "--resume RUN", "--download", "--train.epochs", "--label_smoothing", "--data.scenes.size"]),
        ("evaluate", ["--weights", "--data.root FOLDER", "--save FOLDER"]),
        ("predict", ["--out", "--weights", "--device", "--score", "--nms", "--batch-size", "--spikes", "--no-images"]),
        ("analyze", ["--weights", "--data.root", "--images N", "--costs FILE", "--strict", "--out FOLDER"]),
        ("robustness", ["--weights", "--data.root", "--images N", "--seeds", "--kinds", "gaussian_noise", "--out"]),
        ("report", ["--weights", "--data.root", "--out FILE.html", "--images N", "--log-only"]),
        (
            "export",
            ["--format", "--int8", "--analogue-int8", "--out FILE", "--calibration N", "--evaluate", "--width"],
        ),
        ("check-data", ["RECIPE", "--data.verify", "--data.train_images"]),
        ("compare", ["RECIPE", "--out", "--seeds", "--variants", "no_regulariser", "--images N"]),
        ("zoo", ["list", "add"]),
        ("recipes", ["list", "show", "copy"]),
        ("web", ["RUN", "--weights", "--data.root", "--device", "--host", "--port", "--max-mb", "--max-megapixels"]),
        ("summary", ["RECIPE_OR_RUN", "--classes N", "--model.backbone.width"]),
    ],
)
def test_help_of_a_verb_has_its_options(verb, options, capsys):
    assert set(VERBS) >= {verb}
    text = call(capsys, verb, "--help")
    assert text.startswith(f"usage: hoyer-det {verb}")
    assert [option for option in options if option not in text] == []
    assert importlib.import_module(f"detection.cli.{verb.replace('-', '_')}").__doc__.splitlines()[0] in text


def test_help_of_train_has_every_key_with_its_values(capsys):
    def keys(values: dict, prefix: str = "") -> list[str]:
        found = [f"{prefix}{name}" for name in values]
        for name, value in values.items():
            found += keys(value, f"{prefix}{name}.") if isinstance(value, dict) else []
        return found

    sections = {"model", "data", "train", "hoyer", "optimizer", "distillation", "evaluation", "neck", "head"}
    sections |= {"backbone", "scenes", "events", "augment", "options"}
    for name in ("scenes_retinanet_resnet18", "cifar10_vgg11"):
        text = call(capsys, "train", name, "--help")
        recipe = read_recipe(ROOT / "configs" / f"{name}.yaml").model_dump(mode="json")
        named = [key for key in keys(recipe) if key.split(".")[-1] not in sections]
        assert len(named) > 40
        assert [key for key in named if f"--{key} " not in text] == []
    assert "(default: 0.25)" in " ".join(text.partition("--model.backbone.width")[2][:250].split())
    general = call(capsys, "train", "--help")
    assert "keys of a recipe with task detection" in general and "keys of a recipe with task classification" in general


def test_help_says_what_the_code_does(capsys):
    text = " ".join(call(capsys, "export", "--help").split())
    assert f"({DetectionTask.num_calibration} for a detector, {ClassificationTask.num_calibration} for a" in text
    assert tuple(SUFFIXES) == export.FORMATS


# Errors


def test_mistyped_verbs_name_the_nearest(capsys):
    everything = f"(allowed: {', '.join(VERBS)})"
    for typed, meant in (
        ("trian", "train"),
        ("analyse", "analyze"),
        ("check_data", "check-data"),
        ("recipe", "recipes"),
    ):
        assert (
            call(capsys, typed, status=2) == f"error: {typed}: no such command; did you mean {meant!r}? {everything}\n"
        )
    assert call(capsys, "xyzzy", status=2) == f"error: xyzzy: no such command {everything}\n"
    assert call(capsys, status=2) == f"error: which command? {everything}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "bccd_retinanet_resnet81"], "did you mean 'bccd_retinanet_resnet18'?"),
        (["train", "configs/none.yaml"], "configs/none.yaml: no such config file"),
        (["train"], "which recipe? The first argument is a YAML file or a name of `hoyer-det recipes`"),
        (["train", "--resume", "runs/none"], "runs/none is not a run folder: it has no config.yaml"),
        (["train", "scenes_retinanet_resnet18", "--resume", "runs/none"], "has its own recipe: leave scenes_"),
        (["train", "scenes_retinanet_resnet18", "--trian.epochs", "3"], "--trian.epochs"),
        (["train", "scenes_retinanet_resnet18", "train.epochs=many"], "many"),
        (["check-data", "scene_retinanet_resnet18"], "did you mean 'scenes_retinanet_resnet18'?"),
        (["compare", "none.yaml", "--out", "x"], "none.yaml: no such config file"),
        (["compare", "cifar10_vgg11", "--out", "x", "--variants", "rleu"], "--variants rleu: unknown (allowed: hoyer"),
        (["compare", "cifar10_vgg11", "--out", "x", "--variants", "a='--x"], "--variants a='--x: no closing quotation"),
        (["summary", "none"], "none: no such recipe, file or folder (keys stand behind it)"),
        (["summary", "zoo:none"], "zoo:none: no such entry of the zoo (allowed: bccd"),
        (["summary", "configs"], "configs is not a run folder"),
        (["summary", "cifar10_vgg11", "--classes", "0"], "--classes 0: at least one class is needed"),
        (["evaluate", "runs/none"], "runs/none is not a run folder"),
        (["predict", "zoo:scenes", "image.png"], "zoo:scenes: no such entry of the zoo"),
        (["predict", "zoo:cifar10_vgg11", "none.png"], "none.png: no such file or folder"),
        (["analyze", "runs/none"], "runs/none is not a run folder"),
        (["robustness", "zoo:cifar10_vgg11", "runs/none"], "runs/none is not a run folder"),
        (["report", "zoo:cifar10_vgg11", "runs/none"], "runs/none is not a run folder"),
        (["export", "runs/none"], "runs/none is not a run folder"),
        (["export", "zoo:cifar10_vgg11", "--calibration", "3"], "--calibration belongs to --int8"),
        (["export", "zoo:cifar10_vgg11", "--format", "onxx"], "invalid choice: 'onxx'"),
        (["evaluate", "zoo:cifar10_vgg11", "--weights", "first"], "invalid choice: 'first'"),
        (["recipes", "show", "bcd"], "no such recipe"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments, sentence, attempt, capsys, monkeypatch):
    with attempt("wrong values"):
        monkeypatch.chdir(ROOT)
        text = " ".join(re.sub("[│╭╮╰╯─]", " ", call(capsys, *arguments, status=2)).split())
        assert sentence in text
        assert "Traceback" not in text


def test_help_and_mistyped_names_do_not_wait_for_torch(tmp_path):
    command_lines = [["--help"], ["trian"], *([verb, "--help"] for verb in VERBS), ["train", "cifar10_vgg11", "--help"]]
    command_lines += [["recipes"], ["recipes", "show", "cifar10_vgg11"], ["recipes", "copy", "cifar10_vgg11"]]
    command_lines += [["train", "nothing"], ["train", "a/b.yaml"], ["train", "--resume", "runs/none"]]
    command_lines += [["train", "cifar10_vgg11", "--trian.epochs", "1"], ["train", "cifar10_vgg11", "train.epochs=0"]]
    command_lines += [["check-data", "nothing"], ["compare", "nothing", "--out", "x"], ["summary", "nothing"]]
    for verb in ("evaluate", "analyze", "robustness", "report", "export", "summary", "web"):
        command_lines += [[verb, "runs/none"], [verb, "zoo:none"]]
    command_lines += [["predict", "zoo:none", "a.png"], ["predict", "zoo:cifar10_vgg11", "a.png"]]
    command_lines += [["benchmark", "none.onnx"]]
    found = call_alone(*command_lines, cwd=tmp_path)
    for arguments, (status, text, slow) in zip(command_lines, found, strict=True):
        fine = "--help" in arguments or arguments[0] == "recipes"
        assert (status, slow) == (0 if fine else 2, []), (arguments, text)
        assert text.strip() and "Traceback" not in text


def fail(error: BaseException):
    """A verb that ends with this error."""

    def verb(arguments, prog) -> None:
        raise error

    return verb


def test_errors_become_sentences_and_statuses(capsys):
    loader = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
    for error, status, sentence in (
        (ValueError("no such thing"), 2, "error: no such thing\n"),
        (FileNotFoundError("x: no such file"), 2, "error: x: no such file\n"),
        (ImportError("needs a package"), 2, "error: needs a package\n"),
        (ValueError(f"{loader}ValueError: a.png: cut off\n"), 2, "error: a.png: cut off\n"),
        (ValueError("\x1b[31mred\x07: no such class"), 2, "error: \\x1b[31mred\\x07: no such class\n"),
        (FloatingPointError("loss is not finite"), 1, "error: loss is not finite\n"),
        (Interrupted("stopped, state saved", signal.SIGTERM), 143, "stopped, state saved\n"),
        (Interrupted("", signal.SIGINT), 130, ""),
        (KeyboardInterrupt(), 130, ""),
    ):
        with pytest.raises(SystemExit) as stop:
            run_verb(fail(error))
        assert (stop.value.code, capsys.readouterr().err) == (status, sentence)


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("y\nz"), RecursionError(), UnicodeEncodeError("a", "b", 0, 1, "c")]
)
def test_an_error_that_nobody_thought_of_has_a_log_file(error, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        run_verb(fail(error), ["RUN"])
    said = capsys.readouterr().err
    (log,) = tmp_path.iterdir()
    first = str(error).partition("\n")[0]
    what = f"error: {type(error).__name__}: {first}; nobody thought of this error, its details are in {log}\n"
    assert (stop.value.code, said) == (3, what)
    text = log.read_text()
    assert text.startswith(f"{sys.argv}\npython {sys.version}\n") and f"torch {torch.__version__}" in text
    assert text.endswith("".join(traceback.format_exception_only(error))) and "in verb\n    raise error\n" in text
    with pytest.raises(SystemExit) as stop:
        run_verb(fail(error), ["RUN", "--debug"])
    said = capsys.readouterr().err
    assert stop.value.code == 3 and "in verb\n    raise error\n" in said and "error: " not in said.splitlines()[0]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(SystemExit) as stop:
        run_verb(fail(error), ["RUN"])
    assert stop.value.code == 3
    said = capsys.readouterr().err
    assert (
        said
        == f"error: {type(error).__name__}: {first}; nobody thought of this error, --debug shows where it comes from\n"
    )


def test_debug_anywhere_is_no_argument_of_the_verb(capsys):
    def verb(arguments, prog) -> None:
        assert (arguments, prog) == (["a", "b"], "prog")
        raise ValueError("known")

    with pytest.raises(SystemExit) as stop:
        run_verb(verb, ["--debug", "a", "b"], "prog")
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("Traceback (most recent call last):\n")
    with pytest.raises(SystemExit) as stop:
        main(["--debug", "recipes", "show", "none"])
    assert stop.value.code == 2 and "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", ["recipes", "recipes show cifar10_vgg11", "--help", "--version", "train cifar10_vgg11 --help"]
)
def test_a_reader_that_ends_ends_the_command_quietly(arguments):
    """As with `| head`: here the reader is gone before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "detection", *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--data.root", "x date=2024"], "data.root", Path("x date=2024")),
        (["--data.root=a=b=c"], "data.root", Path("a=b=c")),
        (["data.root=runs/lr=0.1"], "data.root", Path("runs/lr=0.1")),
        (["--data.root", "train.epochs=3"], "data.root", Path("train.epochs=3")),
        (["data.root=--odd"], "data.root", Path("--odd")),
        (["--data.root", "-odd"], "data.root", Path("-odd")),
        (["--model.backbone.weights", "runs/lr=0.1"], "model.backbone.weights", "runs/lr=0.1"),
        (["--train.epochs=2"], "train.epochs", 2),
        (["train.epochs=2"], "train.epochs", 2),
        (["--hoyer.weight", "-0"], "hoyer.weight", 0.0),
        (["--data.classes", "a=b", "$x$ = 1", "-c", "--train.epochs", "2"], "data.classes", ["a=b", "$x$ = 1", "-c"]),
        (["--data.classes", "a", "train.epochs=2"], "data.classes", ["a"]),
        (["--data.classes"], "data.classes", []),
        (["--model.backbone.weights", "None"], "model.backbone.weights", None),
    ],
)
def test_equals_signs_in_overrides(attempt, arguments, key, value, tmp_path):
    recipe = tmp_path / "lr=0.1.yaml"
    recipe.write_text("data: {format: synthetic, root: x}\nmodel: {backbone: {weights: y}}\n")
    with attempt("wrong values"):
        parser = recipe_parser("", "prog")
        parser.add_argument("--out")
        options = ["--out", "runs/lr=0.1 x=2"]
        for given in ([str(recipe), *arguments, *options], [str(recipe), *options, *arguments]):
            found, rest = parse_recipe(parser, given)
            for part in key.split("."):
                found = getattr(found, part)
            assert (found, rest.out) == (value, "runs/lr=0.1 x=2")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data.rot=x"], "--data.rot: no such key of a recipe; did you mean --data.root? (RECIPE --help lists all)"),
        (
            ["--data.root", "x", "date=2024"],
            "--date: no such key of a recipe; did you mean --data.verify? (RECIPE --help",
        ),
        (["--data.root", "x", "y"], "'y': no option and no key of a recipe; expected --section.key VALUE"),
        (["--data.root"], "--data.root: its value is missing (one that begins with -- is given by data.root=VALUE)"),
        (["--data.root", "--train.epochs", "2"], "--data.root: its value is missing"),
        (["--train.epochs=2=3"], "train.epochs: Input should be a valid integer"),
        (["--train.epochs="], "train.epochs: Input should be a valid integer"),
        (["=3"], "--: no such key of a recipe"),
        (["--data", "x"], "--data: a section of a recipe; expected a key of it, such as --data.format (RECIPE --help"),
        (["--train.epochs.more", "3"], "--train.epochs.more: no such key of a recipe; did you mean --train.epochs?"),
        (["--\x1b[31m", "3"], "--\\x1b[31m: no such key of a recipe"),
    ],
)
def test_wrong_overrides_are_a_sentence(attempt, arguments, sentence, capsys):
    with attempt("wrong values"):
        said = call(capsys, "train", "scenes_retinanet_resnet18", *arguments, status=2)
        assert sentence in said and said.count("\n") == 1


def test_a_run_is_found_without_its_package(tmp_path):
    assert check_run("zoo:cifar10_vgg11") == ROOT / "backbones" / "zoo" / "cifar10_vgg11"
    (tmp_path / "config.yaml").touch()
    assert check_run(tmp_path) == tmp_path


# Recipes


def test_recipes_are_listed_shown_and_copied(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    listed = call(capsys, "recipes")
    assert call(capsys, "recipes", "list") == listed
    assert [name for name in recipe_names() if not re.search(rf"│ {name} +│ (detection|classification) ", listed)] == []
    assert len(recipe_names()) == len(list((ROOT / "configs").glob("*.yaml"))) > 15
    assert "│ Drawn scenes, no download: RetinaNet on a one-time-step spiking ResNet18 of half width " in listed
    text = (ROOT / "configs" / "bccd_retinanet_resnet18.yaml").read_text()
    assert call(capsys, "recipes", "show", "bccd_retinanet_resnet18") == text
    assert call(capsys, "recipes", "copy", "bccd_retinanet_resnet18") == "bccd_retinanet_resnet18.yaml\n"
    assert call(capsys, "recipes", "copy", "bccd_retinanet_resnet18", "a/b") == "a/b/bccd_retinanet_resnet18.yaml\n"
    for folder in ("", "a/b"):
        assert (tmp_path / folder / "bccd_retinanet_resnet18.yaml").read_text() == text
    assert "exists already" in call(capsys, "recipes", "copy", "bccd_retinanet_resnet18", status=2)
    changed = text.replace("epochs: 40", "epochs: 41")
    (tmp_path / "bccd_retinanet_resnet18.yaml").write_text(changed)
    assert "(default: 41)" in call(capsys, "train", "bccd_retinanet_resnet18.yaml", "--help")
    assert "(default: 40)" in call(capsys, "train", "bccd_retinanet_resnet18", "--help")


def test_first_sentence_of_a_recipe():
    text = "# A network,\n# of arXiv:1.2, made small. And more.\n#   hoyer-det train x\nmodel: {}\n"
    assert recipes.first_sentence(text) == "A network, of arXiv:1.2, made small"
    assert recipes.first_sentence("model: {}\n") == ""


@pytest.mark.pictures
def test_a_recipe_is_trained_by_its_name(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    short = ["--data.scenes.num_train", "8", "--data.scenes.num_val", "4", "--train.epochs", "1", "--data.workers", "0"]
    small = ["--model.backbone.width", "0.125", "--model.neck.out_channels", "8", "train.batch_size=4"]
    arguments = ["train", "scenes_retinanet_resnet18", *short, *small]
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/hoyer-det", *arguments])
    out = call(capsys, *arguments)
    run = Run.open("runs/scenes_retinanet_resnet18")
    assert run.finished and run.config.data.scenes.num_train == 8 and run.config.model.backbone.width == 0.125
    assert run.info().command == f"hoyer-det {' '.join(arguments)}"
    metrics = run.history()[-1].metrics
    last = "  ".join(f"{key} {metrics[key]:.4f}" for key in ("AP", "AP50", "activity"))
    assert f"{last}  run folder: runs/scenes_retinanet_resnet18\n" in out
    assert "pictures: runs/scenes_retinanet_resnet18/curves.png, " in out
    out = call(capsys, "train", "--resume", "runs/scenes_retinanet_resnet18")
    assert out == "runs/scenes_retinanet_resnet18: finished already, nothing to go on with\n"
    error = call(capsys, *arguments, status=2)
    assert "runs/scenes_retinanet_resnet18 exists already; name another folder" in error
    error = call(capsys, "train", "--resume", "runs/scenes_retinanet_resnet18", "--out", "x", status=2)
    assert "has its own folder: leave --out out" in error
    for name in ("activation", "name"):
        error = call(capsys, *arguments, f"model.backbone.{name}=hoier", "--out", "runs/new", status=2)
        assert f"model.backbone.{name}: unknown 'hoier'" in error


def test_the_logged_command_is_what_a_user_types(monkeypatch):
    for program, typed in (
        ("/x/.venv/bin/hoyer-det", ["hoyer-det"]),
        ("/x/detection/__main__.py", ["hoyer-det"]),
        ("tools/train_det.py", ["python", "tools/train_det.py"]),
    ):
        monkeypatch.setattr(sys, "argv", [program, "train", "x"])
        assert command_line() == [*typed, "train", "x"]


def test_checks_the_data_of_a_classifier_too(capsys, tmp_path):
    recipe = {"task": "classification", "data": {"format": "folder", "root": str(tmp_path / "images")}}
    recipe["optimizer"] = {"warmup_steps": 5}  # of 12 steps
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for split, number in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                draw_image(folder / f"{index}.png", index)
    (tmp_path / "images" / "train" / "cat" / "0.png").write_bytes(b"no image")
    out = call(capsys, "check-data", tmp_path / "recipe.yaml").splitlines()
    start = out.index("train: left out or mended: 1")
    told, rows = out[start + 1], [line.replace("│", "").split() for line in out]
    assert out[0] == "train: 5 images of 2 classes" and ["cat", "2"] in rows[:start] and ["dog", "3"] in rows
    assert "cat/0.png: " in told and told.endswith("; left out") and out[start + 2] == "val: 4 images of 2 classes"
    assert out[-2:] == ["val: left out or mended: 0", "training can go on"]
    said = call(capsys, "check-data", tmp_path / "recipe.yaml", "--data.val", "train")
    assert f"in both train and val: 5 images, the first: {tmp_path}/images/train" in said
    with pytest.raises(SystemExit) as stop:
        main(["check-data", str(tmp_path / "recipe.yaml"), "--data.root", str(tmp_path / "none")])
    assert stop.value.code == 1
    assert capsys.readouterr().out.startswith("training cannot go on: ")


def draw_image(path, seed: int) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)


# Summaries


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells of a summary's table by layer."""
    found = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")
    ]
    return {name: cells for name, *cells in found}


def test_summary_of_a_classifier_is_what_a_hand_counts(capsys):
    """VGG11 of a quarter of the width at 32x32: 8 convolutions, the map halved in front of five of them, 3 linears."""
    text = call(capsys, "summary", "cifar10_vgg11", "--classes", "7")
    convolutions = [(3, 16, 32), (16, 32, 16), (32, 64, 8), (64, 64, 8), (64, 128, 4), (128, 128, 4), (128, 128, 2)]
    convolutions.append((128, 128, 2))
    linears = [(512, 1024), (1024, 1024), (1024, 7)]
    macs = [9 * before * after * side**2 for before, after, side in convolutions]
    macs += [before * after for before, after in linears]
    weights = [9 * before * after for before, after, _ in convolutions] + macs[-3:]
    rows = rows_of(text)
    counted = [cells for cells in rows.values() if cells[0].startswith(("conv", "linear"))]
    assert [cells[0] for cells in counted] == [
        *(f"conv 3x3 {before} -> {after}" for before, after, _ in convolutions),
        *(f"linear {before} -> {after}" for before, after in linears),
    ]
    assert [cells[1] for cells in counted] == [
        *(f"{after}x{side}x{side}" for _, after, side in convolutions),
        *(str(after) for _, after in linears),
    ]
    assert [cells[2] for cells in counted] == [f"{number:,}" for number in weights]
    assert [cells[3] for cells in counted] == [f"{number / 1e6:,.3f}" for number in macs]
    assert [cells[4] for cells in counted] == ["pixels (stem)", *["spikes"] * 10]
    spikes = [cells for cells in rows.values() if cells[0] == "HoyerSpike"]
    neurons = [16 * 16**2, 32 * 8**2, 64 * 8**2, 64 * 4**2, 128 * 4**2, *[128 * 2**2] * 3, 1024, 1024]
    assert len(spikes) == len(neurons) and {cells[2] for cells in spikes} == {"1"}
    norms = 2 * sum(after for _, after, _ in convolutions)
    assert f"{sum(weights) + norms + len(neurons):,} parameters in all" in text
    assert f"{sum(macs) / 1e6:,.3f} million MACs in 11 layers, {sum(macs[1:]) / 1e6:,.3f} of them in 10 layers" in text
    assert f"10 spike layers, {sum(neurons):,} neurons" in text
    assert "classes" not in text


def test_summary_names_the_analogue_parts_of_a_detector(capsys):
    small = ["--model.backbone.width", "0.125", "--model.neck.out_channels", "16"]
    text = call(capsys, "summary", "scenes_retinanet_resnet18", *small)
    assert "built with 10 classes, since the recipe names none; --classes N says how many" in text
    rows = rows_of(text)
    assert rows["backbone.body.stem.0"] == ["conv 7x7 3 -> 8 /2", "8x64x64", "1,176", "4.817", "pixels (stem)"]
    assert rows["backbone.neck.fpn.inner_blocks.0.0"][4] == "spikes"
    assert rows["backbone.neck.fpn.layer_blocks.0.0"][4] == "real values (analogue neck)"
    # A shared layer runs on three maps: 9 anchors' classes, background included, at 16x16, 8x8 and 4x4.
    logits = rows["head.classification_head.cls_logits"]
    macs = 9 * 16 * 99 * (16**2 + 8**2 + 4**2)
    assert logits[:2] == ["conv 3x3 16 -> 99", "99x16x16 (3 calls)"]
    assert logits[2:] == [f"{9 * 16 * 99 + 99:,}", f"{macs / 1e6:,.3f}", "real values (analogue head)"]
    assert "22 spike layers" in text
    spiking = ["--model.neck.spiking", "True", "--model.head.spiking", "True", "--model.head.norm", "None"]
    rows = rows_of(call(capsys, "summary", "scenes_retinanet_resnet18", *small, *spiking, "--classes", "4"))
    assert rows["head.classification_head.cls_logits"][0] == "conv 3x3 16 -> 45"
    assert {cells[4] for name, cells in rows.items() if name != "backbone.body.stem.0"} == {"spikes", "potentials"}
    twin = call(capsys, "summary", "scenes_retinanet_resnet18", *small, "--model.backbone.activation", "relu")
    assert {cells[4] for cells in rows_of(twin).values()} >= {"pixels (stem)", "real values"}
    assert "0 spike layers, 0 neurons" in twin


def test_summary_of_a_run_has_its_classes(capsys):
    text = call(capsys, "summary", "zoo:cifar10_vgg11")
    assert rows_of(text)["head.10"][0] == "linear 1024 -> 10"
    assert "built with" not in text and "zoo:cifar10_vgg11: vgg11 x0.25, activation hoyer" in text


# Scripts


def test_scripts_run_one_verb(monkeypatch, capsys):
    scripts = sorted((ROOT / "tools").glob("*.py"))
    names = "ablate analyze check_data evaluate export predict report robustness train_cls train_det zoo"
    assert [path.stem for path in scripts] == names.split()
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "train_cls", "--help")
    assert not stop.value.code and capsys.readouterr().out.startswith("usage: hoyer-det train RECIPE")


def test_python_dash_m_detection_is_the_command(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "detection", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert run("--version").stdout == f"hoyer-det {detection.__version__}\n"
    done = run("trian")
    assert done.returncode == 2 and done.stderr.startswith("error: trian: no such command; did you mean 'train'?")


def test_zoo_entry_keeps_no_place_of_one_machine():
    config = read_recipe(ROOT / "configs" / "voc_retinanet_resnet34.yaml")
    config.data.root, config.model.backbone.weights = config.data.root.absolute(), "/home/me/runs/pretrained"
    changed = zoo.without_places(config)
    assert str(changed.data.root) == f"data/{config.data.root.name}"
    assert changed.model.backbone.weights == "runs/pretrained"
    assert config.data.root.is_absolute()
    config.model.backbone.weights = None
    config.model.weights = "/home/me/runs/whole"
    assert zoo.without_places(config).model.weights == "runs/whole"
