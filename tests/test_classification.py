"""Classification: data in memory and from workers, the whole road to a run folder, transfer to a detector."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, run_tool
from PIL import Image
from safetensors.torch import load_file

import backbones
from detection.checkpoint import Run
from detection.config import ClassificationConfig, Config, ImageAugment, ImageData
from detection.data.images import (
    FolderImages,
    Images,
    MemoryBatches,
    augment_batch,
    draw_augmentation,
    read_folder,
    read_images,
)
from detection.models import build_classifier, build_detector

CLASSES = ("circle", "square", "triangle", "star")
LEARNS = {
    "model": {"backbone": {"name": "vgg11", "width": 0.25, "stem": "cifar"}},
    "data": {"num_train": 2000, "num_val": 400, "augment": {"padding": 0}},
    "optimizer": {"lr": 0.003, "warmup_steps": 20, "clip_norm": 1.0},
    "train": {"epochs": 6, "batch_size": 32, "channels_last": True},
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
    assert isinstance(run.config, ClassificationConfig)
    assert tuple(run.config.data.classes) == CLASSES
    history = run.history()
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
    line = Run.open(tmp_path / "run").history()[-1]
    assert line["top1"] >= 0.9
    assert 0.02 < line["activity"] < 0.5
    run_tool(monkeypatch, "evaluate", tmp_path / "run")
    assert "equal to the log in every digit" in capsys.readouterr().out


def test_two_processes_share_the_images(finished, monkeypatch, capsys, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tools" / "train_cls.py"), str(finished[0]), "--data.num_val", "23"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*command, "--out", str(tmp_path / "run")], check=True, cwd=ROOT, env=environment)
    history = Run.open(tmp_path / "run").history()
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
        ["--model.backbone.activation", "fixed", "--label_smoothing", "0.1", "--data.augment.cutout", "8"],
    ],
    ids=["adam", "bf16", "low memory, accumulated", "norm-before-pool", "mobilenet", "fixed"],
)
def test_options_train(finished, monkeypatch, tmp_path, overrides):
    run_tool(monkeypatch, "train_cls", finished[0], *overrides, "train.epochs=1", "--out", tmp_path / "run")
    assert math.isfinite(Run.open(tmp_path / "run").history()[0]["loss"])


# Images in memory


def test_crops_and_flips_are_uniform():
    """Every offset of the crop equally often, half the images flipped, as RandomCrop(padding) and a flip give."""
    # A picture in which every pixel tells where it stood: 1 + column in one channel, 1 + row in the other.
    number, side, padding = 20_000, 6, 2
    place = torch.arange(1, side + 1, dtype=torch.uint8)
    picture = torch.stack([place.expand(side, side), place[:, None].expand(side, side), torch.zeros(side, side).byte()])
    images = picture.expand(number, 3, side, side)
    augment = ImageAugment(hflip=0.5, padding=padding)
    drawn = draw_augmentation(number, side, augment, torch.Generator().manual_seed(0))
    found = augment_batch(images, augment, drawn).long()
    assert found.shape == images.shape
    # At the centre of a crop there is always a pixel of the picture.
    middle = side // 2
    row, column, next_column = found[:, 1, middle, middle], found[:, 0, middle, middle], found[:, 0, middle, middle - 1]
    flipped = column < next_column
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.015)
    offsets = 2 * padding + 1
    left = torch.where(flipped, column - 1 + padding - (side - 1 - middle), column - 1 + padding - middle)
    for offset in (row - 1 + padding - middle, left):
        assert offset.min() == 0 and offset.max() == offsets - 1
        shares = torch.bincount(offset, minlength=offsets) / number
        assert (shares - 1 / offsets).abs().max() < 0.015
    # Row, column and flip are drawn each for itself.
    drawn = torch.stack([row.float(), left.float(), flipped.float()])
    assert (torch.corrcoef(drawn) - torch.eye(3)).abs().max() < 0.03
    # What is not picture is black, and each crop is a whole window of the padded picture.
    padded = torch.nn.functional.pad(picture, [padding] * 4)
    for index in range(0, 300):
        top, start = int(row[index]) - 1 + padding - middle, int(left[index])
        window = padded[:, top : top + side, start : start + side]
        assert torch.equal(found[index], (window.flip(-1) if flipped[index] else window).long())


def test_cutout_blackens_a_square():
    images = torch.full((4000, 3, 12, 12), 200, dtype=torch.uint8)
    augment = ImageAugment(hflip=0, padding=0, cutout=4)
    found = augment_batch(images, augment, draw_augmentation(4000, 12, augment, torch.Generator().manual_seed(0)))
    assert set(found.unique().tolist()) == {0, 200}
    black = (found == 0).all(dim=1)
    rows, columns = black.any(dim=2).sum(dim=1), black.any(dim=1).sum(dim=1)
    assert torch.equal(black.sum(dim=(1, 2)), rows * columns)  # one rectangle
    assert rows.max() == columns.max() == 4 and rows.min() == columns.min() == 2  # cut off at the border
    assert (black.float().mean(dim=0) > 0).all()  # everywhere


def test_without_augmentation_pixels_are_only_normalised():
    pixels = torch.randint(256, (7, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(pixels, torch.arange(7), tuple("abcdefg"))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    batches = list(MemoryBatches(images, torch.device("cpu"), batch_size=3, mean=mean, std=std))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(7))
    expected = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_processes_get_all_images_between_them(train):
    images = Images(torch.zeros(14, 3, 4, 4, dtype=torch.uint8), torch.arange(14), tuple(map(str, range(14))))
    options = {"batch_size": 2, "mean": (0, 0, 0), "std": (1, 1, 1), "augment": ImageAugment() if train else None}
    shares = [MemoryBatches(images, torch.device("cpu"), share=(index, 3), **options) for index in range(3)]
    for _ in range(2):
        seen = [torch.cat([labels for _, labels in share]).tolist() for share in shares]
        everything = [label for labels in seen for label in labels]
        assert len(set(everything)) == len(everything) == (12 if train else 14)
        assert [len(list(share)) for share in seen] == ([4, 4, 4] if train else [6, 4, 4])
        assert all(len(share) == math.ceil(len(labels) / 2) for share, labels in zip(shares, seen, strict=True))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_single_image_is_not_left_to_batch_norm(processes):
    images = Images(torch.zeros(9 * processes, 3, 4, 4, dtype=torch.uint8), torch.arange(9 * processes), ("a",))
    options = {"batch_size": 4, "mean": (0, 0, 0), "std": (1, 1, 1), "share": (0, processes)}
    training = MemoryBatches(images, torch.device("cpu"), augment=ImageAugment(), **options)
    assert len(training) == 2 and [len(labels) for _, labels in training] == [4, 4]
    evaluation = MemoryBatches(images, torch.device("cpu"), **options)
    assert len(evaluation) == 3 and [len(labels) for _, labels in evaluation] == [4, 4, processes]


def test_processes_augment_each_in_its_own_way():
    images = Images(torch.randint(256, (1, 3, 8, 8)).byte().expand(64, 3, 8, 8), torch.zeros(64).long(), ("a",))
    options = {"batch_size": 32, "mean": (0, 0, 0), "std": (1, 1, 1), "augment": ImageAugment()}
    shares = [MemoryBatches(images, torch.device("cpu"), share=(index, 2), **options) for index in range(2)]
    first, second = (next(iter(share))[0] for share in shares)
    assert (first != second).flatten(1).any(dim=1).float().mean() > 0.8


def test_epochs_differ_and_the_seed_decides():
    images = Images(torch.zeros(20, 3, 4, 4, dtype=torch.uint8), torch.arange(20), tuple(map(str, range(20))))

    def orders(seed: int) -> list[list[int]]:
        options = {"batch_size": 20, "mean": (0, 0, 0), "std": (1, 1, 1), "augment": ImageAugment(), "seed": seed}
        batches = MemoryBatches(images, torch.device("cpu"), **options)
        return [next(iter(batches))[1].tolist() for _ in range(2)]

    assert orders(1) == orders(1) != orders(2)
    assert orders(1)[0] != orders(1)[1]


# Folders


def write_image(path: Path, size: tuple[int, int] = (40, 30), color: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color, color, color)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes with three images each in train and val."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for index in range(3):
                write_image(tmp_path / "data" / split / name / f"{index}.png", color=50 if name == "cat" else 200)
    return tmp_path / "data"


def folder_recipe(tmp_path: Path, **data) -> Path:
    values = {"format": "folder", "root": str(tmp_path / "data"), "size": 32, "workers": 0} | data
    return recipe(tmp_path, data=values, train={"epochs": 1, "batch_size": 3})


@pytest.mark.parametrize("in_memory", [True, False])
def test_folder_of_class_folders_trains(folder, monkeypatch, tmp_path, in_memory):
    path = folder_recipe(tmp_path, in_memory=in_memory)
    run_tool(monkeypatch, "train_cls", path, "--out", tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.config.data.classes == ["cat", "dog"]
    assert run.history()[0]["step"] == 2
    run_tool(monkeypatch, "evaluate", tmp_path / "run")


def test_folder_images_are_cut_and_resized(folder):
    data = ImageData(root=folder, size=16)
    train, val = read_images(data, "train"), read_images(data, "val")
    assert train.pixels.shape == (6, 3, 16, 16) and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.pixels[0].unique().tolist() == [50] and val.pixels[-1].unique().tolist() == [200]
    files = read_folder(folder / "train")
    for training in (True, False):
        image, label = FolderImages(files, data, train=training)[5]
        assert image.shape == (3, 16, 16) and label == 1
        expected = (200 / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
        torch.testing.assert_close(image.mean(dim=(1, 2)), expected, atol=1e-4, rtol=1e-4)


def test_evaluation_crops_the_middle_as_usual_for_imagenet(tmp_path):
    """224/256 of the short side, centred: of a 64x32 picture a square from column 18 and row 2."""
    columns = np.broadcast_to(np.arange(64, dtype=np.uint8) * 4, (32, 64))
    rows = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None] * 8, (32, 64))
    path = tmp_path / "a" / "x.png"
    path.parent.mkdir()
    Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=2)).save(path)
    data = ImageData(size=28, mean=(0, 0, 0), std=(1, 1, 1))
    image, _ = FolderImages(read_folder(tmp_path), data, train=False)[0]
    pixels = (255 * image).round().long()
    assert pixels[0, 5].tolist() == [4 * column for column in range(18, 46)]
    assert pixels[1, :, 5].tolist() == [8 * row for row in range(2, 30)]
    whole = read_images(ImageData(root=tmp_path, train="", size=32), "train").pixels[0]  # in memory: the middle square
    assert whole[0, 0].tolist() == [4 * column for column in range(16, 48)]
    torch.manual_seed(0)
    training = FolderImages(read_folder(tmp_path), data, train=True)
    shares = [(255 * training[0][0][0]).max() - (255 * training[0][0][0]).min() for _ in range(20)]
    assert max(shares) - min(shares) > 60  # parts of several sizes


def test_class_folders_that_training_does_not_have_are_named(folder, monkeypatch, capsys, tmp_path):
    write_image(folder / "val" / "bird" / "0.png")
    run_tool(monkeypatch, "train_cls", folder_recipe(tmp_path), "--out", tmp_path / "run")
    assert f"val: {folder / 'val' / 'bird'}: not among the classes; left out" in capsys.readouterr().err


def test_evaluation_needs_no_training_images(folder, monkeypatch, capsys, tmp_path):
    run_tool(monkeypatch, "train_cls", folder_recipe(tmp_path), "--out", tmp_path / "run")
    shutil.rmtree(folder / "train")
    run_tool(monkeypatch, "evaluate", tmp_path / "run")
    assert "equal to the log in every digit" in capsys.readouterr().out


def test_run_that_ended_before_its_first_evaluation(finished, monkeypatch, capsys, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    line = {"epoch": 1, "loss": 1.0}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert "its log has no top1 yet" in error_of(monkeypatch, capsys, "evaluate", tmp_path / "run")


@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_image_is_named_and_left_out(folder, monkeypatch, capsys, tmp_path, in_memory):
    broken = folder / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    path = folder_recipe(tmp_path, in_memory=in_memory)
    run_tool(monkeypatch, "train_cls", path, "--out", tmp_path / "run")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if str(broken) in line]
    assert line.startswith("train: ") and line.endswith("left out")
    for index in (0, 2):
        (folder / "train" / "dog" / f"{index}.png").write_bytes(b"no image")
    message = error_of(monkeypatch, capsys, "train_cls", path, "--out", tmp_path / "run2")
    assert "class 'dog' has no usable image" in message and "3 left out" in message
    assert not (tmp_path / "run2").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_image_that_is_damaged_inside(folder, monkeypatch, capsys, tmp_path, workers):
    """By workers it is found when it is its turn, or beforehand by data.verify full; in memory always."""
    damaged = folder / "train" / "dog" / "1.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(damaged)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 8] = bytes(8)
    damaged.write_bytes(content)
    path = folder_recipe(tmp_path, in_memory=False, workers=workers)
    message = error_of(monkeypatch, capsys, "train_cls", path, "--out", tmp_path / "run")
    assert message.startswith(f"error: {damaged}: the image does not decode") and "data.verify full" in message
    assert not (tmp_path / "run").exists()
    for number, overrides in enumerate((["--data.verify", "full"], ["--data.in_memory", "True"])):
        run_tool(monkeypatch, "train_cls", path, *overrides, "--out", tmp_path / f"run{number}")
        (line,) = [line for line in capsys.readouterr().err.splitlines() if str(damaged) in line]
        assert line.startswith("train: ") and line.endswith("left out")


def test_wrong_layouts(folder, monkeypatch, capsys, tmp_path):
    def error(**data) -> str:
        return error_of(monkeypatch, capsys, "train_cls", folder_recipe(tmp_path, **data), "--out", tmp_path / "run")

    assert "train/cat" in error(root=str(tmp_path / "nowhere"))
    assert "no class folders" in error(train="train/cat")
    assert "no class folders" in error(train="train/cat", in_memory=False)
    assert "'brid'" in error(classes=["cat", "brid"])
    (folder / "train" / "bird").mkdir()
    message = error()
    assert str(folder / "train" / "bird") in message and "no images in it" in message
    shutil.rmtree(folder / "train" / "bird")
    shutil.rmtree(folder / "val" / "dog")
    message = error()
    assert "dog" in message and str(folder / "val") in message
    assert not (tmp_path / "run").exists()


def write_cifar(root: Path, monkeypatch, *, labels: int = 10) -> None:
    """A CIFAR-10 of 50 + 10 images, where torchvision looks for it; its checksums are those of the real files."""
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]:
        batch = {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
        (base / name).write_bytes(pickle.dumps(batch))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *_: os.path.isfile(path))


def test_cifar_is_read_by_torchvision(monkeypatch, tmp_path):
    write_cifar(tmp_path, monkeypatch)
    train, val = (read_images(ImageData(format="cifar10", root=tmp_path), split) for split in ("train", "val"))
    assert train.pixels.shape == (50, 3, 32, 32) and val.pixels.shape == (10, 3, 32, 32)
    assert train.pixels.dtype == torch.uint8 and train.labels[:10].tolist() == list(range(10))
    assert train.classes == val.classes and train.classes[3] == "cat"
    with pytest.raises(ValueError, match=r"data\.classes has 2 names .*cifar10 has 10"):
        read_images(ImageData(format="cifar10", root=tmp_path, classes=["cat", "dog"]), "train")
    with pytest.raises(ValueError, match=r"data\.size 64: .* 32 pixels"):
        read_images(ImageData(format="cifar10", root=tmp_path, size=64), "val")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_is_not_fetched_without_the_flag(monkeypatch, capsys, tmp_path, name):
    monkeypatch.setattr("torchvision.datasets.cifar.CIFAR10.download", lambda self: pytest.fail("downloads"))
    path = recipe(tmp_path, data={"format": name, "root": str(tmp_path / "none")})
    message = error_of(monkeypatch, capsys, "train_cls", path, "--out", tmp_path / "run")
    assert name in message and "--download" in message and str(tmp_path / "none") in message


def test_failed_download_says_so(monkeypatch, capsys, tmp_path):
    def fail(self):
        raise OSError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.CIFAR10.download", fail)
    path = recipe(tmp_path, data={"format": "cifar10", "root": str(tmp_path / "none")})
    message = error_of(monkeypatch, capsys, "train_cls", path, "--out", tmp_path / "run", "--download")
    assert "download of cifar10 failed (no route)" in message


def test_a_recipe_of_the_other_task_is_refused(finished, monkeypatch, capsys, tmp_path):
    message = error_of(monkeypatch, capsys, "train_det", finished[0], "--out", tmp_path / "run")
    assert "task is 'classification'; a recipe of detection is needed here" in message
    other = ROOT / "configs" / "scenes_retinanet_resnet18.yaml"
    message = error_of(monkeypatch, capsys, "train_cls", other, "--out", tmp_path / "run")
    assert "task is 'detection'; a recipe of classification is needed here" in message
    message = error_of(monkeypatch, capsys, "train_cls", recipe(tmp_path, task="clasification"))
    assert "task: expected detection or classification, got 'clasification'" in message


def test_values_that_cannot_train_are_refused(monkeypatch, capsys, tmp_path):
    path = recipe(tmp_path, data={"std": [0.2, 0.0, 0.2]})
    assert "data.std.1" in error_of(monkeypatch, capsys, "train_cls", path, "--out", tmp_path / "run")
    path = recipe(tmp_path, optimizer={"milestones": [60, 80]})
    assert "optimizer.milestones.0" in error_of(monkeypatch, capsys, "train_cls", path, "--out", tmp_path / "run")
    path = recipe(tmp_path, distillation={"teacher": "runs/x", "logits": 0})
    assert "would teach nothing" in error_of(monkeypatch, capsys, "train_cls", path, "--out", tmp_path / "run")
    path = recipe(tmp_path, model={"backbone": {"name": "vgg11", "width": 0.125, "stem": "cifar"}}, data={"size": 12})
    message = error_of(monkeypatch, capsys, "train_cls", path, "--out", tmp_path / "run")
    assert "data.size 12" in message and "stride is 16" in message
    assert not (tmp_path / "run").exists()


def test_real_images_train_in_memory_and_by_workers(real_data, monkeypatch, tmp_path):
    """A few real JPEG images of CIFAR-10, both ways."""
    root = real_data("cifar10") / "cifar10"
    for split in ("train", "test"):
        for name in ("cat", "ship"):
            for path in sorted((root / split / name).iterdir())[:20]:
                (tmp_path / "data" / split / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "data" / split / name)
    for in_memory in (True, False):
        path = folder_recipe(tmp_path, in_memory=in_memory, val="test", workers=2)
        run_tool(monkeypatch, "train_cls", path, "train.batch_size=8", "--out", tmp_path / f"run{in_memory}")
        line = Run.open(tmp_path / f"run{in_memory}").history()[-1]
        assert line["step"] == 5 and math.isfinite(line["loss"])


# Transfer to a detector


def detector_config(weights: Path, **backbone) -> Config:
    model = {
        "backbone": {"name": "resnet18", "width": 0.125, "weights": str(weights)} | backbone,
        "neck": {"out_channels": 16, "extra_levels": 0},
        "head": {"num_convs": 1},
        "min_size": [64],
        "max_size": 64,
    }
    return Config.model_validate({"model": model, "data": {"format": "synthetic", "classes": ["a", "b"]}})


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


# Published networks


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_vgg16_has_its_layers_and_parameters():
    """CIFAR: 13 convolutions, 4 poolings, then 2048 -> 4096 -> 4096 -> 10 without bias."""
    model = backbones.Classifier(backbones.create("vgg16", stem="cifar"), 10)
    convs = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    plan = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert [(layer.in_channels, layer.out_channels) for layer in convs] == list(zip([3, *plan[:-1]], plan, strict=True))
    assert all(layer.kernel_size == (3, 3) and layer.bias is None for layer in convs)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linears] == [(4096, 2048), (4096, 4096), (10, 4096)]
    assert all(layer.bias is None for layer in linears)
    assert sum(isinstance(module, torch.nn.MaxPool2d) for module in model.modules()) == 4
    spikes = [module for module in model.modules() if isinstance(module, backbones.HoyerSpike)]
    assert len(spikes) == 15  # one after each convolution, two between the linear layers
    weights = 9 * sum(a * b for a, b in zip([3, *plan[:-1]], plan, strict=True))
    assert weights == 14_710_464
    # weights, BN's scale and shift, the linear layers, a threshold per spike layer
    assert count(model) == weights + 2 * sum(plan) + 4096 * (2048 + 4096 + 10) + 15 == 39_925_711


def test_published_resnet18_has_its_layers_and_parameters():
    """Stages of 4, 4, 4, 4 one-convolution blocks; CIFAR stem of three convolutions; 1x1 shortcuts; one linear."""
    model = backbones.Classifier(backbones.create("resnet18", stem="cifar"), 10)
    convs = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    shapes = [(layer.out_channels, layer.in_channels, layer.kernel_size[0], layer.stride[0]) for layer in convs]
    expected = [(64, 3, 3, 1), (64, 64, 3, 1), (64, 64, 3, 1)] + [(64, 64, 3, 1)] * 4
    for channels in (128, 256, 512):
        expected += [(channels, channels // 2, 1, 1), (channels, channels // 2, 3, 2)]
        expected += [(channels, channels, 3, 1)] * 3
    assert shapes == expected
    spikes = [module for module in model.modules() if isinstance(module, backbones.HoyerSpike)]
    assert len(spikes) == 2 + 16 + 3 + 1  # stem, blocks, shortcuts, head
    weights = sum(out * into * size * size for out, into, size, _ in expected)
    norms = 2 * (3 * 64 + 4 * 64 + 4 * (128 + 256 + 512) + (64 + 128 + 256))
    assert count(model) == weights + norms + 22 + 5130 == 11_247_072


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_published_networks_at_imagenet_size(name):
    model = backbones.Classifier(backbones.create(name), 1000)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    expected = [(4096, 25088), (4096, 4096), (1000, 4096)] if name == "vgg16" else [(1000, 512)]
    assert [tuple(layer.weight.shape) for layer in linears] == expected
    pools = [module for module in model.modules() if isinstance(module, torch.nn.MaxPool2d)]
    assert len(pools) == (5 if name == "vgg16" else 4)


# Recipes of a comparison


def test_ablation_trains_each_variant_once_and_compares_them(finished, monkeypatch, capsys, tmp_path):
    short = ["--train.epochs", "1", "--train.ema_decay", "0"]
    arguments = [finished[0], "--out", tmp_path / "runs", "--variants", "hoyer", "half=--model.backbone.width 0.25"]
    run_tool(monkeypatch, "ablate", *arguments, "--seeds", "3", *short)
    names = ["half_seed3", "hoyer_seed3"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()) == names
    half = Run.open(tmp_path / "runs" / "half_seed3").config
    assert half.model.backbone.width == 0.25 and half.train.seed == 3 and half.train.epochs == 1
    # A second seed, as if it had been trained: nothing is left to do but to compare.
    top1 = {}
    for name, value in zip(names, (0.25, 0.75), strict=True):
        copy = tmp_path / "runs" / name.replace("3", "4")
        shutil.copytree(tmp_path / "runs" / name, copy)
        line = json.loads((copy / "metrics.jsonl").read_text())
        top1[name], top1[copy.name] = line["top1"], value
        (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("seed: 3", "seed: 4"))
        (copy / "metrics.jsonl").write_text(json.dumps(line | {"top1": value}) + "\n")
    capsys.readouterr()
    run_tool(monkeypatch, "ablate", *arguments, "--seeds", "3", "4", *short)
    assert capsys.readouterr().out.count("finished already") == 4
    table = (tmp_path / "runs" / "README.md").read_text()
    (row,) = [line for line in table.splitlines() if line.startswith("| half |")]
    mean = np.mean([top1["half_seed3"], top1["half_seed4"]])
    gap = mean - np.mean([top1["hoyer_seed3"], top1["hoyer_seed4"]])
    assert f"{mean:.4f} ±" in row and f"{gap:+.4f}" in row and "| 2 |" in row
    assert Image.open(tmp_path / "runs" / "ablation.png").width == 800
    (tmp_path / "runs" / "hoyer_seed3_old").mkdir()  # somebody's copy
    (tmp_path / "runs" / "hoyer_seed7").mkdir()
    shutil.copy(tmp_path / "runs" / "hoyer_seed3" / "config.yaml", tmp_path / "runs" / "hoyer_seed7")
    (tmp_path / "runs" / "hoyer_seed7" / "run.json").write_text("{}")
    run_tool(monkeypatch, "ablate", *arguments, "--seeds", "3", *short)
    assert "| hoyer | none | 2 |" in (tmp_path / "runs" / "README.md").read_text()  # and an unfinished run
    capsys.readouterr()
    run_tool(monkeypatch, "results", tmp_path / "runs")
    found = capsys.readouterr()
    assert "hoyer_seed7: not finished, left out" in found.err and "4 runs" in found.out
    for name in ("rleu", "a/b=", "x_seed1=", "train.epochs=1"):
        message = error_of(monkeypatch, capsys, "ablate", finished[0], "--out", tmp_path / "x", "--variants", name)
        assert name in message and "allowed" in message
    message = error_of(monkeypatch, capsys, "ablate", *arguments, "--seeds", "3", *short[2:], "--train.epochs", "2")
    assert "hoyer_seed3: trained with train.epochs 1, wanted is 2" in message
    message = error_of(monkeypatch, capsys, "ablate", finished[0], "--out", "x", "--variants", "hoyer", "hoyer=")
    assert "a name stands there twice" in message
    with pytest.raises(SystemExit):  # before anything is trained
        run_tool(monkeypatch, "ablate", *arguments, "bad=--optimizer.lr no", "--seeds", "5", *short)
    assert not list((tmp_path / "runs").glob("*_seed5"))
    # What fails in the middle is said in a sentence; what was left unfinished goes on.
    shutil.rmtree(tmp_path / "runs" / "hoyer_seed7")
    info = json.loads((tmp_path / "runs" / "half_seed3" / "run.json").read_text())
    del info["sha256"]
    (tmp_path / "runs" / "half_seed3" / "run.json").write_text(json.dumps(info))
    message = error_of(
        monkeypatch, capsys, "ablate", *arguments, "--seeds", "3", *short, "--model.backbone.weights", tmp_path / "none"
    )
    assert "hoyer_seed3: trained with model.backbone.weights None" in message
    run_tool(monkeypatch, "ablate", *arguments, "--seeds", "3", *short)
    assert "--resume" in capsys.readouterr().out
    assert Run.open(tmp_path / "runs" / "half_seed3").finished
    arguments[2] = tmp_path / "failing"
    message = error_of(monkeypatch, capsys, "ablate", *arguments, *short, "--model.backbone.weights", tmp_path / "none")
    assert "hoyer_seed0: this run failed" in message
