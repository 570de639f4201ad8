"""One set in every format: the same boxes, labels and images; recognised by itself; split; turned into a recipe."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from fake_data import sentence, voc_object, write_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from detection.cli import main
from detection.config import override, read_recipe
from detection.config.schema import Data
from detection.data import read_split
from detection.data.layouts import recognise
from detection.data.records import Annotations, Record
from detection.models.detectors import retinanet_anchors
from detection.tasks import task_of
from detection.tasks.checks import Objects, best_overlaps
from detection.text import plural

NAMES = ("cat", "dog", "fire engine")
WIDTH, HEIGHT = 64, 48


class Picture(NamedTuple):
    """A file's name, and its objects: (class, (x1, y1, x2, y2)) in whole pixels."""

    name: str
    objects: list[tuple[str, tuple[int, int, int, int]]]


Sets = dict[str, list[Picture]]


def place(root: Path, folder: str, pictures: list[Picture]) -> None:
    for picture in pictures:
        write_image(root / folder / picture.name, WIDTH, HEIGHT, len(picture.name))


def write_xml(path: Path, picture: Picture) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = "".join(voc_object(name, (x1 + 1, y1 + 1, x2, y2)) for name, (x1, y1, x2, y2) in picture.objects)
    path.write_text(f"<annotation><filename>{picture.name}</filename>{objects}</annotation>")


def write_devkit(root: Path, sets: Sets) -> None:
    lists = root / "VOC2012" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for split, pictures in sets.items():
        place(root, "VOC2012/JPEGImages", pictures)
        (lists / f"{split}.txt").write_text("".join(f"{Path(each.name).stem}\n" for each in pictures))
        for each in pictures:
            write_xml(root / "VOC2012/Annotations" / f"{Path(each.name).stem}.xml", each)


def write_flat_voc(root: Path, sets: Sets) -> None:
    for split, pictures in sets.items():
        place(root, f"images/{split}", pictures)
        for each in pictures:
            write_xml(root / "annotations" / split / f"{Path(each.name).stem}.xml", each)


def write_mixed_voc(root: Path, sets: Sets) -> None:
    """Images and XML files in one folder per split."""
    for split, pictures in sets.items():
        place(root, split, pictures)
        for each in pictures:
            write_xml(root / split / f"{Path(each.name).stem}.xml", each)


def coco_of(pictures: list[Picture], first: int) -> dict:
    """A COCO dictionary whose categories are numbered from `first`; 0 is taken by a root without objects if it is 1."""
    root = [{"id": 0, "name": "things", "supercategory": "none"}] if first == 1 else []
    parent = {"supercategory": "things"} if root else {}
    images = [
        {"id": i, "file_name": each.name, "width": WIDTH, "height": HEIGHT} for i, each in enumerate(pictures, start=1)
    ]
    notes = [
        {"id": 0, "image_id": i, "category_id": first + NAMES.index(name), "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for i, each in enumerate(pictures, start=1)
        for name, (x1, y1, x2, y2) in each.objects
    ]
    kinds = [{"id": first + i, "name": name, **parent} for i, name in enumerate(NAMES)]
    numbered = [{**note, "id": number} for number, note in enumerate(notes)]
    return {"images": images, "annotations": numbered, "categories": root + kinds}


def write_coco(root: Path, sets: Sets) -> None:
    (root / "annotations").mkdir()
    for split, pictures in sets.items():
        place(root, f"{split}2017", pictures)
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(coco_of(pictures, 7)))


def write_roboflow(root: Path, sets: Sets) -> None:
    for split, pictures in sets.items():
        folder = "valid" if split == "val" else split
        place(root, folder, pictures)
        (root / folder / "_annotations.coco.json").write_text(json.dumps(coco_of(pictures, 1)))


