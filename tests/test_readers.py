"""Readers of VOC, COCO, CSV and YOLO: what they take, what they leave out, the sentence about it; and recognition."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from fake_data import HEIGHT, WIDTH, coco_content, sentence, voc_object, write_coco, write_image, write_voc, write_yolo

from detection.config.schema import Data
from detection.data import read_coco, read_split, read_voc
from detection.data.csv_files import read_csv
from detection.data.layouts import recognise
from detection.data.yolo import read_yolo

# --- VOC ------------------------------------------------------------------------------------------------------------


def test_voc_boxes_labels_and_difficult(tmp_path):
    objects = [voc_object("dog", (1, 1, 40, 30)), voc_object("cat", (5, 6, 9, 8), difficult=1)]
    found = read_voc(write_voc(tmp_path, {"one": objects, "two": []}), ["VOC/train"])
    assert found.categories == ("cat", "dog") and found.category_ids == (1, 2) and found.dropped == ()
    one, two = found.records
    assert one.boxes.dtype == np.float32 and one.labels.dtype == np.int64
    assert one.boxes.tolist() == [[0, 0, 40, 30], [4, 5, 9, 8]]
    assert one.labels.tolist() == [2, 1] and one.ignore.tolist() == [False, True] and one.area.tolist() == [1200, 15]
    assert (two.boxes.shape, two.labels.shape, two.image_id) == ((0, 4), (0,), 2)


def test_voc_joins_splits_with_stable_ids(tmp_path):
    write_voc(tmp_path, {"b": [voc_object()], "gone": [], "a": []}, "VOC2007/train")
    write_voc(tmp_path, {"b": [voc_object()]}, "VOC2012/train")
    (tmp_path / "VOC2007/JPEGImages/gone.jpg").unlink()
    found = read_voc(tmp_path, ["VOC2007/train", "VOC2012/train", "VOC2007/train"])
    assert [(r.image_id, r.path.parent.parent.name, r.path.stem) for r in found.records] == [
        (1, "VOC2007", "b"),
        (3, "VOC2007", "a"),
        (4, "VOC2012", "b"),
    ]
    sentence(found, "gone.jpg: no such image")
    assert "train.txt: a is listed already" in sentence(found, "a is listed already")


@pytest.mark.attempt("mutated annotations")
def test_voc_zero_area_boxes_are_named(tmp_path):
    objects = [voc_object(), voc_object("cat", (7, 3, 7, 9)), voc_object("cat", (7, 9, 8, 4))]
    found = read_voc(write_voc(tmp_path, {"one": objects}), ["VOC/train"])
    assert len(found.records[0].boxes) == 1 and len(found.dropped) == 2
    sentence(found, "one.xml", "object 2 (cat)", "[7, 3, 7, 9]", "no area")
    sentence(found, "one.xml", "object 3 (cat)", "[7, 9, 8, 4]", "no area")


@pytest.mark.attempt("mutated annotations")
def test_voc_boxes_off_the_image(tmp_path):
    objects = [
        voc_object("cat", (0, 0, 41, 31)),
        voc_object("cat", (-3, 5, 10, 20)),
        voc_object("cat", (50, 5, 60, 20)),
    ]
    found = read_voc(write_voc(tmp_path, {"one": objects}), ["VOC/train"])
    assert found.records[0].boxes.tolist() == [[0, 0, 40, 30], [0, 4, 10, 20]]
    assert len(found.dropped) == 2
    assert sentence(found, "one.xml", "object 2", "[-3, 5, 10, 20]", "40x30").endswith("clipped")
    assert sentence(found, "one.xml", "object 3", "lies outside of the 40x30 image").endswith("left out")


@pytest.mark.parametrize("bad", ["nan", "inf", "twelve", "", None])
@pytest.mark.attempt("mutated annotations")
def test_voc_bad_coordinate_costs_only_its_box(tmp_path, bad):
    objects = [voc_object(), voc_object("cat", (bad, 2, 9, 9))]
    found = read_voc(write_voc(tmp_path, {"one": objects}), ["VOC/train"])
    assert len(found.records[0].boxes) == 1
    sentence(found, "one.xml", "object 2 (cat)", "not four finite numbers")


@pytest.mark.attempt("mutated annotations")
def test_voc_bad_files_cost_only_their_image(tmp_path):
    write_voc(tmp_path, {"good": [voc_object()], "broken": "<annotation><obj", "noxml": [], "noimage": []})
    (tmp_path / "VOC/Annotations/noxml.xml").unlink()
    (tmp_path / "VOC/JPEGImages/noimage.jpg").unlink()
    found = read_voc(tmp_path, ["VOC/train"])
    assert [r.path.stem for r in found.records] == ["good"] and len(found.dropped) == 3
    sentence(found, "broken.xml", "not an XML file")
    sentence(found, "noxml.xml", "no such file")
    sentence(found, "noimage.jpg", "no such image")


def test_voc_finds_images_under_other_names(tmp_path):
    text = "<annotation><filename>{}</filename>" + voc_object() + "</annotation>"
    write_voc(tmp_path, {"one": text.format("other.png"), "two": text.format("missing.jpg")})
    folder = tmp_path / "VOC/JPEGImages"
    (folder / "one.jpg").unlink()
    (folder / "two.jpg").rename(folder / "two.jpeg")
    write_image(folder / "other.png", 20, 10)
    found = read_voc(tmp_path, ["VOC/train"])
    assert [r.path.name for r in found.records] == ["other.png", "two.jpeg"]
    # Neither XML has a size: the headers have.
    assert [(r.width, r.height) for r in found.records] == [(20, 10), (WIDTH, HEIGHT)]


@pytest.mark.attempt("mutated annotations")
def test_voc_size_zero_is_read_from_the_image(tmp_path):
    write_voc(tmp_path, {"one": [voc_object()], "two": []}, size=(0, 0))
    (tmp_path / "VOC/JPEGImages/two.jpg").write_bytes(b"no image")
    found = read_voc(tmp_path, ["VOC/train"])
    assert [(r.width, r.height) for r in found.records] == [(WIDTH, HEIGHT)]
    sentence(found, "two.xml", "no image size")


def test_voc_given_classes_set_the_order_and_the_limits(tmp_path):
    objects = [voc_object("dog"), voc_object("cat"), voc_object("cow")]
    root = write_voc(tmp_path, {"one": objects})
    found = read_voc(root, ["VOC/train"], ["dog", "cat"])
    assert found.categories == ("dog", "cat") and found.records[0].labels.tolist() == [1, 2]
    assert "allowed: dog, cat" in sentence(found, "one.xml", "object 3", "'cow'")
    with pytest.raises(ValueError, match="'dog' is given twice"):
        read_voc(root, ["VOC/train"], ["dog", "dog"])
    assert read_voc(root, ["VOC/train"], ["dog", "zebra"]).categories == ("dog", "zebra")  # none in this split
    for misspelt in ("cats", "Cow"):
        with pytest.raises(ValueError, match=f"no object of class '{misspelt}'; did you mean '{misspelt.lower()[:3]}'"):
            read_voc(root, ["VOC/train"], ["dog", misspelt])


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("", "the folder with the VOC data"),
        ("VOC/JPEGImages", "the images of split 'VOC/train'"),
        ("VOC/Annotations", "the XML files of split 'VOC/train'"),
        ("VOC/ImageSets/Main/train.txt", "the image names of split 'VOC/train'"),
    ],
)
def test_voc_missing_paths(tmp_path, missing, expected):
    root = write_voc(tmp_path / "data", {"one": [voc_object()]})
    (root / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError) as caught:
        read_voc(root, ["VOC/train"])
    assert str(root / missing) in str(caught.value) and expected in str(caught.value)


def test_voc_nothing_to_train_on(tmp_path):
    root = write_voc(tmp_path, {"one": [voc_object("cat", (3, 3, 3, 3))], "two": [voc_object(difficult=1)]})
    with pytest.raises(ValueError, match=r"none of its 2 usable images.*1 left out.*the first: .*one\.xml"):
        read_voc(root, ["VOC/train"])
    with pytest.raises(ValueError, match="nothing was left out"):
        read_voc(write_voc(tmp_path, {"three": []}, "VOC/empty"), ["VOC/empty"])


# --- COCO -----------------------------------------------------------------------------------------------------------


def test_coco_sparse_ids_crowd_and_empty_images(tmp_path):
    content = coco_content([(1.5, 2, 10, 8), (0, 0, 40, 30)])
    content["annotations"][1] |= {"category_id": 5, "iscrowd": 1, "segmentation": {"counts": [1], "size": [1, 1]}}
    found = read_coco(*write_coco(tmp_path, content))
    assert found.categories == ("cat", "dog") and found.category_ids == (18, 5) and found.dropped == ()
    one, two = found.records
    assert (one.image_id, two.image_id, len(two.boxes)) == (7, 3, 0)
    assert one.boxes.tolist() == [[1.5, 2, 11.5, 10], [0, 0, 40, 30]]
    assert one.labels.tolist() == [1, 2] and one.ignore.tolist() == [False, True] and one.area.tolist() == [33.25] * 2


@pytest.mark.attempt("mutated annotations")
def test_coco_area_and_crowd_may_be_missing(tmp_path):
    content = coco_content()
    del content["annotations"][0]["area"], content["annotations"][0]["iscrowd"]
    record = read_coco(*write_coco(tmp_path, content)).records[0]
    assert record.area.tolist() == [80] and record.ignore.tolist() == [False]


def test_coco_classes_select_and_order(tmp_path):
    content = coco_content([(1, 2, 10, 8)] * 4)
    content["annotations"][0]["category_id"] = 5
    files = write_coco(tmp_path, content)
    found = read_coco(*files, ["dog"])
    assert found.category_ids == (5,) and found.records[0].labels.tolist() == [1]
    assert found.dropped == (sentence(found, "instances.json", "3 objects of category 'cat'", "dog"),)
    assert read_coco(*files, ["dog", "cat"]).records[0].labels.tolist() == [1, 2, 2, 2]
    with pytest.raises(ValueError, match=r"instances\.json: no class 'dgo'; did you mean 'dog'\? \(allowed: cat, dog"):
        read_coco(*files, ["dgo"])


@pytest.mark.attempt("mutated annotations")
def test_coco_boxes_off_the_image(tmp_path):
    boxes = [(1, 2, 3, 4), (-0.5, 2, 10, 8), (35, 2, 10, 8), (45, 2, 3, 3), (1, 1, 0, 5), (5, 5, -2, 3)]
    found = read_coco(*write_coco(tmp_path, coco_content(boxes)))
    assert found.records[0].boxes.tolist() == [[1, 2, 4, 6], [0, 2, 9.5, 10], [35, 2, 40, 10]]
    assert len(found.dropped) == 4
    sentence(found, "instances.json", "annotation 13 of a.png", "[35, 2, 10, 8]", "clipped")
    sentence(found, "annotation 14 of a.png", "lies outside")
    sentence(found, "annotation 15 of a.png", "no area")
    sentence(found, "annotation 16 of a.png", "no area")


@pytest.mark.attempt("mutated annotations")
def test_box_that_vanishes_in_float32_is_left_out(tmp_path):
    found = read_coco(*write_coco(tmp_path, coco_content([(1, 2, 3, 4), (30, 2, 1e-9, 5)])))
    assert len(found.records[0].boxes) == 1 and len(found.dropped) == 1


@pytest.mark.parametrize(
    "box", [[float("nan"), 1, 2, 3], [1, 2, float("inf"), 3], [1, 2, 3], "1234", None, ["a", 1, 2, 3]]
)
@pytest.mark.attempt("mutated annotations")
def test_coco_bad_box_costs_only_itself(tmp_path, box):
    content = coco_content([(1, 2, 3, 4), (1, 2, 3, 4)])
    content["annotations"][1]["bbox"] = box
    found = read_coco(*write_coco(tmp_path, content))
    assert len(found.records[0].boxes) == 1
    sentence(found, "instances.json", "annotation 12 of a.png", "not four finite numbers")


@pytest.mark.attempt("mutated annotations")
def test_coco_bad_entries_are_left_out(tmp_path):
    content = coco_content([(1, 2, 3, 4)] * 6)
    notes = content["annotations"]
    notes[1]["id"] = 11
    notes[2]["image_id"] = 99
    notes[3]["category_id"] = 6
    del notes[4]["bbox"]
    notes[5] = "text"
    content["images"] += [
        {"id": 7, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
        {"id": 8, "file_name": "gone.png", "width": WIDTH, "height": HEIGHT},
        {"id": 9, "file_name": "b.png", "width": 0, "height": HEIGHT},
        {"id": 10, "file_name": "b.png", "width": WIDTH},
        {"id": [10], "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
    ]
    found = read_coco(*write_coco(tmp_path, content))
    assert [r.image_id for r in found.records] == [7, 3] and len(found.records[0].boxes) == 1
    assert len(found.dropped) == 10 and all(str(tmp_path) in text for text in found.dropped)
    sentence(found, "annotation 11 occurs a second time")
    sentence(found, "annotation 13 belongs to image 99")
    sentence(found, "annotation 14 has category 6 (allowed: 18, 5)")
    sentence(found, "annotation at position 4 has no 'bbox'")
    sentence(found, "annotation at position 5 is str")
    sentence(found, "image id 7 of b.png is taken already")
    sentence(found, "gone.png: no such file")
    sentence(found, "image 9 (b.png)", "0x30")
    sentence(found, "image at position 5 has no 'height'")
    sentence(found, "image at position 6 has 'id' [10], expected int or text")


@pytest.mark.attempt("mutated annotations")
def test_coco_bad_files(tmp_path):
    for text, problem in (
        ("<xml/>", "not a JSON file"),
        ("[]", "no list 'images'"),
        ('{"images": [], "annotations": []}', "no list 'categories'"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "category at position 0 has no 'name'"),
    ):
        with pytest.raises(ValueError, match=problem) as caught:
            read_coco(*write_coco(tmp_path, text))
        assert "instances.json" in str(caught.value)
    file, images = write_coco(tmp_path, coco_content())
    with pytest.raises(FileNotFoundError, match=r"other\.json: no such file; expected a COCO instances JSON file"):
        read_coco(tmp_path / "other.json", images)
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; expected the images of instances\.json"):
        read_coco(file, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"instances\.json: none of its 2 usable images.*no area"):
        read_coco(*write_coco(tmp_path, coco_content([(1, 1, 0, 0)])))


# --- CSV ------------------------------------------------------------------------------------------------------------


def test_csv_value_of_a_column_that_is_not_there(tmp_path):
    write_image(tmp_path / "a.png")
    file = tmp_path / "all.csv"
    file.write_text("filename,class,x,y,w,h\na.png,cat,1,2,3,4\n")
    assert len(read_csv(file, "train").records) == 1
    with pytest.raises(ValueError, match=r"all\.csv: its header has no column split, of which 'val' would be a value"):
        read_csv(file, "val", value="val")


def test_csv_image_without_a_row_beside_a_column_split(tmp_path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"{name}.png")
    file = tmp_path / "all.csv"
    file.write_text("filename,class,x,y,w,h,split\na.png,cat,1,2,3,4,train\nx/b.png,cat,1,2,3,4,val\n")
    found = read_csv(file, "train")
    assert [record.path.name for record in found.records] == ["a.png"] and len(found.dropped) == 1
    assert "1 image of" in (told := sentence(found, "c.png")) and told.endswith("not used")


def test_csv_short_row_of_a_wide_file_is_as_with_empty_cells(tmp_path):
    write_image(tmp_path / "a.png")
    wide = "".join(f"note{number}," for number in range(100))
    file = tmp_path / "all.csv"
    file.write_text(f"{wide}filename,class,x,y,w,h\n{',' * 100}a.png,cat,1,2,3,4\n1,2\n")
    found = read_csv(file, "train")
    assert [record.boxes.tolist() for record in found.records] == [[[1, 2, 4, 6]]]
    sentence(found, "line 3 names no image; nothing to read in it")


def test_csv_images_without_a_row_are_told(tmp_path):
    for name in "abc":
        write_image(tmp_path / f"{name}.png")
    file = tmp_path / "all.csv"
    file.write_text("filename,class,x,y,w,h\na.png,cat,1,2,3,4\n")
    found = read_csv(file, "train")
    assert [len(record.boxes) for record in found.records] == [1, 0, 0] and len(found.dropped) == 1
    told = sentence(found, f"all.csv: 2 images of {tmp_path} without a row in it, the first: {tmp_path}/b.png; ")
    assert told.endswith("taken for images without objects")


# --- YOLO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("[yes, no]", ("yes", "no")),
        ("[010, 12:30, 1.10, null, 2020-01-01, 'on']", ("010", "12:30", "1.10", "null", "2020-01-01", "on")),
        ("{1: off, 0: 0x1F}", ("0x1F", "off")),
        ("\n  0: y\n  1: 1e3", ("y", "1e3")),
    ],
)
def test_yolo_names_are_text_as_it_is_written(tmp_path, written, names):
    root = write_yolo(tmp_path, f"train: images\nnc: {len(names)}\nnames: {written}\n", "images/a")
    found = read_yolo(root, "train")
    assert found.categories == names and found.dropped == ()


@pytest.mark.parametrize(("val", "told"), [("images/b", 1), ("images", 0), ("", 0)])
def test_yolo_val_that_is_not_read_is_told(tmp_path, val, told):
    root = write_yolo(tmp_path, f"train: images\nval: {val}\nnames: [cat]\n", "images/a", "images/b/b")
    found = read_split(Data(format="yolo", root=root, val_fraction=0.5), "train").annotations
    assert sum("its val is not read, since data.val_fraction is 0.5" in text for text in found.dropped) == told


def test_yolo_name_that_is_empty(tmp_path):
    root = write_yolo(tmp_path, "train: images\nnames:\n  - cat\n  -\n", "images/a")
    with pytest.raises(ValueError, match=r"data\.yaml: names: expected a list of names"):
        read_yolo(root, "train")


@pytest.mark.parametrize("lines", ["data/obj_train_data/{}.jpg", "obj_train_data/{}.jpg", "../obj_train_data/{}.jpg"])
def test_yolo_list_with_a_folder_in_front_that_is_not_there(tmp_path, lines):
    write_yolo(tmp_path, "", "obj_train_data/a", "obj_train_data/b")
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "obj.names").write_text("cat\n")
    (tmp_path / "train.txt").write_text("".join(f"{lines.format(name)}\n" for name in "ab"))
    (layout,) = recognise(tmp_path)
    found = read_split(Data(**layout.values | {"val_fraction": 0}), "train").annotations
    assert [record.path.name for record in found.records] == ["a.jpg", "b.jpg"] and found.dropped == ()


def test_yolo_images_that_are_not_there_are_not_said_to_lack_labels(tmp_path):
    write_yolo(tmp_path, "train: train.txt\nnames: [cat]\n", "images/a", "images/b")
    (tmp_path / "train.txt").write_text("elsewhere/a.jpg\nelsewhere/b.jpg\n")
    with pytest.raises(
        ValueError, match=r"0 usable images .*; 2 left out .*elsewhere/a\.jpg: no such file; image left"
    ):
        read_yolo(tmp_path, "train")
    (tmp_path / "train.txt").write_text("elsewhere/a.jpg\nimages/b.jpg\n")
    assert sentence(read_yolo(tmp_path, "train"), "a.jpg").endswith("elsewhere/a.jpg: no such file; image left out")


def test_yolo_label_files_in_capitals(tmp_path):
    write_yolo(tmp_path, "train: train/images\nnames: [cat]\n", "train/images/a", "train/images/b", "train/images/c")
    labels = tmp_path / "train/labels"
    (labels / "a.txt").rename(labels / "a.TXT")
    (labels / "b.txt").rename(labels.parent / "images/b.TXT")
    (labels / "c.txt").rename(labels / "other.TXT")
    (layout,) = recognise(tmp_path)
    assert layout.format == "yolo"
    found = read_yolo(tmp_path, "train")
    assert [len(record.boxes) for record in found.records] == [1, 1, 0] and len(found.dropped) == 2
    sentence(found, "1 image of train without a label file", "c.jpg")
    sentence(found, "other.TXT: no image of its name")


# --- recognition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "said"), [("default", "default"), ("Train", "train")])
@pytest.mark.parametrize("folder", ["", "VOC2012/"])
def test_the_one_list_of_a_devkit_is_for_training(tmp_path, folder, name, said):
    """Among others that list no image by its name alone, as those of single classes."""
    write_voc(tmp_path, {"a": [voc_object()], "b": [voc_object()]}, f"{folder}{name}")
    (tmp_path / f"{folder}ImageSets/Main/cat_{name}.txt").write_text("a 1\nb -1\n")
    (layout,) = recognise(tmp_path)
    assert layout.values["train"] == [f"{folder}{name}"] and layout.values["val_fraction"] == 0.2
    assert layout.saw[0] == f"ImageSets/Main has {said}"
    assert len(read_split(Data(**layout.values), "train")) == 1


@pytest.mark.parametrize("suffix", [".txt", ".TXT"])
def test_lists_of_a_devkit_in_capitals(tmp_path, suffix):
    for name in ("Train", "Validation", "Test"):
        write_voc(tmp_path, {name: [voc_object()]}, name)
        path = tmp_path / f"ImageSets/Main/{name}.txt"
        path.rename(path.with_suffix(suffix))
    (layout,) = recognise(tmp_path)
    assert (layout.values["train"], layout.values["val"], layout.test) == (["Train"], ["Validation"], ("Test",))
    assert len(read_split(Data(**layout.values), "train")) == 1


@pytest.mark.parametrize("beside", ["", "__MACOSX", ".DS_Store"])
def test_a_set_alone_in_the_folder_given(tmp_path, beside):
    inner = tmp_path / "archive/set"
    write_yolo(inner, "train: images\nnames: [cat]\n", "images/a")
    (tmp_path / beside).mkdir(exist_ok=True)
    (layout,) = recognise(tmp_path)
    assert (layout.format, layout.values["root"]) == ("yolo", str(inner))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="not a data set that is recognised: 1 image, but none of"):
        recognise(tmp_path)


def test_lists_of_a_devkit_without_a_known_name_are_told(tmp_path):
    for name in ("one", "two"):
        write_voc(tmp_path, {name: [voc_object()]}, name)
    with pytest.raises(ValueError, match="one, two: no name has the word train; rename them, or write a recipe with"):
        recognise(tmp_path)
    for path in (tmp_path / "ImageSets/Main").iterdir():
        path.write_text("c\n")
    with pytest.raises(ValueError, match=r"\.txt: its first image, 'c', has no annotation; sought were data\.yaml"):
        recognise(tmp_path)


def test_coco_files_by_their_names(tmp_path):
    file, _ = write_coco(tmp_path, coco_content())
    for name in ("trainset", "validset"):
        shutil.copy(file, tmp_path / f"{name}.json")
    file.unlink()
    (layout,) = recognise(tmp_path)
    assert (layout.values["train"], layout.values["val"]) == (["trainset.json"], ["validset.json"])
    for old, new in (("trainset", "one"), ("validset", "two")):
        (tmp_path / f"{old}.json").rename(tmp_path / f"{new}.JSON")
    with pytest.raises(ValueError, match=r"recognised: one\.JSON, two\.JSON: no name has the word train; rename"):
        recognise(tmp_path)


@pytest.mark.parametrize("format", [None, "csv"])
def test_a_header_that_is_not_understood_is_told(tmp_path, format):
    (tmp_path / "all.csv").write_text("filename,x_center,y_center,width,height,class\na.png,1,2,3,4,cat\n")
    with pytest.raises(
        ValueError, match=r"all\.csv: its header has the columns .*'y_center'.*; expected a column file"
    ):
        recognise(tmp_path, format)


def test_classes_without_label_files_are_told(tmp_path):
    write_yolo(tmp_path, "names: [cat]\n")
    with pytest.raises(ValueError, match=r"data\.yaml: it names classes, but no text file has lines of a class"):
        recognise(tmp_path)


@pytest.mark.parametrize("format", ["flat", "mixed", "devkit"])
def test_xml_files_in_capitals(tmp_path, format):
    write_voc(tmp_path, {"a": [voc_object()], "b": [voc_object()]}, "train")
    for path in list((tmp_path / "Annotations").iterdir()):
        path.rename(path.with_suffix(".XML"))
    if format != "devkit":
        shutil.rmtree(tmp_path / "ImageSets")
    if format == "mixed":
        for path in [*(tmp_path / "Annotations").iterdir(), *(tmp_path / "JPEGImages").iterdir()]:
            path.rename(tmp_path / path.name)
        shutil.rmtree(tmp_path / "Annotations")
        shutil.rmtree(tmp_path / "JPEGImages")
    (layout,) = recognise(tmp_path)
    assert layout.format == "voc" and layout.share == 1
    found = read_voc(tmp_path, layout.values["train"])
    assert [len(record.boxes) for record in found.records] == [1, 1] and found.dropped == ()


def test_csv_file_in_capitals(tmp_path):
    (tmp_path / "all.CSV").write_text("filename,class,x,y,w,h\na.png,cat,1,2,3,4\n")
    (layout,) = recognise(tmp_path)
    assert layout.format == "csv" and layout.values["train"] == ["all.CSV"]


# Names of splits, and the folders of their images


def set_file(format, name):
    folder, slash, split = name.rpartition("/")
    return f"{folder}{slash}" + (f"{split}.csv" if format == "csv" else f"coco_{split}.json")


def write_set(root, format, name, number):
    """A set of one file, its images in a folder of that name."""
    files = [f"{index}.jpg" for index in range(number)]
    for file in files:
        write_image(root / name / file, WIDTH, HEIGHT)
    if format == "csv":
        rows = "".join(f"{file},cat,1,2,11,12\n" for file in files)
        (root / set_file(format, name)).write_text(f"filename,class,xmin,ymin,xmax,ymax\n{rows}")
        return
    content = coco_content()
    content["images"] = [
        {"id": at, "file_name": file, "width": WIDTH, "height": HEIGHT} for at, file in enumerate(files)
    ]
    box = {"category_id": content["categories"][0]["id"], "bbox": [1, 2, 10, 10], "area": 100, "iscrowd": 0}
    content["annotations"] = [{"id": at + 1, "image_id": at} | box for at in range(number)]
    (root / set_file(format, name)).write_text(json.dumps(content))


@pytest.mark.parametrize("format", ["csv", "coco"])
@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (("trainval", "test"), "trainval", "test"),
        (("train_val", "test"), "train_val", "test"),
        (("trainval", "val"), "trainval", None),
        (("train", "trainval", "val"), "train", "val"),
        (("train", "val"), "train", "val"),
        (("trainval_2012/train", "trainval_2012/val"), "trainval_2012/train", "trainval_2012/val"),
    ],
)
def test_a_set_of_training_and_validation_is_that_of_training(tmp_path, format, names, train, val):
    for name in names:
        write_set(tmp_path, format, name, 4)  # which number their images alike
    (layout,) = recognise(tmp_path)
    assert layout.values["train"] == [set_file(format, train)] and layout.values["train_images"] == train
    assert layout.values.get("val") == (None if val is None else [set_file(format, val)])
    assert layout.values.get("val_images") == val and ("val_fraction" in layout.values) == (val is None)


def test_the_folder_of_a_coco_files_images_is_that_of_most_of_them(tmp_path):
    write_set(tmp_path, "coco", "pictures", 3)
    path = tmp_path / "coco_pictures.json"
    content = json.loads(path.read_text())
    content["images"].insert(0, content["images"][0] | {"id": 9, "file_name": "gone.jpg"})
    content["info"] = {"a": "x" * 2**21}  # in front of the images, since it comes first by the alphabet
    path.write_text(json.dumps(content, sort_keys=True))
    (layout,) = recognise(tmp_path)
    assert layout.values["train_images"] == "pictures"


def test_rows_of_another_spelling_leave_no_image_as_background(tmp_path):
    write_set(tmp_path, "csv", "all", 4)
    path = tmp_path / "all.csv"
    path.write_text(path.read_text().replace("3.jpg", "3.JPG"))
    (layout,) = recognise(tmp_path)
    found = read_split(Data(**layout.values | {"val_fraction": 0}), "train").annotations
    assert sorted(record.path.name for record in found.records) == ["0.jpg", "1.jpg", "2.jpg"]
    sentence(found, "1 image of")
    sentence(found, "not used")


def test_rows_with_paths_of_another_computer(tmp_path):
    write_set(tmp_path, "csv", "images", 3)
    path = (tmp_path / "images.csv").rename(tmp_path / "all.csv")
    path.write_text(path.read_text().replace("\n", "\nC:\\data\\", 3))
    (layout,) = recognise(tmp_path)
    assert layout.values["train_images"] == "images"
    assert [
        len(each.boxes) for each in read_split(Data(**layout.values | {"val_fraction": 0}), "train").annotations.records
    ] == [1, 1, 1]


def test_an_object_of_two_descriptions_of_an_image_is_there_once(tmp_path):
    write_set(tmp_path, "coco", "all", 1)
    path = tmp_path / "coco_all.json"
    content = json.loads(path.read_text())
    content["images"].append(content["images"][0] | {"id": 7})
    (box,) = content["annotations"]
    content["annotations"] += [box | {"id": 2, "image_id": 7}, box | {"id": 3, "image_id": 7, "bbox": [5, 6, 7, 8]}]
    path.write_text(json.dumps(content))
    (record,) = read_coco(path, tmp_path / "all").records
    assert record.boxes.tolist() == [[1, 2, 11, 12], [5, 6, 12, 14]] and len(record.labels) == len(record.ignore) == 2


def test_labels_beside_images_of_a_relative_folder(tmp_path, monkeypatch):
    for part, index in (("sub/images/train", 0), ("images/extra", 1)):
        write_image(tmp_path / "set" / part / f"{index}.jpg", WIDTH, HEIGHT)
        label = tmp_path / "set" / part.replace("images", "labels") / f"{index}.txt"
        label.parent.mkdir(parents=True)
        label.write_text("0 0.5 0.5 0.25 0.25\n")
    (tmp_path / "set" / "data.yaml").write_text("path: sub\ntrain: [images/train, images/extra]\nnames: [cat]\n")
    monkeypatch.chdir(tmp_path)
    for root in ("set", tmp_path / "set"):
        data = Data(format="yolo", root=root, train=["images/train", "images/extra"])
        assert [len(record.boxes) for record in read_split(data, "train").annotations.records] == [1, 1]
