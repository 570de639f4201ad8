"""Real people's VOC and COCO files: the right boxes of the right images, and a sentence for whatever is left out."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_data import HEIGHT, WIDTH, coco_content, sentence, voc_object, write_coco, write_image, write_voc
from helpers import build_datasets

from detection.config.schema import Data
from detection.data import DetectionDataset, read_coco, read_voc
from detection.data.records import Annotations
from detection.evaluation import CocoEvaluator, precision_recall

pytestmark = pytest.mark.attempt("mutated annotations")
BOX = [0, 0, 10, 10]  # of voc_object(), as read


def boxes_of(annotations: Annotations) -> dict[str, list[list[float]]]:
    """The boxes of each image, by its file's name."""
    return {record.path.name: record.boxes.tolist() for record in annotations.records}


def read_one(root: Path, xml: str | bytes) -> Annotations:
    """Read an XML file of one image one.jpg, beside one.xml of a good one."""
    write_voc(root, {"good": [voc_object("dog")], "one": []})
    path = root / "VOC/Annotations/one.xml"
    path.write_bytes(xml if isinstance(xml, bytes) else xml.encode())
    return read_voc(root, ["VOC/train"])


def labelled(annotations: Annotations) -> list[tuple[str, list[float], bool]]:
    """Class, box and whether it is difficult of the objects in one.jpg."""
    (record,) = (record for record in annotations.records if record.path.stem == "one")
    names = [annotations.categories[label - 1] for label in record.labels]
    return list(zip(names, record.boxes.tolist(), record.ignore.tolist(), strict=True))


# VOC: which image


def test_an_annotation_belongs_to_the_image_of_its_own_name(tmp_path):
    """Whatever its suffix, and whatever <filename> says that was copied or renamed."""
    text = "<annotation><filename>{}</filename>{}</annotation>"
    first, second, third = (voc_object("cat", box) for box in ((1, 1, 5, 5), (2, 2, 6, 6), (3, 3, 7, 7)))
    write_voc(
        tmp_path,
        {"a": text.format("b.jpg", first), "b": text.format("b.jpg", second), "c": text.format("gone.jpg", third)},
    )
    folder = tmp_path / "VOC/JPEGImages"
    (folder / "a.jpg").unlink()
    write_image(folder / "a.PNG", 20, 10)
    found = read_voc(tmp_path, ["VOC/train"])
    assert boxes_of(found) == {"a.PNG": [[0, 0, 5, 5]], "b.jpg": [[1, 1, 6, 6]], "c.jpg": [[2, 2, 7, 7]]}
    assert found.records[0].width == 20
    assert len(found.dropped) == 2
    sentence(found, "a.xml", "its <filename> is b.jpg; a.PNG, of its own name, is taken")
    sentence(found, "c.xml", "its <filename> is gone.jpg; c.jpg, of its own name, is taken")


@pytest.mark.parametrize("said", ["photo.png", "photo", r"C:\pictures\photo.png", "/home/someone/photo.png"])
def test_an_annotation_without_an_image_of_its_name_goes_by_filename(tmp_path, said):
    write_voc(tmp_path, {"a": f"<annotation><filename>{said}</filename>{voc_object()}</annotation>"})
    (tmp_path / "VOC/JPEGImages/a.jpg").unlink()
    write_image(tmp_path / "VOC/JPEGImages/photo.png")
    found = read_voc(tmp_path, ["VOC/train"])
    assert boxes_of(found) == {"photo.png": [BOX]}
    assert "photo.png, its <filename>, is taken" in sentence(found, "a.xml", "no image of its own name")


def test_of_two_images_of_its_name_filename_says_which(tmp_path):
    text = "<annotation><filename>{}</filename>" + voc_object() + "</annotation>"
    write_voc(tmp_path, {"a": text.format("a.bmp"), "b": text.format("")})
    for name in ("a.bmp", "b.bmp"):
        write_image(tmp_path / "VOC/JPEGImages" / name)
    found = read_voc(tmp_path, ["VOC/train"])
    assert list(boxes_of(found)) == ["a.bmp", "b.jpg"]
    assert len(found.dropped) == 1
    sentence(found, "b.xml", "images b.jpg, b.bmp; b.jpg is taken")