def yolo_line(picture: Picture, number: int) -> str:
    """A line for an object: a box, or every other time the polygon of its corners."""
    name, (x1, y1, x2, y2) = picture.objects[number]
    if number % 2:
        corners = (x1 / WIDTH, y1 / HEIGHT, x2 / WIDTH, y1 / HEIGHT, x2 / WIDTH, y2 / HEIGHT)
    else:
        corners = ((x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT)
    return f"{NAMES.index(name)} {' '.join(f'{value:.6f}' for value in corners)}\n"


def write_yolo(root: Path, sets: Sets) -> None:
    content: dict = {"names": dict(enumerate(NAMES)), "nc": 3, "path": "."}
    for split, pictures in sets.items():
        place(root, f"images/{split}", pictures)
        (root / f"labels/{split}").mkdir(parents=True)
        content[split] = f"images/{split}"
        for each in pictures:
            text = "".join(yolo_line(each, number) for number in range(len(each.objects)))
            (root / f"labels/{split}/{Path(each.name).stem}.txt").write_text(text)
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def write_csv(root: Path, sets: Sets) -> None:
    """A file per split, as Roboflow's and Tensorflow's tools write it; images without objects have no row."""
    for split, pictures in sets.items():
        place(root, split, pictures)
        with (root / split / "_annotations.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"))
            for each in pictures:
                writer.writerows((each.name, WIDTH, HEIGHT, name, *box) for name, box in each.objects)


def write_split_csv(root: Path, sets: Sets) -> None:
    """One file with a column split and sides in place of corners."""
    rows = ["Image; x; y; w; h; Label; Split"]
    for split, pictures in sets.items():
        place(root, "pictures", pictures)
        for each in pictures:
            rows += [f"{each.name};;;;;;{split}"] * (not each.objects)
            rows += [
                f"{each.name};{x1};{y1};{x2 - x1};{y2 - y1};{name};{split}" for name, (x1, y1, x2, y2) in each.objects
            ]
    (root / "all.csv").write_text("\n".join(rows), encoding="utf-8-sig")


WRITERS = {
    "voc": (write_devkit, "voc"),
    "flat voc": (write_flat_voc, "voc"),
    "mixed voc": (write_mixed_voc, "voc"),
    "coco": (write_coco, "coco"),
    "roboflow": (write_roboflow, "coco"),
    "yolo": (write_yolo, "yolo"),
    "csv": (write_csv, "csv"),
    "split csv": (write_split_csv, "csv"),
}
every_layout = pytest.mark.parametrize("layout", WRITERS)


def whole(seed: int = 0, number: int = 6) -> Sets:
    """Sets whose train part has every class, and an image without objects."""
    rng = random.Random(seed)

    def picture(name: str, classes: list[str]) -> Picture:
        boxes = {}
        for kind in classes:
            x1, y1 = rng.randrange(0, WIDTH - 20), rng.randrange(0, HEIGHT - 20)
            boxes[x1, y1, x1 + rng.randint(6, 20), y1 + rng.randint(6, 20)] = kind
        return Picture(name, [(kind, box) for box, kind in boxes.items()])

    def pictures(split: str) -> list[Picture]:
        some = [picture(f"{split} {i}.jpg", rng.choices(NAMES, k=rng.randint(1, 4))) for i in range(number)]
        return [*some, picture(f"{split}_all.png", list(NAMES)), Picture(f"{split}_none.jpg", [])]

    return {"train": pictures("train"), "val": pictures("val")}


def found_in(annotations: Annotations) -> dict[str, list[tuple]]:
    """Sorted (class, box rounded to a thousandth) by the name of the image."""
    names = annotations.categories
    return {
        record.path.name: sorted(
            (names[label - 1], tuple(np.round(box, 2))) for label, box in zip(record.labels, record.boxes, strict=True)
        )
        for record in annotations.records
    }


def expected(pictures: list[Picture]) -> dict[str, list[tuple]]:
    return {
        each.name: sorted((name, tuple(np.float32(value) for value in box)) for name, box in each.objects)
        for each in pictures
    }


