"""What is found wrong with a data set, and that training goes on with the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_data import coco_content, write_coco, write_image, write_yolo
from helpers import ROOT, build_datasets, run_tool
from PIL import Image

from detection.cli import main
from detection.config import load_config, parse_recipe, read_recipe
from detection.data.image_files import examine_image
from detection.data.records import Annotations, Record
from detection.data.report import report, shared_images
from detection.tasks.checks import resized, small_objects

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


def test_objects_are_measured_as_the_detector_sees_them():
    """A detector keeps the ratio of sides of an image of 640x160 pixels, an SSD makes a square of it."""
    box = np.array([[10, 10, 24, 24]], dtype=np.float32)
    record = Record(Path("wide.jpg"), 1, 640, 160, box, np.array([1]), np.array([False]), np.array([196.0]))
    annotations = Annotations((record,), ("thing",), (1,))
    np.testing.assert_allclose(resized(annotations, 320, 320).boxes, [[5, 5, 12, 12]])
    square = resized(annotations, 320, 320, square=True)
    np.testing.assert_allclose(square.boxes, [[5, 20, 12, 48]])
    assert square.images.tolist() == [[320, 320]]
    backbone = {"name": "resnet18", "width": 0.125}
    for detector, number in (("ssd", 0), ("retinanet", 1)):
        model = {"detector": detector, "backbone": backbone, "min_size": [320], "max_size": 320}
        config = parse_recipe({"model": model, "data": {"format": "voc", "root": "x", "classes": ["thing"]}}, "recipe")
        assert len(small_objects(config, annotations)) == number


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


@pytest.mark.attempt("mutated images")
def test_a_cut_off_image_is_found_behind_a_whole_thumbnail(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels[:12, :16]).save(tmp_path / "small.jpg")
    Image.fromarray(pixels).save(tmp_path / "image.jpg", exif=b"Exif\0\0" + (tmp_path / "small.jpg").read_bytes())
    content = (tmp_path / "image.jpg").read_bytes()
    assert content.count(b"\xff\xd9") == 2 and examine_image(tmp_path / "image.jpg", 80, 64).problem is None
    (tmp_path / "image.jpg").write_bytes(content[:2500])  # both ends would have to be looked for in these
    assert content[:2500].count(b"\xff\xd9") == 1
    assert examine_image(tmp_path / "image.jpg", 80, 64).problem == "the image is cut off"


def damage(path: Path) -> None:
    """Pixels of a PNG that do not decode, in a file whose header and end are whole."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 8] = bytes(8)
    path.write_bytes(content)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.attempt("mutated images")
def test_damage_at_which_a_recipe_stops_is_no_reason_to_go_on(coco, monkeypatch, capsys, tmp_path, split):
    content, note, write = coco
    content["annotations"].append(note(4, 27, 3, [1, 1, 5, 5]))
    recipe = write()
    (tmp_path / "one.json").write_text(json.dumps(content | {"images": content["images"][:2]}))
    damage(tmp_path / "images" / "c.png")
    arguments = ["--data.val" if split == "train" else "--data.train", "one.json"]
    status, lines = check(monkeypatch, capsys, recipe, *arguments)
    assert status == 1 and lines_with(lines, f"{split}: ", "c.png", "image left out with 1 object")
    assert lines[-1] == (
        "training cannot go on: it stops at 1 image of those left out, which data.verify header does not find; set "
        "data.verify full, or remove them"
    )
    status, lines = check(monkeypatch, capsys, recipe, *arguments, "--data.verify", "full")
    assert status == 0 and lines[-1] == "training can go on"


@pytest.mark.attempt("mutated images")
def test_a_recipe_of_init_leaves_out_what_does_not_decode(coco, monkeypatch, capsys, tmp_path):
    content, note, write = coco
    content["annotations"] += [note(10 + i, 10 * i + 7, 3, [1, 1, 20, 20]) for i in range(4)]
    write().unlink()
    damage(tmp_path / "images" / "c.png")
    recipe = tmp_path / "new" / "recipe.yaml"
    main(["init", str(tmp_path), "--out", str(recipe)])
    out = capsys.readouterr().out
    assert read_recipe(recipe).data.verify == "full" and "data.verify: full: full decodes every image" in out
    assert f"left out or mended: 1; hoyer-det check-data {recipe} names them" in out
    status, lines = check(monkeypatch, capsys, recipe)
    assert status == 0 and lines_with(lines, "c.png", "image left out") and lines[-1] == "training can go on"
    recipe.unlink()
    main(["init", str(tmp_path), "--out", str(recipe), "--data.verify", "header"])
    assert read_recipe(recipe).data.verify == "header"


# --- a test set, which training does not read -------------------------------------------------------------------------

SPLITS = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: [cat, dog]\n"
PLACES = ("train/images/a", "train/images/b", "valid/images/c")


def of_test(monkeypatch, capsys, folder: Path) -> str:
    """The sentence about the test set of a folder in which the others are whole."""
    status, lines = check(monkeypatch, capsys, folder)
    assert status == 0 and lines[-1] == "training can go on"
    assert lines_with(lines, "train: images without") and lines_with(lines, "val: images without")
    (line,) = lines_with(lines, "test, which training does not read: ")
    return line


def test_a_test_set_that_is_not_there(monkeypatch, capsys, tmp_path):
    write_yolo(tmp_path, SPLITS, *PLACES)
    assert "test/images: no such folder" in of_test(monkeypatch, capsys, tmp_path)


def test_a_test_set_without_labels(monkeypatch, capsys, tmp_path):
    write_yolo(tmp_path, SPLITS, *PLACES)
    write_image(tmp_path / "test/images/d.jpg")
    assert "none of 1 images of test has a label file" in of_test(monkeypatch, capsys, tmp_path)


def test_a_test_set_without_boxes(monkeypatch, capsys, tmp_path):
    for split in ("train", "valid", "test"):
        file, _ = write_coco(tmp_path / split, coco_content([] if split == "test" else [(1, 2, 10, 8)]))
        file.rename(file.parent / "_annotations.coco.json")
    assert "has a box to train on" in of_test(monkeypatch, capsys, tmp_path)


def test_a_test_set_whose_csv_file_is_cut_off(monkeypatch, capsys, tmp_path):
    for split in ("train", "val", "test"):
        write_image(tmp_path / split / "a.jpg")
        row = '"a.jpg,1,2,3' if split == "test" else "a.jpg,1,2,30,20,cat"
        (tmp_path / split / "all.csv").write_text(f"filename,xmin,ymin,xmax,ymax,class\n{row}\n")
    assert "not a CSV file: line 2" in of_test(monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize("verb", ["check-data", "init"])
def test_no_share_is_for_validation_beside_a_validation_set(capsys, tmp_path, verb):
    write_yolo(tmp_path, SPLITS, *PLACES)
    with pytest.raises(SystemExit):
        main([verb, str(tmp_path), "--data.val_fraction", "0.3"])
    assert f"--data.val_fraction: {tmp_path} has a validation set of its own; drop one" in capsys.readouterr().err
    write_yolo(tmp_path, "train: ../train/images\nnames: [cat, dog]\n")
    main(["check-data", str(tmp_path), "--data.val_fraction", "0.5"])