def test_four_annotations_of_one_image_are_one_image(tmp_path):
    corners = [(1, 1, 5 + i, 5) for i in range(4)]
    text = "<annotation><filename>photo.jpg</filename>{}</annotation>"
    write_voc(tmp_path, {name: text.format(voc_object("cat", box)) for name, box in zip("abcd", corners, strict=True)})
    for name in "abcd":
        (tmp_path / f"VOC/JPEGImages/{name}.jpg").unlink()
    write_image(tmp_path / "VOC/JPEGImages/photo.jpg")
    found = read_voc(tmp_path, ["VOC/train"])
    assert boxes_of(found) == {"photo.jpg": [[0, 0, 5 + i, 5] for i in range(4)]}
    assert found.records[0].area.tolist() == [25, 30, 35, 40] and found.records[0].image_id == 1
    sentence(found, "photo.jpg: described 4 times; joined into image 1")
    assert len(DetectionDataset(found).ground_truth()["annotations"]) == 4


def test_names_in_subfolders_and_outside(tmp_path):
    write_voc(tmp_path, {"one": [voc_object()]})
    for name in ("sub/two", "../../elsewhere/three"):
        xml = tmp_path / "VOC/Annotations" / f"{name}.xml"
        xml.parent.mkdir(parents=True, exist_ok=True)
        xml.write_text(f"<annotation>{voc_object()}</annotation>")
        write_image(tmp_path / "VOC/JPEGImages" / f"{name}.jpg")
    (tmp_path / "VOC/ImageSets/Main/train.txt").write_text("one\nsub/two\n../../elsewhere/three\n")
    found = read_voc(tmp_path, ["VOC/train"])
    assert boxes_of(found) == {"one.jpg": [BOX], "two.jpg": [BOX], "three.jpg": [BOX]}
    assert len(found.dropped) == 1
    sentence(found, "train.txt: 1 image file outside of", "elsewhere/three; used all the same")


def test_images_without_use_count_their_objects(tmp_path):
    three = [voc_object(), voc_object(), voc_object("dog")]
    write_voc(tmp_path, {name: three for name in ("good", "noimage", "damaged", "nosize", "larger")})
    folder = tmp_path / "VOC"
    (folder / "JPEGImages/noimage.jpg").unlink()
    (folder / "JPEGImages/damaged.jpg").write_bytes(b"text")
    (folder / "JPEGImages/nosize.jpg").write_bytes(b"text")
    (folder / "Annotations/nosize.xml").write_text(f"<annotation>{''.join(three)}</annotation>")
    write_image(folder / "JPEGImages/larger.jpg", 80, 60)
    found = read_voc(tmp_path, ["VOC/train"])
    assert list(boxes_of(found)) == ["good.jpg"] and len(found.dropped) == 4
    assert all(text.endswith("image left out with 3 objects") for text in found.dropped)
    sentence(found, "larger.jpg: the image is 80x60 pixels, its annotations say 40x30")


# VOC: which objects

HANDS = "<part><name>hand</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"


@pytest.mark.parametrize(
    "xml",
    [
        f'<annotation xmlns="http://voc.example/1">{voc_object()}</annotation>',
        f'<v:annotation xmlns:v="u">{voc_object().replace("<", "<v:").replace("<v:/", "</v:")}</v:annotation>',
        f"<annotation><objects>{voc_object()}</objects></annotation>",
        f"<annotations><annotation><filename>one.jpg</filename>{voc_object()}</annotation></annotations>",
        f"<Annotation>{voc_object().replace('object', 'Object').replace('name', 'Name')}</Annotation>",
        f"<annotation>{voc_object().replace('</object>', HANDS + '</object>')}</annotation>",
        f"<annotation>{voc_object().replace('<name>', HANDS + '<name>')}</annotation>",
        "\ufeff" + f"<annotation>{voc_object('  cat ')}</annotation>",
        f"<annotation>\r\n{voc_object()}\r\n</annotation>\r\n",
    ],
    ids=["namespace", "prefix", "deeper", "wrapped", "capitals", "parts", "parts first", "mark", "crlf"],
)
def test_objects_however_they_are_written(tmp_path, xml):
    found = read_one(tmp_path, xml)
    assert labelled(found) == [("cat", BOX, False)] and found.dropped == ()