@settings(max_examples=4, derandomize=True, deadline=None, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(seed=st.integers(0, 10**6))
@every_layout
def test_a_set_is_read_back_from_every_format(tmp_path, layout, seed):
    writer, format = WRITERS[layout]
    root = tmp_path / str(seed)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    sets = whole(seed)
    writer(root, sets)
    found = recognise(root)
    assert [each.format for each in found] == [format] and found[0].share == 1
    data = Data(**found[0].values)
    for split, pictures in sets.items():
        annotations = read_split(data, split).annotations
        assert sorted(annotations.categories) == sorted(NAMES)
        assert found_in(annotations) == expected(pictures)
        expected_ends = {"roboflow": ["it is no class"], "csv": ["taken for images without objects"]}
        assert [text.split("; ")[-1] for text in annotations.dropped] == expected_ends.get(layout, [])


@every_layout
def test_one_set_alone_is_split_by_a_share(tmp_path, layout):
    writer, format = WRITERS[layout]
    sets = {"train": whole()["train"]}
    writer(tmp_path, sets)
    (found,) = recognise(tmp_path)
    assert found.format == format and found.values["val_fraction"] == 0.2
    data = Data(**found.values)
    train, val = (read_split(data, split).annotations for split in ("train", "val"))
    assert len(val.records) == 2 and len(train.records) == 6  # of 8, the nearest to 1.6
    assert found_in(train) | found_in(val) == expected(sets["train"])


def test_groups_stay_together_whatever_the_order_and_place(tmp_path):
    names = [f"film{film}_{frame}.jpg" for film in range(10) for frame in range(5)]
    pictures = [Picture(name, [("cat", (1, 1, 20, 20))]) for name in names]
    for folder, order in (("a", pictures), ("b", pictures[::-1])):
        write_yolo(tmp_path / folder, {"train": order})
    settings = {"format": "yolo", "val_fraction": 0.3, "group_by": r"^(film\d+)_", "split_seed": 4}

    def val(folder: str, **more) -> set[str]:
        data = Data(root=tmp_path / folder, **(settings | more))
        parts = [read_split(data, split).annotations.records for split in ("train", "val")]
        train, chosen = ({record.path.name for record in part} for part in parts)
        assert not train & chosen and train | chosen == set(names)
        return chosen

    chosen = val("a")
    assert len(chosen) == 15
    films: dict[str, int] = defaultdict(int)
    for name in chosen:
        films[name.split("_")[0]] += 1
    assert set(films.values()) == {5}
    assert chosen == val("b") == val("a", group_by=r"film\d+")
    assert chosen != val("a", split_seed=5) and len(val("a", group_by="")) == 15
    with pytest.raises(ValueError, match=r"data\.group_by: 'x\+' is found in none of 50 file names, such as film0_0"):
        val("a", group_by="x+")
    with pytest.raises(ValueError, match="all 50 images are one group"):
        val("a", group_by="film")
    for wrong, said in (
        ({"group_by": "("}, "not a regular expression"),
        ({"val": ["val"]}, "val names a validation set"),
        ({"val_fraction": 0.0}, "for val_fraction, which is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            Data(**(settings | wrong))


# YOLO


def read_yolo(root: Path, label: str | bytes, **options) -> Record | Annotations:
    """The set of one good image and one whose label file has this content."""
    write_yolo(root, {"train": [Picture("good.jpg", [("cat", (1, 1, 9, 9))]), Picture("one.jpg", [])]})
    path = root / "labels/train/one.txt"
    path.write_bytes(label if isinstance(label, bytes) else label.encode())
    return read_split(Data(format="yolo", root=root, **options), "train").annotations


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("3 .5 .5 .1 .1", "line 2 has class '3' (allowed: 0, 1, 2); object left out"),
        ("-1 .5 .5 .1 .1", "line 2 has class '-1'"),
        ("1e400 .5 .5 .1 .1", "line 2 has class '1e400'"),
        ("0.5 .5 .5 .1 .1", "line 2 has class '0.5'"),
        ("cat .5 .5 .1 .1", "line 2 has class 'cat'"),
        ("0 .5 .5 .1", "line 2 has 3 numbers behind its class"),
        ("0 .5 .5 .1 .1 .9", "line 2 has 5 numbers behind its class"),
        ("0 .5 .5 nan .1", "line 2 of one.jpg: box ['.5', '.5', 'nan', '.1'] is not four finite numbers"),
        ("0 .5 .5 1e308 .1", "line 2 of one.jpg: box [-inf, 21.6, inf, 4.8"),
        ("0 .5 .5 0 .1", "line 2 of one.jpg: box [32, 21.6, 0, 4.8] has no area"),
        ("0 2 2 .1 .1", "lies outside of the 64x48 image; object left out"),
        ("0 .9 .5 .4 .1", "reaches out of the 64x48 image; clipped"),
        ("1 .25 .5 .25 .5", "line 2 is line 1 once more; object left out"),
    ],
)
def test_what_is_wrong_with_a_line(tmp_path, line, said):
    found = read_yolo(tmp_path, f"\ufeff1 .25 .5 .25 .5\r\n{line}\r\n\r\n")
    assert said in sentence(found, "labels/train/one.txt: ")
    assert found.records[1].boxes[0].tolist() == [8, 12, 24, 36] and found.records[1].labels[0] == 2
    assert len(found.records[1].labels) == 1 + ("clipped" in said)


def test_label_files_and_images_that_do_not_fit(tmp_path):
    """A damaged image, a label file in no text, one without an image, an image turned, one without a label file."""
    names = [Picture(f"{name}.jpg", [("dog", (2, 2, 20, 20))]) for name in ("a", "cut", "gone", "turned", "unlabelled")]
    write_yolo(tmp_path, {"train": names})
    images, labels = tmp_path / "images/train", tmp_path / "labels/train"
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:700])
    (images / "gone.jpg").unlink()
    (labels / "unlabelled.txt").unlink()
    picture = Image.open(images / "turned.jpg")
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(images / "turned.jpg", exif=exif)
    (labels / "turned.txt").write_text("1 .5 .25 .5 .25\n")
    (images / "loop").symlink_to(images)
    found = read_split(Data(format="yolo", root=tmp_path), "train").annotations
    assert [record.path.name for record in found.records] == ["a.jpg", "turned.jpg", "unlabelled.jpg"]
    turned = found.records[1]
    assert turned.upright and turned.read().shape == (WIDTH, HEIGHT, 3)
    assert turned.boxes.tolist() == [[12, 8, 36, 24]]
    assert sentence(found, "cut.jpg: the image is cut off").endswith("image left out with 1 object")
    assert sentence(found, "gone.txt: no image of its name").endswith("image left out with 1 object")
    sentence(found, "turned.jpg: EXIF orientation 6: its boxes count the upright image")
    sentence(found, "data.yaml: 1 image of train without a label file, the first: ", "unlabelled.jpg")
    assert len(found.dropped) == 4
    (labels / "a.txt").write_bytes(b"\xff\xfe0")
    again = read_split(Data(format="yolo", root=tmp_path), "train")
    sentence(again.annotations, "a.txt: not a label file")


