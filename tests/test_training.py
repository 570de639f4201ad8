"""The whole road from files to a run folder, on drawn and on real images, and what bad input gives."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils import set_seed
from helpers import ROOT, build_datasets, draw_curves, log_lines, run_together, run_tool, tool
from PIL import Image

from backbones import hoyer_penalty
from detection.config import load_config, schema
from detection.data import build_loader
from detection.evaluation import METRICS
from detection.models import build_detector
from detection.runs import Run
from detection.tasks.recipes import DetectionRecipe
from detection.training.optim import build_optimizer

TINY_MODEL = {
    "backbone": {"name": "resnet18", "width": 0.125},
    "neck": {"levels": ["c3", "c4"], "extra_levels": 0, "out_channels": 16},
    "head": {"num_convs": 1, "norm": "group"},
    "min_size": [64],
    "max_size": 96,
}


def tiny_recipe(folder: Path, **sections) -> Path:
    recipe = {
        "model": TINY_MODEL,
        "data": {
            "format": "synthetic",
            "root": str(folder / "scenes"),
            "scenes": {"num_train": 12, "num_val": 5, "size": 64},
            "workers": 0,
        },
        "hoyer": {"weight": 0.01},
        "optimizer": {"lr": 0.003, "warmup_steps": 2, "clip_norm": 1.0},
        "train": {"epochs": 2, "batch_size": 4},
    }
    for name, values in sections.items():
        recipe[name] = recipe.get(name, {}) | values
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny training that went through: (recipe, run folder)."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = tiny_recipe(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw_curves(monkeypatch)
        run_tool(monkeypatch, "train_det", recipe, "--out", folder / "run")
    return recipe, folder / "run"


def test_run_folder_is_complete(finished):
    recipe, folder = finished
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "best.safetensors",
        "last.safetensors",
        "curves.png",
        "dynamics.png",
        "predictions.png",
    }
    config = load_config(folder / "config.yaml")
    assert config.data.classes
    assert config.model == load_config(recipe).model
    info = json.loads((folder / "run.json").read_text())
    assert str(recipe) in info["command"]
    assert info["versions"]["torch"] == torch.__version__.split("+")[0]
    assert info["sha256"] == Run.open(folder).checksums()
    for name in ("curves.png", "dynamics.png", "predictions.png"):
        assert min(Image.open(folder / name).size) > 100


def test_log_has_losses_metrics_activity_and_thresholds_per_layer(finished):
    history = log_lines(finished[1])
    assert [line["epoch"] for line in history] == [1, 2]
    layers = {f"backbone.body.stages.{stage}.{block}.branch.0" for stage in range(3) for block in range(4)}
    for line in history:
        terms = line["loss/classification"] + line["loss/bbox_regression"] + line["loss/hoyer"]
        assert line["loss"] == pytest.approx(terms, rel=1e-5)
        assert line["loss/hoyer"] == pytest.approx(0.01 * sum(line["hoyer_per_layer"].values()), rel=1e-5)
        assert set(METRICS) <= line.keys()
        assert 0 < line["activity"] < 1
        for key in ("activity_per_layer", "hoyer_per_layer", "v_th", "extremum"):
            assert layers < line[key].keys()
            assert all(0 <= value <= 2 for value in line[key].values())


@pytest.mark.parametrize("weights", ["last", "best"])
def test_evaluate_gives_the_logged_numbers_again(finished, monkeypatch, capsys, weights):
    run_tool(monkeypatch, "evaluate", finished[1], "--weights", weights)
    assert "equal to the log in every digit" in capsys.readouterr().out


def test_evaluation_saves_predictions_numbers_and_curves(finished, monkeypatch, capsys, tmp_path):
    early = {"AP after 1 of 2 steps": 0.25}  # of a network of several time steps

    def add(found, *rest):
        return found.model_copy(update={"tables": found.tables | {"anytime": early}})

    monkeypatch.setattr("detection.tasks.evaluate.with_early_metrics", add)
    run_tool(monkeypatch, "evaluate", finished[1], "--save", tmp_path / "saved")
    folder = tmp_path / "saved"
    assert {path.name for path in folder.iterdir()} == {"predictions.json", "metrics.json", "precision_recall.png"}
    metrics = json.loads((folder / "metrics.json").read_text())
    line = log_lines(finished[1])[-1]
    assert {key: metrics[key] for key in METRICS} == {key: line[key] for key in METRICS}
    assert metrics["voc"] == line["voc"] and metrics["activity"] == line["activity"] and metrics["anytime"] == early
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "evaluate", finished[1], "--save", folder)
    assert stop.value.code == 2
    assert f"{folder} exists already" in capsys.readouterr().err


def test_missing_evaluation_backend_is_said_before_training(finished, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(SystemExit) as stop:
        run_tool(
            monkeypatch, "train_det", finished[0], "evaluation.backend=faster-coco-eval", "--out", tmp_path / "run"
        )
    assert stop.value.code == 2
    assert "pip install hoyer-det[fast]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_same_seed_same_weights(finished, monkeypatch, tmp_path):
    recipe, folder = finished
    run_tool(monkeypatch, "train_det", recipe, "--out", tmp_path / "again")
    assert Run.open(tmp_path / "again").checksums() == Run.open(folder).checksums()


def test_twin_trains_by_one_override_and_has_no_activity(finished, monkeypatch, tmp_path):
    run_tool(
        monkeypatch,
        "train_det",
        finished[0],
        "--model.backbone.activation",
        "relu",
        "train.epochs=1",
        "--out",
        tmp_path / "twin",
    )
    (line,) = log_lines(tmp_path / "twin")
    assert "loss/hoyer" not in line
    assert "activity" not in line
    assert not (tmp_path / "twin" / "dynamics.png").exists()


def real_config(folder: Path, name: str) -> DetectionRecipe:
    if name == "bccd":
        data = {"format": "voc", "root": folder / "bccd", "train": ["BCCD/train"], "val": ["BCCD/val"]}
    else:
        annotations = ["annotations/instances_train2017.json"]
        data = {"format": "coco", "root": folder / "coco128", "train": annotations, "val": annotations}
        data |= {"train_images": "train2017", "val_images": "train2017"}
    model = TINY_MODEL | {"min_size": [128], "max_size": 192, "backbone": {"name": "resnet18", "width": 0.25}}
    return DetectionRecipe.model_validate({"model": model, "data": data | {"workers": 0}})


@pytest.mark.parametrize("name", ["bccd", "coco128"])
def test_loss_falls_on_real_images(real_data, name):
    config = real_config(real_data(name), name)
    set_seed(0)
    train, val = build_datasets(config.data)
    config.data.classes = list(train.annotations.categories)
    model = build_detector(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    batch = next(iter(build_loader(train, batch_size=8, workers=0, shuffle=True, seed=0)))
    for _ in range(12):
        task = model(*batch)
        loss = sum(task.values()) + 0.01 * hoyer_penalty(model, "mean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses
    model.eval()
    with torch.no_grad():
        (detections,) = model([val[0][0]])
    assert torch.isfinite(detections["boxes"]).all()


def test_the_voc_recipe_trains_on_voc_folders(real_data, monkeypatch, tmp_path):
    whole, part = real_data("voc") / "VOCdevkit" / "VOC2007", tmp_path / "VOCdevkit" / "VOC2007"
    (part / "ImageSets" / "Main").mkdir(parents=True)
    for name in ("JPEGImages", "Annotations"):
        (part / name).symlink_to(whole / name)
    for split, number in (("train", 10), ("val", 4)):
        names = (whole / "ImageSets" / "Main" / f"{split}.txt").read_text().split()[:number]
        (part / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
    small = ["--model.backbone.width", "0.125", "--model.neck.out_channels", "32", "--model.min_size", "96"]
    small += ["--model.max_size", "160", "--train.epochs", "1", "--train.batch_size", "4", "--data.workers", "0"]
    recipe = ROOT / "configs" / "voc_retinanet_resnet34.yaml"
    root = ["--data.root", tmp_path / "VOCdevkit"]
    run_tool(monkeypatch, "train_det", recipe, *root, *small, "--out", tmp_path / "run")
    (line,) = log_lines(tmp_path / "run")
    assert line["step"] == 3
    assert math.isfinite(line["loss"]) and line["loss/hoyer"] > 0
    assert len(line["per_class"]) == 20


def expect_one_sentence(monkeypatch, capsys, recipe: Path, out: Path, *parts: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "train_det", recipe, "--out", out)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]
    assert not out.exists()


def test_unknown_key_and_wrong_type(monkeypatch, capsys, tmp_path):
    recipe = tiny_recipe(tmp_path, train={"epoch": 3})
    expect_one_sentence(monkeypatch, capsys, recipe, tmp_path / "run", "'train.epoch'", "did you mean 'epochs'")
    recipe = tiny_recipe(tmp_path, train={"epochs": "three"})
    expect_one_sentence(monkeypatch, capsys, recipe, tmp_path / "run", "train.epochs", "'three'")


def test_unknown_names_are_said_before_the_data_are_read(monkeypatch, capsys, tmp_path):
    nowhere = {"format": "voc", "root": str(tmp_path / "nowhere"), "train": ["A/train"], "val": ["A/val"]}
    recipe = tiny_recipe(tmp_path, data=nowhere, model={"backbone": {"name": "resnet19"}})
    parts = [f"{recipe}: model.backbone.name: unknown 'resnet19'; did you mean 'resnet1", "allowed: ", "vgg16"]
    expect_one_sentence(monkeypatch, capsys, recipe, tmp_path / "run", *parts)


def test_missing_recipe_folder_and_annotation_file(monkeypatch, capsys, tmp_path):
    expect_one_sentence(monkeypatch, capsys, tmp_path / "no.yaml", tmp_path / "run", "no.yaml: no such config file")
    voc = {"format": "voc", "root": str(tmp_path / "nowhere"), "train": ["A/train"], "val": ["A/val"]}
    recipe = tiny_recipe(tmp_path, data=voc)
    expect_one_sentence(monkeypatch, capsys, recipe, tmp_path / "run", str(tmp_path / "nowhere"))
    (tmp_path / "images").mkdir()
    coco = {"format": "coco", "root": str(tmp_path), "train": ["no.json"], "val": ["no.json"], "train_images": "images"}
    recipe = tiny_recipe(tmp_path, data=coco)
    expect_one_sentence(monkeypatch, capsys, recipe, tmp_path / "run", "no.json")


def test_class_not_in_the_data(finished, monkeypatch, capsys, tmp_path):
    scenes = load_config(finished[0]).data.root
    recipe = tiny_recipe(tmp_path, data={"root": str(scenes), "classes": ["circle", "sqare"]})
    expect_one_sentence(monkeypatch, capsys, recipe, tmp_path / "run", "'sqare'", "square")


def test_run_folder_that_exists_is_left_alone(finished, monkeypatch, capsys):
    recipe, folder = finished
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "train_det", recipe, "--out", folder)
    assert stop.value.code == 2
    assert f"{folder} exists already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def scenes_with_a_broken_image(finished, folder: Path, *, cut_off: bool) -> Path:
    """A copy of the drawn scenes; one training image is cut off, or whole but damaged inside."""
    shutil.copytree(load_config(finished[0]).data.root, folder / "scenes")
    broken = folder / "scenes" / "train" / "000003.png"
    content = bytearray(broken.read_bytes())
    middle = len(content) // 2
    if cut_off:
        del content[middle:]
    else:
        content[middle : middle + 8] = bytes(8)
    broken.write_bytes(content)
    return broken


def test_image_that_is_damaged_inside_stops_training_by_name(finished, monkeypatch, capsys, tmp_path):
    broken = scenes_with_a_broken_image(finished, tmp_path, cut_off=False)
    expect_one_sentence(
        monkeypatch, capsys, tiny_recipe(tmp_path), tmp_path / "run", str(broken), "does not decode", "data.verify full"
    )


@pytest.mark.parametrize("cut_off", [True, False])
def test_training_goes_on_without_a_broken_image(finished, monkeypatch, capsys, tmp_path, cut_off):
    broken = scenes_with_a_broken_image(finished, tmp_path, cut_off=cut_off)
    arguments = ["--out", tmp_path / "run", "train.epochs=1"]
    if not cut_off:  # found beforehand only by decoding it
        arguments += ["--data.verify", "full"]
    run_tool(monkeypatch, "train_det", tiny_recipe(tmp_path), *arguments)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if str(broken) in line]
    assert line.startswith("train: ") and "left out" in line
    assert log_lines(tmp_path / "run")[0]["step"] == 3  # 11 images in batches of 4


@pytest.mark.parametrize("detector", ["fasterrcnn", "fcos", "ssd"])
def test_every_detector_trains_with_the_hoyer_term_in_total_and_per_layer(finished, monkeypatch, tmp_path, detector):
    arguments = ["--model.detector", detector, "train.epochs=1", "--model.head.representation_size", "16"]
    if detector == "ssd":
        arguments += ["--model.min_size", "96"]
    run_tool(monkeypatch, "train_det", finished[0], *arguments, "--out", tmp_path / "run")
    (line,) = log_lines(tmp_path / "run")
    terms = [value for key, value in line.items() if key.startswith("loss/")]
    assert line["loss"] == pytest.approx(sum(terms), rel=1e-5)
    assert 0 < line["loss/hoyer"] == pytest.approx(0.01 * sum(line["hoyer_per_layer"].values()), rel=1e-5)
    assert line["activity_per_layer"].keys() == line["hoyer_per_layer"].keys()


def test_bfloat16_and_tensorboard(finished, monkeypatch, tmp_path):
    arguments = ["train.precision=bf16", "--train.tensorboard", "True", "train.epochs=1"]
    run_tool(monkeypatch, "train_det", finished[0], *arguments, "--out", tmp_path / "run")
    assert math.isfinite(log_lines(tmp_path / "run")[0]["loss"])
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_missing_tensorboard_is_said_before_anything_is_written(finished, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "train_det", finished[0], "--train.tensorboard", "True", "--out", tmp_path / "run")
    assert stop.value.code == 2
    assert "pip install hoyer-det[tensorboard]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_processes_share_the_images_and_log_what_one_process_finds(finished, monkeypatch, capsys, tmp_path):
    recipe, _ = finished
    options = [recipe, "--data.root", load_config(recipe).data.root, "--out", tmp_path / "run"]
    run_together(2, tool, "train_det", *options, log=tmp_path / "log.txt")
    history = log_lines(tmp_path / "run")
    # 12 images in steps of 2 x 4: two steps, the second filled up
    assert [line["step"] for line in history] == [2, 4]
    assert [line["lr"] for line in history] == pytest.approx([0.001, 0.003])  # warm-up of 2 steps to 0.003
    run_tool(monkeypatch, "evaluate", tmp_path / "run")
    assert "equal to the log in every digit" in capsys.readouterr().out


def test_loss_that_is_not_finite_stops_with_the_images(monkeypatch, capsys, tmp_path):
    recipe = tiny_recipe(tmp_path, optimizer={"name": "sgd", "lr": 1e30, "warmup_steps": 0, "clip_norm": 0})
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "train_det", recipe, "--out", tmp_path / "run")
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "the loss is not finite in epoch 1, step" in error
    assert "image ids" in error
    assert not (tmp_path / "run").exists()


def test_evaluate_names_what_is_wrong_with_a_run(finished, monkeypatch, capsys, tmp_path):
    def error_of(folder) -> str:
        with pytest.raises(SystemExit) as stop:
            run_tool(monkeypatch, "evaluate", folder)
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "is not a run folder" in error_of(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(finished[1], damaged)
    weights = damaged / "last.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "last.safetensors: damaged weights file" in error_of(damaged)
    weights.unlink()
    assert "last.safetensors: no such weights" in error_of(damaged)


def test_adam_is_the_authors():
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, schema.Optimizer(name="adam", lr=1e-4, weight_decay=1e-4))
    assert type(optimizer) is torch.optim.Adam
    assert all(group["amsgrad"] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0]