@pytest.mark.parametrize(
    ("value", "difficult"),
    [("1", True), ("true", True), ("True", True), (" yes ", True), ("0", False), ("false", False), ("", False)],
)
def test_difficult(tmp_path, value, difficult):
    assert labelled(read_one(tmp_path, f"<annotation>{voc_object(difficult=value)}</annotation>"))[0][2] is difficult


def test_a_second_box_is_a_second_object(tmp_path):
    second = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
    found = read_one(tmp_path, f"<annotation>{voc_object().replace('</object>', second)}</annotation>")
    assert labelled(found) == [("cat", BOX, False), ("cat", [4, 4, 9, 9], False)]
    sentence(found, "one.xml: object 1 (cat) has 2 boxes; each is taken for an object")


def test_objects_without_a_box_are_told(tmp_path):
    turned = "<object><name>cat</name><robndbox><cx>5</cx></robndbox></object>"
    found = read_one(tmp_path, f"<annotation>{turned}{voc_object()}</annotation>")
    assert labelled(found) == [("cat", BOX, False)]
    sentence(found, "one.xml: object 1 (cat) of one.jpg: no bndbox; object left out")


@pytest.mark.parametrize(
    ("encoding", "name"), [("GBK", "猫"), ("gb2312", "猫"), ("windows-1252", "Kätzchen"), ("Shift_JIS", "ネコ")]
)
def test_declared_encodings(tmp_path, encoding, name):
    text = f'<?xml version="1.0" encoding="{encoding}"?>\n<annotation>{voc_object(name)}</annotation>'
    found = read_one(tmp_path, text.encode(encoding))
    assert labelled(found) == [(name, BOX, False)] and found.dropped == ()


def test_an_undeclared_encoding_is_told(tmp_path):
    found = read_one(tmp_path, f"<annotation>{voc_object('斑马')}</annotation>".encode("GBK"))
    sentence(found, "one.xml: not an XML file: not in UTF-8, and its first line declares no other encoding")
    text = f'<?xml version="1.0" encoding="klingon"?><annotation>{voc_object()}</annotation>'
    sentence(read_one(tmp_path, text), "one.xml: not an XML file: unknown encoding: klingon; image left out")
    text = f"<annotation>{voc_object()}</annotation>"
    assert labelled(read_one(tmp_path, text.encode("utf-16"))) == [("cat", BOX, False)]


@pytest.mark.parametrize(
    ("xml", "told"),
    [
        (
            "<annotation><size/><obj><name>cat</name></obj></annotation>",
            "but obj; expected object with name and bndbox",
        ),
        ("<annotations><meta/><image><box label='cat'/></image></annotations>", "but image, meta; expected object"),
        ("<annotations><annotation><item/></annotation></annotations>", "but item; expected object"),
        ("<html><body>404</body></html>", "but body; expected object"),
    ],
)
def test_content_that_is_not_understood_is_told(tmp_path, xml, told):
    found = read_one(tmp_path, xml)
    assert labelled(found) == []
    sentence(found, "one.xml: no object in it that is understood", told)


def test_an_empty_annotation_is_an_image_without_objects(tmp_path):
    head = "<folder/><filename>one.jpg</filename><path/><source><database/></source><owner/><segmented>0</segmented>"
    assert read_one(tmp_path, f"<annotation>{head}</annotation>").dropped == ()


