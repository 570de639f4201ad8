"""Classification: the whole road to a run folder, what is refused, transfer to a detector, comparisons."""

import copy
import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import draw_curves, log_lines, run_together, run_tool, start, tool
from PIL import Image
from safetensors.torch import load_file

import detection
from detection.models import build_classifier, build_detector
from detection.runs import Run
from detection.tasks.recipes import ClassificationRecipe, DetectionRecipe
from detection.tasks.run import load_model

CLASSES = ("circle", "square", "triangle", "star")
LEARNS = {
    "model": {"backbone": {"name": "vgg11", "width": 0.25, "stem": "cifar"}},
    "data": {"num_train": 2000, "num_val": 400, "augment": {"padding": 0}},
    "optimizer": {"name": "muon", "muon_lr": 0.02, "lr": 0.003, "warmup_steps": 10, "clip_norm": 1.0},
    "train": {"epochs": 4, "batch_size": 32, "channels_last": True},
}


def recipe(folder: Path, **sections) -> Path:
    """A recipe of seconds; `sections` are merged into it."""
    values = {
        "task": "classification",
        "model": {"backbone": {"name": "resnet18", "width": 0.125, "stem": "imagenet"}},
        "data": {"format": "synthetic", "size": 32, "num_train": 64, "num_val": 24},
        "hoyer": {"weight": 0.01},
        "optimizer": {"lr": 0.003, "warmup_steps": 2, "clip_norm": 1.0},
        "train": {"epochs": 2, "batch_size": 16},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def error_of(monkeypatch, capsys, name: str, *arguments) -> str:
    """The one sentence with which a tool refuses."""
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, name, *arguments)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny training that went through: (recipe, run folder)."""
    folder = tmp_path_factory.mktemp("classification")
    path = recipe(folder, train={"epochs": 3, "batch_size": 16, "ema_decay": 0.8})
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw_curves(monkeypatch)
        run_tool(monkeypatch, "train_cls", path, "--out", folder / "run")
    return path, folder / "run"


# The run folder


def test_run_folder_and_log(finished):
    folder = finished[1]
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "best.safetensors",
        "last.safetensors",
        "ema.safetensors",
        "curves.png",
        "dynamics.png",
    }
    run = Run.open(folder)
    assert isinstance(run.config, ClassificationRecipe)
    assert tuple(run.config.data.classes) == CLASSES
    history = log_lines(folder)
    assert [line["step"] for line in history] == [4, 8, 12]
    layers = {f"backbone.stages.{stage}.{block}.branch.0" for stage in range(4) for block in range(4)} | {"head.1"}
    for line in history:
        assert 0 <= line["top1"] <= line["top5"] <= 1
        assert line["loss"] == pytest.approx(line["loss/classification"] + line["loss/hoyer"], rel=1e-5)
        for key in ("v_th", "extremum", "activity_per_layer", "hoyer_per_layer"):
            assert layers < line[key].keys()
        assert {"top1", "val_loss", "activity"} < line["ema"].keys()
    # Histograms of the potentials in the first and the last epoch only
    assert ["potentials" in line for line in history] == [True, False, True]
    assert history[0]["potentials"].keys() == history[0]["activity_per_layer"].keys()
    assert all(min(Image.open(folder / name).size) > 400 for name in ("curves.png", "dynamics.png"))


@pytest.mark.parametrize("weights", ["last", "best", "ema"])
def test_evaluate_gives_the_logged_numbers_again(finished, monkeypatch, capsys, weights):
    run_tool(monkeypatch, "evaluate", finished[1], "--weights", weights)
    out = capsys.readouterr().out
    assert "equal to the log in every digit" in out
    assert "top1" in out and "val_loss" in out


def test_evaluate_takes_another_precision(finished, monkeypatch, capsys):
    run = finished[1]
    own, same, other = (detection.evaluate(run, precision=each).metrics for each in (None, "no", "bf16"))
    assert own == same and own["val_loss"] != other["val_loss"]
    assert own["val_loss"] == pytest.approx(other["val_loss"], rel=0.2)
    with pytest.raises(ValueError, match="'no', 'bf16', 'fp16' or 'auto'"):
        detection.evaluate(run, precision="half")
    run_tool(monkeypatch, "evaluate", run, "--precision", "bf16")
    assert "not equal to the log: val_loss" in capsys.readouterr().out.replace("top1, ", "").replace("top5, ", "")


def test_evaluate_says_what_a_classifier_has_not(finished, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "evaluate", finished[1], "--save", tmp_path / "saved")
    assert stop.value.code == 2
    assert "--save" in capsys.readouterr().err
    run_tool(monkeypatch, "train_cls", finished[0], "--out", tmp_path / "run", "train.ema_decay=0", "train.epochs=1")
    capsys.readouterr()
    assert "train.ema_decay" in error_of(monkeypatch, capsys, "evaluate", tmp_path / "run", "--weights", "ema")


def test_average_of_weights_follows_the_definition(finished, monkeypatch, tmp_path):
    """After one step the average is the weights; after two it is decay * first + (1 - decay) * second."""
    for epochs in (1, 2):  # one step an epoch; without warm-up and with equal steps both runs start alike
        run_tool(
            monkeypatch,
            "train_cls",
            finished[0],
            *("data.num_train=16", f"train.epochs={epochs}", "optimizer.warmup_steps=0", "optimizer.schedule=step"),
            *("--optimizer.milestones", "1.0", "--out", tmp_path / f"run{epochs}"),
        )
    first, last = load_file(tmp_path / "run1" / "last.safetensors"), load_file(tmp_path / "run2" / "last.safetensors")
    average = load_file(tmp_path / "run2" / "ema.safetensors")
    assert average.keys() == last.keys()
    moved = 0
    for key, value in average.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.8 * first[key] + 0.2 * last[key], rtol=1e-4, atol=1e-5)
            moved += int(not torch.equal(first[key], last[key]))
        else:  # a count is not averaged
            assert torch.equal(value, last[key])
    assert moved > 40
    assert any(key.endswith("extremum") for key in average)


def test_learns_the_drawn_shapes(monkeypatch, tmp_path, capsys):
    """Nine of ten right, in well under a minute on two cores."""
    path = recipe(tmp_path, **LEARNS)
    run_tool(monkeypatch, "train_cls", path, "--out", tmp_path / "run")
    line = log_lines(tmp_path / "run")[-1]
    assert line["top1"] >= 0.9
    assert 0.02 < line["activity"] < 0.5
    run_tool(monkeypatch, "evaluate", tmp_path / "run")
    assert "equal to the log in every digit" in capsys.readouterr().out


def test_two_processes_share_the_images(finished, monkeypatch, capsys, tmp_path):
    options = [finished[0], "--data.num_val", "23", "--out", tmp_path / "run"]
    run_together(2, tool, "train_cls", *options, log=tmp_path / "log.txt")
    history = log_lines(tmp_path / "run")
    assert [line["step"] for line in history] == [2, 4, 6]  # 64 images in steps of 2 x 16
    assert round(23 * history[-1]["top1"]) == pytest.approx(23 * history[-1]["top1"])  # each image counted once
    run_tool(monkeypatch, "evaluate", tmp_path / "run")
    assert "equal to the log in every digit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    [
        ["--optimizer.name", "adam"],
        ["--train.precision", "bf16", "--train.channels_last", "True"],
        ["--train.low_memory", "True", "--train.accumulate", "2"],
        ["--model.backbone.name", "vgg11", "--model.backbone.stem", "cifar", "--model.backbone.pool_first", "False"],
        ["--model.backbone.name", "mobilenetv1", "--model.backbone.extremum", "channel", "--model.dropout", "0.1"],
        [
            "--model.backbone.name",
            "mobilenetv2",
            "--model.backbone.stem",
            "cifar",
            "--model.backbone.extremum",
            "channel",
        ],
        ["--model.backbone.activation", "fixed", "--label_smoothing", "0.1", "--data.augment.cutout", "8"],
    ],
    ids=["adam", "bf16", "low memory, accumulated", "norm-before-pool", "mobilenet", "mobilenetv2", "fixed"],
)
def test_options_train(finished, monkeypatch, tmp_path, overrides):
    run_tool(monkeypatch, "train_cls", finished[0], *overrides, "train.epochs=1", "--out", tmp_path / "run")
    assert math.isfinite(Run.open(tmp_path / "run").history()[0].loss)


def test_the_recipe_says_which_task_it_is_and_either_script_trains_it(finished, monkeypatch, capsys, tmp_path):
    run_tool(monkeypatch, "train_det", finished[0], "--out", tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert isinstance(run.config, ClassificationRecipe) and run.checksums() == Run.open(finished[1]).checksums()
    message = error_of(monkeypatch, capsys, "train_cls", recipe(tmp_path, task="clasification"))
    assert "task: expected detection or classification, got 'clasification'" in message


def test_values_that_cannot_train_are_refused(monkeypatch, capsys, tmp_path):
    path = recipe(tmp_path, model={"std": [0.2, 0.0, 0.2]})
    assert "model.std.1" in error_of(monkeypatch, capsys, "train_cls", path, "--out", tmp_path / "run")
    path = recipe(tmp_path, optimizer={"milestones": [60, 80]})
    assert "optimizer.milestones.0" in error_of(monkeypatch, capsys, "train_cls", path, "--out", tmp_path / "run")
    path = recipe(tmp_path, distillation={"teacher": "runs/x", "logits": 0})
    assert "would teach nothing" in error_of(monkeypatch, capsys, "train_cls", path, "--out", tmp_path / "run")
    path = recipe(tmp_path, model={"backbone": {"name": "vgg11", "width": 0.125, "stem": "cifar"}}, data={"size": 12})
    message = error_of(monkeypatch, capsys, "train_cls", path, "--out", tmp_path / "run")
    assert "data.size 12" in message and "stride is 16" in message
    assert not (tmp_path / "run").exists()


def test_run_that_ended_before_its_first_evaluation(finished, monkeypatch, capsys, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    line = {"epoch": 1, "loss": 1.0}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert "its log has no top1 yet" in error_of(monkeypatch, capsys, "evaluate", tmp_path / "run")


def test_images_are_normalised_inside_the_network(finished, monkeypatch, tmp_path):
    """As images in [0, 1] go in, another mean and deviation is another network; an old run folder opens as it was."""
    folder, mean, std = finished[1], (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    images = torch.rand(2, 3, 32, 32)
    config = Run.open(folder).config
    model = load_model(Run.open(folder))
    for each, expected in ((config.model.mean, model.normalise.mean), (config.model.std, model.normalise.std)):
        torch.testing.assert_close(255 * torch.tensor(each).view(3, 1, 1), expected)
    assert not any("normalise" in key for key in load_file(folder / "last.safetensors"))
    bare = copy.deepcopy(model)
    bare.normalise = torch.nn.Identity()
    shape = (3, 1, 1)
    with torch.no_grad():
        by_hand = (images - torch.tensor(config.model.mean).view(shape)) / torch.tensor(config.model.std).view(shape)
        torch.testing.assert_close(model(images), bare(by_hand), rtol=1e-3, atol=1e-3)
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    values = yaml.safe_load((old / "config.yaml").read_text())
    values["model"] = {key: value for key, value in values["model"].items() if key not in ("mean", "std")}
    values["data"] |= {"mean": list(mean), "std": list(std)}
    del values["plugins"], values["data"]["options"], values["model"]["backbone"]["options"]
    (old / "config.yaml").write_text(yaml.safe_dump(values))
    opened = load_model(Run.open(old))
    torch.testing.assert_close(opened.normalise.std, 255 * torch.tensor(std).view(shape))
    with torch.no_grad():
        by_hand = (images - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
        torch.testing.assert_close(opened(images), bare(by_hand), rtol=1e-3, atol=1e-3)


# Transfer to a detector


def detector_config(weights: Path, **backbone) -> DetectionRecipe:
    model = {
        "backbone": {"name": "resnet18", "width": 0.125, "weights": str(weights)} | backbone,
        "neck": {"out_channels": 16, "extra_levels": 0},
        "head": {"num_convs": 1},
        "min_size": [64],
        "max_size": 64,
    }
    return DetectionRecipe.model_validate({"model": model, "data": {"format": "synthetic", "classes": ["a", "b"]}})


def test_a_detector_takes_over_weights_and_buffers_bit_by_bit(finished):
    folder = finished[1]
    detector = build_detector(detector_config(folder))
    saved = load_file(folder / "last.safetensors")
    wanted = {key.removeprefix("backbone."): value for key, value in saved.items() if key.startswith("backbone.")}
    found = detector.backbone.body.state_dict()
    assert found.keys() == wanted.keys()
    assert any(key.endswith("extremum") for key in found) and any(key.endswith("running_var") for key in found)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    average = build_detector(detector_config(folder / "ema.safetensors")).backbone.body.state_dict()
    assert not torch.equal(average["stem.0.weight"], wanted["stem.0.weight"])


@pytest.mark.parametrize(
    ("backbone", "parts"),
    [
        ({"stem": "cifar"}, ["stem 'imagenet'", "'cifar'", "large images", "pretrain with the stem"]),
        ({"width": 0.25}, ["width 0.125", "0.25"]),
        ({"name": "resnet34"}, ["name 'resnet18'", "'resnet34'"]),
        ({"activation": "relu"}, ["activation 'hoyer'", "'relu'"]),
        ({"extremum": "channel"}, ["extremum 'layer'", "'channel'"]),
        ({"pool_first": False}, ["pool_first True", "False"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_weights_of_another_backbone_are_refused(finished, backbone, parts):
    for weights in (finished[1], finished[1] / "best.safetensors"):
        with pytest.raises(ValueError) as error:
            build_detector(detector_config(weights, **backbone))
        for part in [str(finished[1]), "model.backbone.weights", *parts]:
            assert part in str(error.value)


def test_missing_unknown_and_wrongly_shaped_keys_are_named(finished, tmp_path):
    from safetensors.torch import save_file

    state = load_file(finished[1] / "last.safetensors")
    key = "backbone.stages.1.0.branch.1.weight"
    for changed, expected in (
        ({name: value for name, value in state.items() if name != key}, "is missing"),
        (state | {"backbone.more": torch.zeros(1)}, "'more' is unknown"),
        (state | {key: torch.zeros(3, 3)}, "has the shape (3, 3)"),
    ):
        save_file(changed, tmp_path / "weights.safetensors")
        with pytest.raises(ValueError) as error:
            build_detector(detector_config(tmp_path / "weights.safetensors"))
        assert expected in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"last\.safetensors"):
        build_detector(detector_config(tmp_path))


def test_a_classifier_goes_on_from_a_classifier(finished, monkeypatch, tmp_path):
    path, folder = finished
    config = Run.open(folder).config
    config.model.backbone.weights = str(folder)
    model = build_classifier(config)
    saved = load_file(folder / "last.safetensors")
    assert torch.equal(model.backbone.state_dict()["stem.0.weight"], saved["backbone.stem.0.weight"])
    run_tool(
        monkeypatch,
        "train_cls",
        path,
        *("--model.backbone.weights", folder, "train.epochs=1", "--out", tmp_path / "run"),
    )
    run_tool(monkeypatch, "evaluate", tmp_path / "run")


# Recipes of a comparison


SHORT = ["--train.epochs", "1", "--train.ema_decay", "0"]


def of_two_variants(recipe: Path, folder: Path) -> list:
    """Arguments of a comparison."""
    return [recipe, "--out", folder, "--variants", "hoyer", "half=--model.backbone.width 0.25"]


@pytest.fixture(scope="module", autouse=True)
def children_start_at_once(tmp_path_factory):
    """Trainings of a comparison are forked; test_writers.py has the processes of their own that they are."""
    log = tmp_path_factory.mktemp("children") / "log.txt"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("detection.cli.compare.run_child", partial(status_of_a_training, log))
        yield


def status_of_a_training(log: Path, arguments: list[str]) -> int:
    process = start(tool, "train_cls", *arguments, log=log)
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module")
def compared(finished, tmp_path_factory):
    """A comparison of two variants that was trained once: its folder."""
    folder = tmp_path_factory.mktemp("compared") / "runs"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_tool(monkeypatch, "ablate", *of_two_variants(finished[0], folder), "--seeds", "3", *SHORT)
    return folder


def test_ablation_trains_each_variant_once_and_compares_them(finished, compared, monkeypatch, capsys, tmp_path):
    arguments = of_two_variants(finished[0], tmp_path / "runs")
    shutil.copytree(compared, tmp_path / "runs")
    names = ["half_seed3", "hoyer_seed3"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()) == names
    half = Run.open(tmp_path / "runs" / "half_seed3").config
    assert half.model.backbone.width == 0.25 and half.train.seed == 3 and half.train.epochs == 1
    # A second seed, as if it had been trained: nothing is left to do but to compare.
    top1 = {}
    for name, value in zip(names, (0.25, 0.75), strict=True):
        other = tmp_path / "runs" / name.replace("3", "4")
        shutil.copytree(tmp_path / "runs" / name, other)
        line = json.loads((other / "metrics.jsonl").read_text())
        top1[name], top1[other.name] = line["top1"], value
        (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("seed: 3", "seed: 4"))
        (other / "metrics.jsonl").write_text(json.dumps(line | {"top1": value}) + "\n")
    capsys.readouterr()
    run_tool(monkeypatch, "ablate", *arguments, "--seeds", "3", "4", *SHORT)
    assert capsys.readouterr().out.count("finished already") == 4
    table = (tmp_path / "runs" / "README.md").read_text()
    row, _ = [line for line in table.splitlines() if line.startswith("| half |")]  # and its costs
    mean = np.mean([top1["half_seed3"], top1["half_seed4"]])
    gap = mean - np.mean([top1["hoyer_seed3"], top1["hoyer_seed4"]])
    assert f"{mean:.4f} ±" in row and f"{gap:+.4f}" in row and "| 2 |" in row
    assert Image.open(tmp_path / "runs" / "ablation.png").width == 800
    (tmp_path / "runs" / "hoyer_seed3_old").mkdir()  # somebody's copy
    (tmp_path / "runs" / "hoyer_seed7").mkdir()
    shutil.copy(tmp_path / "runs" / "hoyer_seed3" / "config.yaml", tmp_path / "runs" / "hoyer_seed7")
    (tmp_path / "runs" / "hoyer_seed7" / "run.json").write_text("{}")
    run_tool(monkeypatch, "ablate", *arguments, "--seeds", "3", *SHORT)
    assert "| hoyer | none | 2 |" in (tmp_path / "runs" / "README.md").read_text()  # and an unfinished run
    capsys.readouterr()
    run_tool(monkeypatch, "results/tables", tmp_path / "runs")
    found = capsys.readouterr()
    assert "hoyer_seed7: not finished, left out" in found.err and "4 runs" in found.out


def test_a_comparison_that_cannot_be_is_refused(finished, compared, monkeypatch, capsys, tmp_path):
    arguments = of_two_variants(finished[0], compared)
    for name in ("rleu", "a/b=", "x_seed1=", "train.epochs=1"):
        message = error_of(monkeypatch, capsys, "ablate", finished[0], "--out", tmp_path / "x", "--variants", name)
        assert name in message and "allowed" in message
    message = error_of(monkeypatch, capsys, "ablate", *arguments, "--seeds", "3", *SHORT[2:], "--train.epochs", "2")
    assert "hoyer_seed3: trained with train.epochs 1, wanted is 2" in message
    message = error_of(monkeypatch, capsys, "ablate", finished[0], "--out", "x", "--variants", "hoyer", "hoyer=")
    assert "a name stands there twice" in message
    with pytest.raises(SystemExit):  # before anything is trained
        run_tool(monkeypatch, "ablate", *arguments, "bad=--optimizer.lr no", "--seeds", "5", *SHORT)
    assert not list(compared.glob("*_seed5"))


def test_a_comparison_goes_on_where_it_was_interrupted(finished, compared, monkeypatch, capsys, tmp_path):
    arguments = of_two_variants(finished[0], tmp_path / "runs")
    shutil.copytree(compared, tmp_path / "runs")
    # What fails in the middle is said in a sentence; what was left unfinished goes on.
    info = json.loads((tmp_path / "runs" / "half_seed3" / "run.json").read_text())
    del info["sha256"]
    (tmp_path / "runs" / "half_seed3" / "run.json").write_text(json.dumps(info))
    message = error_of(
        monkeypatch, capsys, "ablate", *arguments, "--seeds", "3", *SHORT, "--model.backbone.weights", tmp_path / "none"
    )
    assert "hoyer_seed3: trained with model.backbone.weights None" in message
    run_tool(monkeypatch, "ablate", *arguments, "--seeds", "3", *SHORT)
    assert "--resume" in capsys.readouterr().out
    assert Run.open(tmp_path / "runs" / "half_seed3").finished
    arguments[2] = tmp_path / "failing"
    message = error_of(monkeypatch, capsys, "ablate", *arguments, *SHORT, "--model.backbone.weights", tmp_path / "none")
    assert "hoyer_seed0: this run failed" in message