def test_lists_other_folders_and_layouts_of_a_yolo_set(tmp_path):
    pictures = whole()["train"]
    write_yolo(tmp_path, {"train": pictures})
    (tmp_path / "one.txt").write_text(f"./images/train/{pictures[0].name}\nimages/train/{pictures[1].name}\n")
    content = {"path": "/nowhere/else", "train": ["one.txt", "../images/train"], "val": "none", "names": list(NAMES)}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    found = read_split(Data(format="yolo", root=tmp_path, classes=["dog"]), "train").annotations
    assert len(found.records) == len(pictures) and found.categories == ("dog",)
    sentence(found, "data.yaml: path '/nowhere/else' is no folder; paths start from that of the file")
    sentence(found, "data.yaml: 2 images of ../images/train named already; used once")
    number = sum(name == "cat" for each in pictures for name, _ in each.objects)
    sentence(found, f"{plural(number, 'object')} of category 'cat' left out, not among the classes dog")
    for change, said in (
        ({"val": ["none"]}, r"none: no such folder or \.txt list"),
        ({"classes": ["dgo"]}, "no class 'dgo'; did you mean 'dog'"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            read_split(Data(format="yolo", root=tmp_path, **change), "val")
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))  # as label tools write it
    assert found_in(read_split(Data(format="yolo", root=tmp_path, train=["images"]), "train").annotations) == expected(
        pictures
    )
    with pytest.raises(ValueError, match=r"classes\.txt: names no val; data\.val takes a folder .* data\.val_fraction"):
        read_split(Data(format="yolo", root=tmp_path), "val")