def test_extreme_xml_files(tmp_path):
    for xml, told in (
        ("<a>" * 100_000 + "</a>" * 100_000, "one.xml: no object in it that is understood, but a"),
        ('<!DOCTYPE a [<!ENTITY b "cc"><!ENTITY d "&b;&b;">]><annotation>&d;&e;</annotation>', "undefined entity"),
        ("", "no element found"),
    ):
        sentence(read_one(tmp_path, xml), told)
    read_one(tmp_path, "<annotation/>")
    with (tmp_path / "VOC/Annotations/one.xml").open("ab") as file:
        file.truncate(65 * 2**20)
    sentence(read_voc(tmp_path, ["VOC/train"]), "one.xml: not an XML file: larger than 64 MiB")


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (codecs.BOM_UTF8 + "öl\ntwo\n".encode(), ["öl", "two"]),
        ("öl\r\ntwo\r\n".encode("utf-16"), ["öl", "two"]),
        ("öl\ntwo".encode("latin-1"), ["öl", "two"]),
        (b"\r\n two \r\n\r\n", ["two"]),
    ],
)
def test_lists_in_any_encoding(tmp_path, content, names):
    write_voc(tmp_path, {"öl": [voc_object()], "two": [voc_object()]})
    (tmp_path / "VOC/ImageSets/Main/train.txt").write_bytes(content)
    found = read_voc(tmp_path, ["VOC/train"])
    assert [record.path.stem for record in found.records] == names and found.dropped == ()


def test_a_list_that_is_no_text_is_named(tmp_path):
    write_voc(tmp_path, {"one": [voc_object()]})
    (tmp_path / "VOC/ImageSets/Main/train.txt").write_bytes(codecs.BOM_UTF16_LE + b"\x00\xd8x")
    with pytest.raises(ValueError, match=r"train\.txt: not a text file: 'utf-16"):
        read_voc(tmp_path, ["VOC/train"])


# COCO: ids


