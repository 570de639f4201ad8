"""What is found wrong with a data set, and that training goes on with the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import ROOT, run_tool
from PIL import Image

from detection.config import load_config
from detection.data import build_datasets
from detection.data.image_files import examine_image
from detection.data.report import report, shared_images

BCCD = ROOT / "configs" / "bccd_retinanet_resnet18.yaml"


def check(monkeypatch, capsys, *arguments) -> tuple[int, list[str]]:
    """Exit status and output lines of tools/check_data.py."""
    status = 0
    try:
        run_tool(monkeypatch, "check_data", *arguments)
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().out.splitlines()


def lines_with(lines: list[str], *parts: str) -> list[str]:
    return [line for line in lines if all(part in line for part in parts)]


# --- real data ------------------------------------------------------------------------------------------------------


def test_bccd_has_two_boxes_without_area(real_data, monkeypatch, capsys):
    status, lines = check(monkeypatch, capsys, BCCD, "--data.root", real_data("bccd") / "bccd")
    assert status == 0
    assert lines[-1] == "training can go on"
    for name in ("BloodImage_00338", "BloodImage_00343"):
        assert len(lines_with(lines, f"{name}.xml", "has no area")) == 1
    assert lines_with(lines, "train: left out or mended: 2")
    assert lines_with(lines, "RBC", "3348", "280")
    assert lines_with(lines, "train: image width: 640 to 640")


@pytest.fixture
def dirty_bccd(real_data, tmp_path):
    """A copy of BCCD with one thing wrong with each of eight images: (folder, kind of fault -> image)."""
    folder = tmp_path / "bccd"
    shutil.copytree(real_data("bccd") / "bccd", folder)
    base = folder / "BCCD"
    names = (base / "ImageSets" / "Main" / "trainval.txt").read_text().split()
    kinds = ["cut", "no_xml", "class", "nan", "negative", "twice", "empty", "folder"]
    faults = dict(
        zip(kinds, [name for name in names if name not in ("BloodImage_00338", "BloodImage_00343")], strict=False)
    )

    def image(kind: str) -> Path:
        return base / "JPEGImages" / f"{faults[kind]}.jpg"

    def xml(kind: str) -> Path:
        return base / "Annotations" / f"{faults[kind]}.xml"

    def edit(kind: str, tag: str, value: str) -> None:
        text = xml(kind).read_text()
        start, end = text.index(f"<{tag}>") + len(tag) + 2, text.index(f"</{tag}>")
        xml(kind).write_text(text[:start] + value + text[end:])

    image("cut").write_bytes(image("cut").read_bytes()[:5000])
    xml("no_xml").unlink()
    edit("class", "name", "Unknown")
    edit("nan", "xmin", "nan")
    edit("negative", "xmin", "-25")
    image("empty").write_bytes(b"")
    image("folder").unlink()
    image("folder").mkdir()
    split = base / "ImageSets" / "Main" / "trainval.txt"
    split.write_text(split.read_text().rstrip("\n") + f"\n{faults['twice']}\n")
    return folder, faults


@pytest.mark.attempt("mutated annotations", 8)
def test_every_fault_of_a_dirty_bccd_is_named_once_and_training_can_go_on(dirty_bccd, monkeypatch, capsys):
    folder, faults = dirty_bccd
    status, lines = check(monkeypatch, capsys, BCCD, "--data.root", folder)
    assert status == 0
    assert lines[-1] == "training can go on"
    problems = [line for line in lines if line.startswith("train: ") and str(folder) in line]
    assert len(problems) == 10  # eight, and BCCD's own two
    for kind, part in {
        "cut": "the image is cut off",
        "no_xml": "no such file, though trainval.txt lists it",
        "class": "has class 'Unknown' (allowed: RBC, WBC, Platelets)",
        "nan": "is not four finite numbers",
        "negative": "reaches out of the 640x480 image; clipped",
        "twice": "is listed already",
        "empty": "an empty file, 0 bytes",
        "folder": "a folder, not an image",
    }.items():
        (line,) = lines_with(problems, faults[kind])
        assert part in line, kind


def test_training_data_of_a_dirty_bccd_load(dirty_bccd):
    folder, faults = dirty_bccd
    train, val = build_datasets(load_config(BCCD, ["--data.root", str(folder)]).data)
    assert len(train) == 292 - 4  # without the image that is cut off, has no XML, is empty, or a folder
    names = {record.path.stem for record in train.annotations.records}
    assert not names & {faults[kind] for kind in ("cut", "no_xml", "empty", "folder")}
    assert names > {faults[kind] for kind in ("class", "nan", "negative", "twice")}
    for dataset in (train, val):
        for index in range(len(dataset)):
            image, target = dataset[index]
            height, width = image.shape[1:]
            boxes = target["boxes"].numpy()
            assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= [width, height]).all(), dataset.annotations.records[
                index
            ].path


# --- small hand-made data -------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path):
    """A COCO data set with sparse category ids and several faults: (recipe, content, function that writes it)."""
    images = []
    for index, name in enumerate(("a", "b", "c", "d")):
        pixels = np.random.default_rng(index).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
        images.append({"id": 10 * index + 7, "file_name": f"{name}.png", "width": 40, "height": 30})

    def note(number: int, image: int, category: int, box, **more) -> dict:
        area = box[2] * box[3]
        return {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": area,
            "iscrowd": 0,
        } | more

    content = {
        "images": images,
        "annotations": [
            note(1, 7, 90, [1, 2, 10, 8]),
            note(2, 7, 3, [5, 5, 20, 20]),
            note(3, 17, 90, [0, 0, 30, 20], iscrowd=1),
        ],
        "categories": [{"id": 90, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    recipe = {
        "data": {
            "root": str(tmp_path),
            "train": ["all.json"],
            "val": ["all.json"],
            "train_images": "images",
            "val_images": "images",
        }
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def write() -> Path:
        (tmp_path / "all.json").write_text(json.dumps(content))
        return tmp_path / "recipe.yaml"

    return content, note, write


def test_counts(coco):
    _, _, write = coco
    train, val = build_datasets(load_config(write()).data)
    found = report(train.annotations)
    assert (found.num_images, found.num_empty) == (4, 2)
    assert [(entry.name, entry.num_objects, entry.num_ignored, entry.num_images) for entry in found.classes] == [
        ("cat", 2, 1, 2),
        ("dog", 1, 0, 1),
    ]
    assert (found.widths, found.heights) == ((40, 40, 40), (30, 30, 30))
    assert found.sizes == pytest.approx((80**0.5, 20, 600**0.5))
    assert (found.num_small, found.num_medium, found.num_large) == (3, 0, 0)
    assert train.dropped == ()
    assert len(shared_images(train.annotations, val.annotations)) == 4


@pytest.mark.attempt("mutated annotations")
def test_every_fault_of_a_coco_file_is_named_once(coco, monkeypatch, capsys, tmp_path):
    content, note, write = coco
    content["images"] += [
        {"id": 7, "file_name": "d.png", "width": 40, "height": 30},
        {"id": 99, "file_name": "gone.png", "width": 40, "height": 30},
    ]
    content["images"][3]["width"] = 41
    content["annotations"] += [
        note(2, 17, 3, [1, 1, 5, 5]),
        note(4, 1234, 3, [1, 1, 5, 5]),
        note(5, 7, 1, [1, 1, 5, 5]),
        note(6, 17, 3, [1, 1, 0, 5]),
        note(7, 17, 3, [100, 1, 5, 5]),
        note(8, 17, 3, [1, 1, 5, float("nan")]),
        note(2, 17, 3, [1, 1, 5, 5]),
    ]
    status, lines = check(monkeypatch, capsys, write())
    assert status == 0
    problems = [line for line in lines if line.startswith("train: ") and str(tmp_path) in line]
    for parts in (
        ["image id 7 of d.png is taken already"],
        ["gone.png", "no such file"],
        ["d.png", "40x30 pixels, its annotations say 41x30"],
        ["annotation 2 occurs a second time at position 9, box and all; object left out"],
        ["all.json: 1 annotation with the id of another one; numbered anew"],
        ["annotation 4 belongs to image 1234"],
        ["annotation 5 has category 1 (allowed: 90, 3)"],
        ["annotation 6", "has no area"],
        ["annotation 7", "lies outside of the 40x30 image"],
        ["annotation 8", "is not four finite numbers"],
    ):
        assert len(lines_with(problems, *parts)) == 1, parts
    assert len(problems) == 10
    assert lines_with(lines, "in both train and val: 3 images")
    train, _ = build_datasets(load_config(tmp_path / "recipe.yaml").data)
    boxes = {record.path.stem: record.boxes.tolist() for record in train.annotations.records}
    # Both that have the id 2, once each.
    assert boxes == {"a": [[1, 2, 11, 10], [5, 5, 25, 25]], "b": [[0, 0, 30, 20], [1, 1, 6, 6]], "c": []}


@pytest.mark.attempt("mutated annotations")
def test_what_training_would_refuse(coco, monkeypatch, capsys):
    content, _, write = coco
    status, lines = check(monkeypatch, capsys, write(), "data.train=no.json")
    assert status == 1
    assert lines_with(lines, "training cannot go on", "no.json: no such file")
    for entry in content["annotations"]:
        entry["bbox"] = [1, 1, 0, 0]
    status, lines = check(monkeypatch, capsys, write())
    assert status == 1
    assert lines_with(lines, "training cannot go on", "has a box to train on", "3 left out or mended")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.attempt("mutated images", 8)
def test_damage_of_an_image_file(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    assert examine_image(path, 80, 64).problem is None
    assert examine_image(path, 80, 64, "full").problem is None
    path.write_bytes(whole + bytes(100))  # what some cameras leave behind the end
    assert examine_image(path, 80, 64).problem is None
    assert examine_image(path, 64, 80).problem == "the image is 80x64 pixels, its annotations say 64x80"
    path.write_bytes(whole + bytes(10000))  # or a whole film
    assert examine_image(path, 80, 64).problem is None
    for length in (len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:length])
        assert examine_image(path, 80, 64).problem == "the image is cut off"
    path.write_bytes(b"hello")
    assert examine_image(path, 80, 64).problem.startswith("no readable image header")
    assert examine_image(tmp_path, 80, 64).problem == "a folder, not an image"
    assert examine_image(tmp_path / "gone.png", 80, 64).problem == "no such file"
    assert "name too long" in examine_image(tmp_path / ("long" * 100), 80, 64).problem


@pytest.mark.attempt("mutated images")
def test_damage_inside_is_found_by_decoding(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(8)
    path.write_bytes(content)
    assert examine_image(path, 80, 64).problem is None
    assert examine_image(path, 80, 64, "full").problem is not None