def test_label_files_beside_images_with_lists_and_no_yaml(tmp_path):
    pictures = whole()["train"]
    place(tmp_path, ".", pictures)
    for each in pictures:
        lines = [yolo_line(each, number) for number in range(len(each.objects))]
        (tmp_path / f"{Path(each.name).stem}.txt").write_text("".join(lines))
    (tmp_path / "obj.names").write_text("\n".join(NAMES))
    (found,) = recognise(tmp_path)
    assert found.values["train"] == ["."] and found.values["val_fraction"] == 0.2
    for split, part in (("train", pictures[2:]), ("test", pictures[:2])):
        (tmp_path / f"{split}.txt").write_text("\n".join(each.name for each in part))
    (found,) = recognise(tmp_path)
    assert (found.values["train"], found.values["val"], found.share) == (["train.txt"], ["test.txt"], 1)
    for split, part in (("train", pictures[2:]), ("val", pictures[:2])):
        annotations = read_split(Data(**found.values), split).annotations
        assert found_in(annotations) == expected(part) and annotations.dropped == ()


def test_roots_of_roboflow_called_as_a_class_or_as_nothing(tmp_path):
    pictures = whole()["train"]
    place(tmp_path, ".", pictures)
    for name, parent, said in (("cat", "cat", "category 0, 'cat', is the root"), ("all", "other", "'all' is the par")):
        content = coco_of(pictures, 1)
        content["categories"][0]["name"] = name
        for item in content["categories"][1:]:
            item["supercategory"] = parent
        (tmp_path / "_annotations.coco.json").write_text(json.dumps(content))
        annotations = read_split(Data(root=tmp_path, train=["_annotations.coco.json"]), "train").annotations
        assert annotations.categories == NAMES and found_in(annotations) == expected(pictures)
        sentence(annotations, said)


@pytest.mark.parametrize("names", [[], "cat", {"a": 1}, [["cat"]], ["cat", "cat"], None, {-1: "cat"}])
def test_names_that_are_none(tmp_path, names):
    write_yolo(tmp_path, {"train": whole()["train"]})
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"names": names, "train": "images/train"}))
    with pytest.raises(ValueError, match=r"data\.yaml: names: "):
        read_split(Data(format="yolo", root=tmp_path), "train")