def coco_set(root: Path, ids: list[int | str]) -> DetectionDataset:
    """Six images with two boxes each, of two categories; the ids in the order of the images."""
    boxes = np.random.default_rng(0).uniform(1, 12, (12, 4)).round(1).tolist()
    content = {
        "images": [{"id": ids[i], "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(6)],
        "annotations": [
            {"id": i + 1, "image_id": ids[i // 2], "category_id": 5 + i % 2, "bbox": box} for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}],
    }
    for i in range(6):
        write_image(root / "images" / f"{i}.png")
    return DetectionDataset(read_coco(*write_coco(root, content)))


def evaluated(dataset: DetectionDataset, backend: str, path: Path) -> tuple[dict, list, dict]:
    """Numbers by COCO and VOC of noisy detections in the data's own order, and the rows that are saved."""
    annotations = dataset.annotations
    evaluator = CocoEvaluator(dataset.ground_truth(), annotations.category_ids, backend)
    rng = np.random.default_rng(1)
    for record in annotations.records:
        noisy = record.boxes + rng.normal(0, 0.5, record.boxes.shape)
        boxes = np.hstack([noisy[:, :2], np.maximum(noisy[:, :2], noisy[:, 2:])])
        found = {"boxes": boxes, "scores": rng.random(len(boxes)), "labels": record.labels}
        evaluator.update([record.image_id], [{key: torch.from_numpy(value) for key, value in found.items()}])
    evaluator.save_results(path)
    curves = precision_recall(dataset.ground_truth(), evaluator.detections, annotations.category_ids)
    voc = {name: curve.true_positives.tolist() for name, curve in curves.items()}
    return evaluator.compute() | {"per class": evaluator.per_class()}, json.loads(path.read_text()), voc


MD5 = [hashlib.md5(bytes([i])).hexdigest() for i in range(6)]


@pytest.mark.parametrize("backend", ["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize(
    "ids",
    [
        [int(each, 16) for each in MD5],
        MD5,
        [20240131235959000 + i for i in range(6)],
        [2**63 - 1 + i for i in range(6)],
        [-(2**70), "a", 7, "7", 0, 2**64],
        [f"{i}.png\n" for i in range(6)],
    ],
    ids=["md5", "md5 texts", "time stamps", "64 bits", "mixed", "names"],
)
def test_ids_of_any_kind_count_as_numbers_from_1(tmp_path, backend, ids):
    if backend != "pycocotools":
        pytest.importorskip("faster_coco_eval")
    plain, plain_rows, plain_voc = evaluated(coco_set(tmp_path / "plain", [1, 2, 3, 4, 5, 6]), backend, tmp_path / "a")
    dataset = coco_set(tmp_path / "own", ids)
    assert dataset.dropped == () and [record.image_id for record in dataset.annotations.records] == ids
    found, rows, voc = evaluated(dataset, backend, tmp_path / "b")
    assert 0.1 < plain["AP"] < 0.9
    assert found == plain and voc == plain_voc
    assert rows == [row | {"image_id": ids[row["image_id"] - 1]} for row in plain_rows]
    assert [dataset[index][1]["image_id"] for index in range(6)] == ids


@pytest.mark.parametrize("numbers", [[0] * 4, [None] * 4, [1, 2, 3, 4]])
def test_an_entry_per_box_is_one_image(tmp_path, numbers):
    """One file under four image ids, annotations numbered or not: all four boxes, and the empty image beside it."""
    boxes = [[1, 2, 3 + i, 4] for i in range(4)]
    content = coco_content()
    entry = content["images"][0]
    content["images"] = [entry | {"id": 20 + i} for i in range(4)] + content["images"][1:]
    content["annotations"] = [
        {"id": number, "image_id": 20 + i, "category_id": 18, "bbox": box, "area": 1.5 + i}
        for i, (number, box) in enumerate(zip(numbers, boxes, strict=True))
    ]
    found = read_coco(*write_coco(tmp_path, content))
    assert boxes_of(found) == {"a.png": [[1, 2, 4 + i, 6] for i in range(4)], "b.png": []}
    assert found.records[0].image_id == 20 and found.records[0].area.tolist() == [1.5, 2.5, 3.5, 4.5]
    sentence(found, "a.png: described 4 times; joined into image 20")
    assert len(found.dropped) == 1 + (numbers == [0] * 4)
    if numbers == [0] * 4:
        sentence(found, "instances.json: 3 annotations with the id of another one; numbered anew")
    truth = DetectionDataset(found).ground_truth()
    assert [(row["id"], row["image_id"]) for row in truth["annotations"]] == [(i, 20) for i in (1, 2, 3, 4)]


def test_entries_of_one_file_with_another_size_are_not_joined(tmp_path):
    content = coco_content()
    content["images"].append(content["images"][0] | {"id": 9, "width": 80})
    content["annotations"].append(content["annotations"][0] | {"id": 90, "image_id": 9, "bbox": [60, 1, 5, 5]})
    found = read_coco(*write_coco(tmp_path, content))
    assert boxes_of(found) == {"a.png": [[1, 2, 11, 10]], "b.png": []}
    sentence(found, "a.png: the image is 40x30 pixels, its annotations say 80x30; image left out with 1 object")


# COCO: classes


def two_files(root: Path, val_categories: list[dict], val_annotations: list[dict]) -> Data:
    content = coco_content([(1, 2, 10, 8), (5, 5, 20, 20)])
    content["annotations"][1]["category_id"] = 5
    write_coco(root, content)
    (root / "val.json").write_text(json.dumps(content | {"categories": val_categories, "annotations": val_annotations}))
    files = {"train": ["instances.json"], "val": ["val.json"], "train_images": "images", "val_images": "images"}
    return Data(format="coco", root=root, **files)


def test_validation_with_other_numbers_of_fewer_classes(tmp_path):
    """Training knows cat 18 and dog 5, validation dog 18 alone: a dog that is found counts, and no cat is missed."""
    note = {"id": 1, "image_id": 3, "category_id": 18, "bbox": [2, 3, 10, 8]}
    train, val = build_datasets(two_files(tmp_path, [{"id": 18, "name": "dog"}], [note]))
    assert train.classes == val.classes == ("cat", "dog")
    assert val.annotations.category_ids == (19, 18) and val.annotations.records[1].labels.tolist() == [2]
    sentence(val.annotations, "val.json: does not list the class 'cat': no objects of it here")
    evaluator = CocoEvaluator(val.ground_truth(), val.annotations.category_ids)
    found = {"boxes": torch.tensor([[2.0, 3, 12, 11]]), "scores": torch.tensor([0.9]), "labels": torch.tensor([2])}
    evaluator.update([3], [found])
    assert evaluator.compute()["AP"] == pytest.approx(1)
    assert [values["AP"] for values in evaluator.per_class().values()] == [-1, pytest.approx(1)]
    assert next(evaluator.results)["category_id"] == 18
    with pytest.raises(ValueError, match=r"val\.json: no class 'cat'"):
        read_coco(tmp_path / "val.json", tmp_path / "images", ["cat", "dog"])


def test_validation_with_a_class_more(tmp_path):
    categories = [{"id": 1, "name": "cow"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cat"}]
    notes = [{"id": i, "image_id": 3, "category_id": i, "bbox": [2, 3, 10, 8 + i]} for i in (1, 2, 3)]
    _, val = build_datasets(two_files(tmp_path, categories, notes))
    assert val.annotations.category_ids == (3, 2) and val.annotations.records[1].labels.tolist() == [2, 1]
    sentence(val.annotations, "val.json: 1 object of category 'cow' left out, not among the classes cat, dog")


def test_the_unused_root_of_a_roboflow_export_is_no_class(tmp_path):
    content = coco_content()
    root = {"id": 0, "name": "animals", "supercategory": "none"}
    content["categories"] = [root, *({**each, "supercategory": "animals"} for each in content["categories"])]
    found = read_coco(*write_coco(tmp_path, content))
    assert found.categories == ("cat", "dog") and found.category_ids == (18, 5)
    assert found.records[0].labels.tolist() == [1]
    sentence(found, "category 'animals' is the parent of others and has no objects; it is no class")
    content["annotations"].append({"id": 1, "image_id": 7, "category_id": 0, "bbox": [1, 1, 5, 5]})
    assert read_coco(*write_coco(tmp_path, content)).categories == ("animals", "cat", "dog")
    del content["annotations"][-1]
    assert read_coco(*write_coco(tmp_path, content), ["animals", "cat"]).categories == ("animals", "cat")


# COCO: files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_any_encoding(tmp_path, encoding):
    content = coco_content()
    content["categories"][0]["name"] = "Kätzchen"
    file, images = write_coco(tmp_path, content)
    file.write_bytes(json.dumps(content, ensure_ascii=False).replace("\n", "\r\n").encode(encoding))
    found = read_coco(file, images)
    assert found.categories == ("Kätzchen", "dog") and boxes_of(found)["a.png"] == [[1, 2, 11, 10]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "not a JSON file: .*recursion"),
        ('{"images": [' + "9" * 5000 + "]}", "not a JSON file: Exceeds the limit"),
        ('{"images": [], "annotations": {}, "categories": []}', "no list 'annotations'"),
        ('{"images": [], "annotations": [], "categories": [7]}', "category at position 0 is int, not an object"),
        ('{"images": [], "annotations": [], "categories": [{"id": "1", "name": "a"}]}', "has 'id' '1', expected int"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": ["a"]}]}',
            r"'name' \['a'\], expected text",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "\\ud800"}]}',
            r"'name' '\\ud800', expected",
        ),
    ],
)
def test_files_that_are_refused(tmp_path, text, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        read_coco(*write_coco(tmp_path, text))
    assert str(caught.value).startswith(f"{tmp_path / 'instances.json'}: ") and len(str(caught.value)) < 400


def test_a_huge_file_is_refused_unread(tmp_path):
    file, images = write_coco(tmp_path, coco_content())
    os.truncate(file, 4 * 2**30 + 1)  # takes no room on the disk
    with pytest.raises(ValueError, match=r"instances\.json: larger than 4 GiB, too large for an annotation file"):
        read_coco(file, images)


def test_values_of_wrong_types_cost_one_object_each(tmp_path):
    deep: list = []
    for _ in range(300):
        deep = [deep]
    bad = [
        ({"bbox": [True, 2, 3, 4]}, r"box [True, 2, 3, 4] is not four finite numbers"),
        ({"bbox": deep}, "box [[[[[[[...]]]]]]] is not four"),
        ({"bbox": {"x": 1}}, "box {'x': 1} is not four"),
        ({"bbox": [1, 2, 10**400, 3]}, "box [1, 2, 100000000000000000...0000000000000000000, 3] is not four"),
        ({"bbox": list(range(10**5))}, "box [0, 1, 2, 3, 4, 5, ...] is not four"),
        ({"category_id": [18]}, "has 'category_id' [18], expected int"),
        ({"category_id": True}, "has 'category_id' True, expected int"),
        ({"category_id": 18.5}, "has 'category_id' 18.5, expected int"),
        ({"image_id": {"id": 7}}, "has 'image_id' {'id': 7}, expected int or text"),
        ({"image_id": "7"}, "belongs to image 7, not in the file"),
        ({"image_id": deep}, "has 'image_id' [[[[[[[...]]]]]]], expected"),
    ]
    content = coco_content()
    content["annotations"] += [
        content["annotations"][0] | {"id": 100 + i} | change for i, (change, _) in enumerate(bad)
    ]
    content["annotations"] += [None, 7, [], "x"]
    for category in content["categories"]:
        category["supercategory"] = [1]
    found = read_coco(*write_coco(tmp_path, content))
    assert boxes_of(found) == {"a.png": [[1, 2, 11, 10]], "b.png": []}
    assert len(found.dropped) == len(bad) + 4
    assert all(text.endswith("; object left out") and len(text) < 300 for text in found.dropped)
    for _, told in bad:
        sentence(found, told)


def test_numbers_that_json_writers_change(tmp_path):
    """1.0 for 1, texts in boxes, and boxes far out of the image."""
    content = coco_content([(1, 2, 10, 8)] * 6)
    content["images"][0] |= {"id": 7.0, "width": 40.0}
    changes = [
        {"image_id": 7.0, "category_id": 18.0},
        {"bbox": ["1", "2", " 10", "8.0"]},
        {"bbox": [-1e9, 2, 2e9, 8]},
        {"bbox": [1e308, 0, 1e308, 5]},
        {"bbox": [0, 0, 1e308, 1e308]},
        {"bbox": [1e9, 1e9, 1e9, 1e9]},
    ]
    for note, change in zip(content["annotations"], changes, strict=True):
        note |= change
    found = read_coco(*write_coco(tmp_path, content))
    record = found.records[0]
    assert (record.image_id, record.width) == (7, 40) and type(record.width) is int
    assert record.boxes.tolist() == [[1, 2, 11, 10], [1, 2, 11, 10], [0, 2, 40, 10], [0, 0, 40, 30]]
    assert len(found.dropped) == 4
    sentence(found, "annotation 13", "[-1e+09, 2, 2e+09, 8] reaches out of the 40x30 image; clipped")
    sentence(found, "annotation 14", "lies outside of the 40x30 image; object left out")


@pytest.mark.parametrize(
    ("value", "area"), [(12, 12), (0, 0), (-1, 80), (1e11, 80), ("no", 80), (None, 80), (1e10, 1e10)]
)
def test_areas_that_would_never_be_counted(tmp_path, value, area):
    """pycocotools leaves out boxes whose area is not in 0 to 1e10."""
    content = coco_content()
    content["annotations"][0]["area"] = value
    found = read_coco(*write_coco(tmp_path, content))
    assert found.records[0].area.tolist() == [area]
    assert len(found.dropped) == (area != value and value is not None)
    evaluator = CocoEvaluator(DetectionDataset(found).ground_truth(), found.category_ids)
    boxes = {"boxes": torch.tensor([[1.0, 2, 11, 10]]), "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}
    evaluator.update([7], [boxes])
    assert evaluator.compute()["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("value", "crowd"), [(1, True), ("1", True), (True, True), (1.0, True), (0, False), (None, False)]
)
def test_crowds(tmp_path, value, crowd):
    content = coco_content([(1, 2, 10, 8), (1, 2, 5, 5)])
    content["annotations"][0]["iscrowd"] = value
    assert read_coco(*write_coco(tmp_path, content)).records[0].ignore.tolist() == [crowd, False]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"file_name": "a" * 5000}, "File name too long"),
        ({"file_name": "a.png\0"}, r"has 'file_name' 'a.png\x00', expected text"),
        ({"file_name": "\ud800.png"}, r"has 'file_name' '\ud800.png', expected text"),
        ({"file_name": ""}, "a folder, not an image"),
        ({"file_name": "gone\n\x1b[31m.png"}, r"gone\n\x1b[31m.png: no such file"),
        ({"file_name": None}, "has 'file_name' None, expected text"),
        ({"width": 10**400}, "has size 1000"),
        ({"width": 1e9}, "the image is 40x30 pixels, its annotations say 1000000000x30"),
        ({"height": -30}, "has size 40x-30"),
        ({"height": float("inf")}, "has 'height' inf, expected int"),
        ({"height": True}, "has 'height' True, expected int"),
    ],
)
def test_images_of_wrong_types_cost_their_objects(tmp_path, change, told):
    content = coco_content([(1, 2, 10, 8), (1, 2, 9, 8)])
    content["annotations"].append(content["annotations"][0] | {"image_id": 3, "id": 1})
    content["images"][0] |= change
    found = read_coco(*write_coco(tmp_path, content))
    assert boxes_of(found) == {"b.png": [[1, 2, 11, 10]]}
    assert len(found.dropped) == 1 and found.dropped[0].isprintable()
    assert sentence(found, told).endswith("image left out with 2 objects")


def test_file_names_outside_and_with_backslashes(tmp_path):
    write_image(tmp_path / "elsewhere" / "c.png")
    content = coco_content()
    content["images"] = [
        {"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for i, name in enumerate(["a.png", "../elsewhere/c.png", r"sub\d.png", "linked.png", str(tmp_path / "e.png")])
    ]
    content["annotations"][0]["image_id"] = 0
    file, images = write_coco(tmp_path, content)
    write_image(images / "sub" / "d.png")
    write_image(tmp_path / "e.png")
    (images / "linked.png").symlink_to(tmp_path / "elsewhere" / "c.png")  # a link in the folder is inside
    found = read_coco(file, images)
    assert [record.path.name for record in found.records] == ["a.png", "c.png", "d.png", "linked.png", "e.png"]
    assert len(found.dropped) == 1
    sentence(found, "instances.json: 2 image files outside of", "the first:", "elsewhere/c.png; used all the same")


# Refusals


def test_a_refusal_quotes_what_explains_it(tmp_path):
    """Not the first sentence, which is about a category, an id or an image that was mended."""
    content = coco_content([(1, 1, 0, 0), (2, 2, 0, 0)])
    content["annotations"][1]["id"] = content["annotations"][0]["id"]
    content["categories"] = [{"id": 1, "name": "x"}, *(each | {"supercategory": "x"} for each in content["categories"])]
    message = r"none of its 2 usable images has a box to train on; 4 left out or mended, the first: .*no area; object"
    with pytest.raises(ValueError, match=message):
        read_coco(*write_coco(tmp_path, content))
    content["annotations"] = content["annotations"][:1]
    for image in content["images"]:
        image["file_name"] = "gone.png"
    with pytest.raises(ValueError, match=r"none of its 0 usable images .* the first: .*gone\.png: no such file; image"):
        read_coco(*write_coco(tmp_path, content))
    content = coco_content([(1, 1, 5, 5)])
    content["annotations"][0]["iscrowd"] = 1
    with pytest.raises(
        ValueError, match="none of its 2 usable images has a box to train on; 1 object difficult or crowd"
    ):
        read_coco(*write_coco(tmp_path, content))
    content["annotations"][0] |= {"category_id": 5, "iscrowd": 0}
    with pytest.raises(
        ValueError, match=r"the first: .*: 1 object of category 'dog' left out, not among the classes cat"
    ):
        read_coco(*write_coco(tmp_path, content), ["cat"])
