"""Labelled images: batches in memory and from workers, folders of class folders, CIFAR, and what bad data give."""

import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_tool
from PIL import Image
from test_classification import error_of, recipe

from detection.config.schema import ImageAugment, ImageData
from detection.data.image_batches import FolderImages, MemoryBatches, augment_batch, draw_augmentation
from detection.data.images import Images, read_folder, read_image_split
from detection.runs import Run

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


def test_without_augmentation_pixels_are_only_divided_by_255():
    pixels = torch.randint(256, (7, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(pixels, torch.arange(7), tuple("abcdefg"))
    batches = list(MemoryBatches(images, torch.device("cpu"), batch_size=3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(7))
    assert torch.equal(torch.cat([images for images, _ in batches]), pixels / 255)


@pytest.mark.parametrize("train", [True, False])
def test_processes_get_all_images_between_them(train):
    images = Images(torch.zeros(14, 3, 4, 4, dtype=torch.uint8), torch.arange(14), tuple(map(str, range(14))))
    options = {"batch_size": 2, "augment": ImageAugment() if train else None}
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
    options = {"batch_size": 4, "share": (0, processes)}
    training = MemoryBatches(images, torch.device("cpu"), augment=ImageAugment(), **options)
    assert len(training) == 2 and [len(labels) for _, labels in training] == [4, 4]
    evaluation = MemoryBatches(images, torch.device("cpu"), **options)
    assert len(evaluation) == 3 and [len(labels) for _, labels in evaluation] == [4, 4, processes]


def test_processes_augment_each_in_its_own_way():
    images = Images(torch.randint(256, (1, 3, 8, 8)).byte().expand(64, 3, 8, 8), torch.zeros(64).long(), ("a",))
    options = {"batch_size": 32, "augment": ImageAugment()}
    shares = [MemoryBatches(images, torch.device("cpu"), share=(index, 2), **options) for index in range(2)]
    first, second = (next(iter(share))[0] for share in shares)
    assert (first != second).flatten(1).any(dim=1).float().mean() > 0.8


def test_epochs_differ_and_the_seed_decides():
    images = Images(torch.zeros(20, 3, 4, 4, dtype=torch.uint8), torch.arange(20), tuple(map(str, range(20))))

    def orders(seed: int) -> list[list[int]]:
        options = {"batch_size": 20, "augment": ImageAugment(), "seed": seed}
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
    assert run.history()[0].step == 2
    run_tool(monkeypatch, "evaluate", tmp_path / "run")


def test_folder_images_are_cut_and_resized(folder):
    data = ImageData(root=folder, size=16)
    train, val = read_image_split(data, "train"), read_image_split(data, "val")
    assert train.pixels.shape == (6, 3, 16, 16) and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.pixels[0].unique().tolist() == [50] and val.pixels[-1].unique().tolist() == [200]
    files = read_folder(folder / "train")
    for training in (True, False):
        image, label = FolderImages(files, data, train=training)[5]
        assert image.shape == (3, 16, 16) and label == 1
        torch.testing.assert_close(image, torch.full((3, 16, 16), 200 / 255), atol=1e-6, rtol=0)


def test_images_are_turned_upright_as_for_prediction(tmp_path):
    stored = np.zeros((16, 16, 3), np.uint8)
    stored[:, :8] = 255  # which the orientation turns up
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("cat", "dog"):
        path = tmp_path / "train" / name / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(stored).save(path, exif=exif)
    data = ImageData(root=tmp_path, size=16)
    pixels = read_image_split(data, "train").pixels[0] / 255
    assert (pixels[:, :8] == 1).all() and (pixels[:, 8:] == 0).all()
    image, _ = FolderImages(read_folder(tmp_path / "train"), data, train=False)[0]
    assert image[:, :6].mean() > 0.9 and image[:, 10:].mean() < 0.1


def test_evaluation_crops_the_middle_as_usual_for_imagenet(tmp_path):
    """224/256 of the short side, centred: of a 64x32 picture a square from column 18 and row 2."""
    columns = np.broadcast_to(np.arange(64, dtype=np.uint8) * 4, (32, 64))
    rows = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None] * 8, (32, 64))
    path = tmp_path / "a" / "x.png"
    path.parent.mkdir()
    Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=2)).save(path)
    data = ImageData(size=28)
    image, _ = FolderImages(read_folder(tmp_path), data, train=False)[0]
    pixels = (255 * image).round().long()
    assert pixels[0, 5].tolist() == [4 * column for column in range(18, 46)]
    assert pixels[1, :, 5].tolist() == [8 * row for row in range(2, 30)]
    whole = read_image_split(ImageData(root=tmp_path, train="", size=32), "train").pixels[
        0
    ]  # in memory: the middle square
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


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.attempt("mutated images")
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
@pytest.mark.attempt("mutated images")
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
    assert "data.augment.cutout: of images that are kept in memory" in error(in_memory=False, augment={"cutout": 4})
    drawn = {"format": "synthetic", "in_memory": False, "size": 32}
    assert "data.in_memory False: data.format 'synthetic' keeps all images in memory" in error(**drawn)
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
    train, val = (read_image_split(ImageData(format="cifar10", root=tmp_path), split) for split in ("train", "val"))
    assert train.pixels.shape == (50, 3, 32, 32) and val.pixels.shape == (10, 3, 32, 32)
    assert train.pixels.dtype == torch.uint8 and train.labels[:10].tolist() == list(range(10))
    assert train.classes == val.classes and train.classes[3] == "cat"
    with pytest.raises(ValueError, match=r"data\.classes has 2 names .*cifar10 has 10"):
        read_image_split(ImageData(format="cifar10", root=tmp_path, classes=["cat", "dog"]), "train")
    with pytest.raises(ValueError, match=r"data\.size 64: .* 32 pixels"):
        read_image_split(ImageData(format="cifar10", root=tmp_path, size=64), "val")


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


def test_real_images_train_in_memory_and_by_workers(real_data, monkeypatch, tmp_path):
    """A few photographs of Imagenette, both ways."""
    root = real_data("imagenette112") / "imagenette112"
    for split in ("train", "val"):
        for name in ("n01440764", "n02102040"):
            for path in sorted((root / split / name).iterdir())[:20]:
                (tmp_path / "data" / split / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "data" / split / name)
    for in_memory in (True, False):
        path = folder_recipe(tmp_path, in_memory=in_memory, val="val", workers=2)
        run_tool(monkeypatch, "train_cls", path, "train.batch_size=8", "--out", tmp_path / f"run{in_memory}")
        line = Run.open(tmp_path / f"run{in_memory}").history()[-1]
        assert line.step == 5 and math.isfinite(line.loss)