def test_a_list_of_names_that_is_no_text_is_named(tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfec")  # UTF-16, cut off
    with pytest.raises(ValueError, match=r"classes\.txt: not a text file: .*truncated data$"):
        read_split(Data(format="yolo", root=tmp_path), "train")


# CSV


def read_csv(root: Path, text: str | bytes) -> Annotations:
    place(root, ".", [Picture("a.jpg", []), Picture("b.jpg", [])])
    (root / "all.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_split(Data(format="csv", root=root, train=["all.csv"]), "train").annotations


HEADER = "filename,xmin,ymin,xmax,ymax,class\na.jpg,1,2,11,12,cat\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("b.jpg,1,2,x,4,cat", "line 3 of b.jpg: box ['1', '2', 'x', '4'] is not four finite numbers"),
        ("b.jpg,5,2,1,4,cat", "line 3 of b.jpg: box [5, 2, 1, 4] has no area"),
        ("b.jpg,1,2,1e300,4,cat", "line 3 of b.jpg: box [1, 2, 1e+300, 4] reaches out of the 64x48 image; clipped"),
        ("b.jpg,100,2,110,4,cat", "lies outside of the 64x48 image"),
        (",1,2,3,4,cat", "line 3 names no image; object left out"),
        ("b.jpg,1,2,3,4,", "line 3 has no class; object left out"),
        ("a.jpg,1,2,11,12,cat", "line 3 is line 2 once more; object left out"),
        ("gone.jpg,1,2,3,4,cat", "gone.jpg: no such file; image left out with 1 object"),
        ("../c.jpg,1,2,9,9,cat", "1 image file outside of"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path, line, said):
    write_image(tmp_path / "c.jpg", WIDTH, HEIGHT)
    found = read_csv(tmp_path / "set", f"{HEADER}{line}\n")
    sentence(found, said)
    boxes = {record.path.name: record.boxes.tolist() for record in found.records}
    assert boxes["a.jpg"] == [[1, 2, 11, 12]] and sum("without a row" not in text for text in found.dropped) == 1
    assert boxes.get("b.jpg") == (None if "gone" in said else [[1, 2, 64, 4]] if "clipped" in said else [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,a,b\n", "its header has the columns 'file', 'a', 'b'; expected a column filename"),
        ("", "its header has the columns "),
        ("filename,class,xmin,ymin,xmax,ymax,Class\n", "has the column 'Class' twice"),
        ("filename,class,xmin,ymin,xmax,ymax,split,Split\n", "has the column 'Split' twice"),
        ("filename,class,xmin,ymin,xmax,ymax\na.jpg,cat,.1,.1,.5,.5\n", "lie in 0 to 1: shares of the image"),
        (f'{HEADER}"b.jpg,1,2,3,4,cat\n', "not a CSV file: line 3"),
        (HEADER.partition("\n")[0], "none of its 2 usable images has a box"),
    ],
)
def test_files_that_are_refused(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        read_csv(tmp_path, text)


def test_width_and_height_are_the_images_beside_corners_and_the_boxes_beside_x_and_y(tmp_path):
    assert read_csv(tmp_path, "image;label;x;y;width;height\na.jpg;cat;1;2;10;20\n").records[0].boxes.tolist() == [
        [1, 2, 11, 22]
    ]
    text = "path,width,height,x1,y1,x2,y2,name\nC:\\work\\a.jpg,65,48,1,2,11,12,cat\nb.jpg,64,48,1,2,11,12,cat\n"
    found = read_csv(tmp_path, text.encode("utf-16"))
    assert [record.path.name for record in found.records] == ["b.jpg"]
    sentence(found, "a.jpg: the image is 64x48 pixels, its annotations say 65x48; image left out with 1 object")


def test_images_without_a_row_may_belong_to_another_file(tmp_path):
    place(tmp_path, "images", [Picture(f"{name}.jpg", []) for name in "abc"])
    for split, name in (("train", "a"), ("val", "b")):
        (tmp_path / f"{split}.csv").write_text(HEADER.replace("a.jpg", f"{name}.jpg"))
    (found,) = recognise(tmp_path)
    for split, name in (("train", "a"), ("val", "b")):
        annotations = read_split(Data(**found.values), split).annotations
        assert [record.path.stem for record in annotations.records] == [name]
        sentence(annotations, "2 images of", "without a row in it", "not used")


# Recognition, and recipes


def test_what_is_no_data_set_is_told_with_what_was_looked_for(tmp_path, capsys):
    place(tmp_path, "pictures", [Picture("a.jpg", [])])
    for verb in (["check-data"], ["init", "--out", str(tmp_path / "new.yaml")]):
        with pytest.raises(SystemExit) as stop:
            main([verb[0], str(tmp_path), *verb[1:]])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "not a data set that is recognised: 1 image, but none of data.yaml or classes.txt" in said
        assert "_annotations.coco.json" in said and "CSV files with a header" in said
    with pytest.raises(ValueError, match="format 'xml': recognised are yolo, coco, voc, csv"):
        recognise(tmp_path, "xml")
    (tmp_path / "classes.txt").write_text("cat\n")
    (tmp_path / "a.txt").symlink_to("nowhere")
    text = '{"images": [{"file_name": "a\\q.jpg"}], "annotations": [], "categories": []}'
    (tmp_path / "all.json").write_text(text)
    with pytest.raises(ValueError, match=r"all\.json: not a JSON file: Invalid"):
        recognise(tmp_path)


def test_check_data_of_a_folder(tmp_path, capsys):
    write_roboflow(tmp_path, whole() | {"test": whole(3)["val"]})
    main(["check-data", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("format: coco, 100% sure: test/_annotations.coco.json has images, annotations and")
    assert [line for line in lines if line.startswith(("train: images", "val: images", "test: images"))] == [
        f"{split}: images without objects: 1" for split in ("train", "val", "test")
    ]
    assert sum("'things' is the parent of others and has no objects; it is no class" in line for line in lines) == 3
    few = [line for line in lines if line.startswith("warning: class ")]
    assert few and all("fewer than 10: too few to learn it" in line for line in few)
    assert lines[-1] == "training can go on"


def test_two_formats_in_one_folder(tmp_path, capsys):
    write_yolo(tmp_path, whole())
    write_coco(tmp_path, whole())
    assert [each.format for each in recognise(tmp_path)] == ["yolo", "coco"]
    main(["check-data", str(tmp_path), "--format", "coco"])
    assert capsys.readouterr().out.startswith("format: coco, ")


@every_layout
def test_init_writes_a_recipe_for_every_layout(tmp_path, capsys, layout):
    writer, format = WRITERS[layout]
    (tmp_path / "set").mkdir()
    writer(tmp_path / "set", whole())
    main(["init", str(tmp_path / "set"), "--out", str(tmp_path / "recipe.yaml")])
    out = capsys.readouterr().out
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.data.format == format and sorted(recipe.data.classes) == sorted(NAMES)
    task = task_of(recipe)
    assert (len(task.read("train")), len(task.read("val"))) == (8, 8)
    text = (tmp_path / "recipe.yaml").read_text()
    reasons = " ".join(text.replace("#", "").split())
    assert "cells of 8 to 32 pixels" in reasons and "% of them at IoU 0.5" in reasons and "group_by" not in reasons
    assert out.splitlines()[-1] == f"written: {tmp_path / 'recipe.yaml'}; next: hoyer-det train {tmp_path}/recipe.yaml"
    assert recipe.model.min_size == [96] and recipe.train.batch_size == 2  # twice 48; a quarter of 8
    assert recipe.train.epochs == 200 and recipe.optimizer.warmup_steps == 80  # 4 steps per epoch
    with pytest.raises(SystemExit):
        main(["init", str(tmp_path / "set"), "--out", str(tmp_path / "recipe.yaml")])
    assert "exists already" in capsys.readouterr().err


def test_train_by_the_recipe_of_init(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    signs = {
        f"sign {i}.jpg": [("left", (4 * i, 4, 4 * i + 20, 24)), ("right", (4 * i, 24, 4 * i + 20, 44))]
        for i in range(6)
    }
    write_csv(tmp_path / "set", {"train": [Picture(*each) for each in signs.items()]})
    main(["init", "set", "--data.val_fraction", "0.34", "--data.workers", "0", "--data.augment.vflip", "0.5"])
    recipe = read_recipe("recipe.yaml")
    assert recipe.data.val_fraction == 0.34 and recipe.data.workers == 0 and recipe.data.augment.hflip == 0
    assert recipe.data.augment.vflip == 0.5 and recipe.data.augment.crop > 0
    assert recipe.model.backbone.weights == "zoo:bccd_retinanet_resnet18"
    (twin,) = re.findall("# The analogue twin: (.*)", Path("recipe.yaml").read_text())
    override(recipe, twin.split())
    assert "--model.backbone.weights None" in twin
    out = capsys.readouterr().out
    assert "no mirror images: left, right would become something else" in out
    assert "warning: class 'left' has 4 boxes, fewer than 10" in out
    main(["train", "recipe.yaml", "--train.epochs", "1", "--train.precision", "no", "--model.neck.out_channels", "16"])
    run = tmp_path / "runs" / "recipe"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["epoch"] == 1
    capsys.readouterr()
    main(["check-data", "recipe.yaml", "--train.epochs", "1", "--model.min_size", "12", "--model.max_size", "16"])
    out = capsys.readouterr().out
    assert "optimizer.warmup_steps 80: the whole run has 4 steps, and the warm-up is half of them, 2" in out
    assert "8 of 8 objects are smaller than a cell of the finest level, 8 pixels, in images of 12 pixels" in out
    with pytest.raises(SystemExit):
        main(["init", "set", "--out", "other.yaml", "--train.epochs", "3"])
    assert "--train.epochs: of a recipe; a folder takes keys of the section data" in capsys.readouterr().err


def test_best_overlaps_are_those_of_all_anchors():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 250, (60, 2))
    boxes = np.hstack([corners, corners + rng.uniform(3, 150, (60, 2))])
    strides, height, width = (8, 16, 32, 64), 352, 416
    maps = [torch.zeros(1, 1, -(-height // stride), -(-width // stride)) for stride in strides]
    images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    (anchors,) = retinanet_anchors(strides, 2.5)(images, maps)
    best = box_iou(torch.from_numpy(boxes), anchors.double()).amax(dim=1).numpy()
    sizes = np.tile([[height, width]], (60, 1))
    np.testing.assert_allclose(best_overlaps(Objects(boxes, sizes), strides, 2.5), best, atol=1e-9)
