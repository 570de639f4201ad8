"""VOC, COCO, YOLO and CSV files changed at random: every object that stands in them is used, or a sentence names it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from xml.dom import minidom

import pytest
from fake_data import HEIGHT, WIDTH, write_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detection.config.schema import Data
from detection.data.formats import read_split
from detection.data.report import report

FIXED = settings(
    max_examples=120,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LEFT_OUT = re.compile(r"(?:^|; )(?:(an )?object|(\d+) objects) left out$|; image left out with (\d+) objects?$")
OF_A_CATEGORY = re.compile(r": (\d+) objects? of category .* left out, not among the classes ")


def named(sentences: tuple[str, ...]) -> int:
    """The objects that the sentences count as left out; each is one line without commands to a terminal."""
    number = 0
    for sentence in sentences:
        assert sentence.isprintable() and len(sentence) < 2000, sentence
        if match := LEFT_OUT.search(sentence):
            number += int(match[2] or match[3] or 1)
        elif match := OF_A_CATEGORY.search(sentence):
            number += int(match[1])
    return number


def used(data: Data, classes: list[str]) -> tuple[int, tuple[str, ...]]:
    """The objects that a data set has after it was read, as `check-data` counts them, and its sentences."""
    annotations = read_split(data, "train", classes).annotations
    found = report(annotations)
    for record in annotations.records:
        x1, y1, x2, y2 = record.boxes.T
        assert ((x1 >= 0) & (x1 < x2) & (x2 <= record.width) & (y1 >= 0) & (y1 < y2) & (y2 <= record.height)).all()
    return sum(entry.num_objects for entry in found.classes), annotations.dropped


# COCO


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    for name in "abc":
        write_image(root / "images" / f"{name}.png")
    (root / "images" / "damaged.png").write_bytes((root / "images" / "a.png").read_bytes()[:300])
    return root


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


odd_numbers = [0, 1, 2, 3, -1, 5, 9, 7.0, 2.5, 1e9, 1e308, float("nan"), float("inf"), 2**63, 10**400, True, False]
odd_texts = ["", "1", "2", "a.png", "b.png", "../a.png", "damaged.png", "gone.png", "\ud800", "a\0b", "\x1b[31m", "猫"]
scalars = st.none() | st.sampled_from(odd_numbers) | st.sampled_from(odd_texts)
values = scalars | st.lists(scalars, max_size=5) | st.dictionaries(st.sampled_from("ab"), scalars) | st.just(deep(200))
numbers = st.sampled_from([0, 1, 2.5, 4, 8, 12, 39, 50, -3, 1e9, "6", "x", None, True, float("nan")])
KEYS = {
    "images": ["id", "file_name", "width", "height"],
    "annotations": ["id", "image_id", "category_id", "bbox", "area", "iscrowd"],
    "categories": ["id", "name", "supercategory"],
}


@st.composite
def coco_files(draw: st.DrawFn) -> dict:
    """A file whose first image and annotation are whole; others are changed, left out, or in it several times."""
    size = {"width": WIDTH, "height": HEIGHT}
    content = {
        "images": [{"id": i + 1, "file_name": f"{'abc'[i]}.png", **size} for i in range(3)],
        "annotations": [
            {"id": i + 1, "image_id": i % 3 + 1, "category_id": 5 + i % 2, "bbox": [1 + i, 2, 10, 8]} for i in range(6)
        ],
        "categories": [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}, {"id": 7, "name": "cow"}],
    }
    for _ in range(draw(st.integers(0, 6))):
        part = draw(st.sampled_from(["annotations"] * 3 + ["images"] * 2 + ["categories"]))
        entries = content[part]
        index = draw(st.integers(1, len(entries) - 1))
        match draw(st.sampled_from(["change", "change", "box", "lack", "copy", "replace"])):
            case "change" if isinstance(entries[index], dict):
                entries[index][draw(st.sampled_from(KEYS[part]))] = copy.deepcopy(draw(values))
            case "box" if part == "annotations" and isinstance(entries[index], dict):
                entries[index]["bbox"] = draw(st.lists(numbers, min_size=4, max_size=4))
            case "lack" if isinstance(entries[index], dict):
                entries[index].pop(draw(st.sampled_from(KEYS[part])), None)
            case "copy":
                entries.append(copy.deepcopy(entries[index]))
            case "replace" if part != "categories":
                entries[index] = copy.deepcopy(draw(values))
    return content


def is_a_category(item: dict) -> bool:
    whole = isinstance(item.get("id"), int | float) and not isinstance(item.get("id"), bool)
    try:
        return whole and int(item["id"]) == item["id"] and b"\0" not in item["name"].encode()
    except (KeyError, AttributeError, ValueError, OverflowError):  # ValueError: half of a character, no number
        return False


@FIXED
@given(
    content=coco_files(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"]),
    classes=st.sampled_from([[], ["cat", "dog"], ["dog", "cow", "cat"]]),
)
def test_every_object_of_a_coco_file_is_used_or_named(images, attempt, content, encoding, classes):
    (images / "all.json").write_bytes(json.dumps(content).encode(encoding))
    data = Data(format="coco", root=images, train=["all.json"], train_images="images", verify="full")
    kinds = content["categories"]
    good = all(map(is_a_category, kinds)) and set(classes) <= {item["name"] for item in kinds}
    good = good and all(len({item[key] for item in kinds}) == len(kinds) for key in ("id", "name"))
    with attempt("mutated annotations"):
        if not good:  # who knows then which object is of which class
            with pytest.raises(ValueError, match=r"all\.json: (category at position|no class) "):
                read_split(data, "train", classes)
            return
        number, sentences = used(data, classes)
        assert number >= 1 and number + named(sentences) == len(content["annotations"])


# VOC

CORNERS = ("xmin", "ymin", "xmax", "ymax")


@st.composite
def voc_files(draw: st.DrawFn, letters: str) -> str:
    """The text of an annotation file, without a declaration."""
    write = draw(st.sampled_from([str, str, str.upper, str.title]))  # names of elements
    corners = st.sampled_from(["1", "5", "12.5", " 20 ", "41", "-3", "1e3", "nan", "inf", "", "x", "<v>3</v>"])

    def element(name: str, content: str) -> str:
        return f"<{prefix}{write(name)}>{content}</{prefix}{write(name)}>"

    def box() -> str:
        return element("bndbox", "".join(element(name, draw(corners)) for name in draw(st.permutations(CORNERS))))

    def thing(levels: int) -> str:
        parts = [box() for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2])))]
        parts += [element("name", draw(st.sampled_from(["cat", "dog", " cat ", "Cat", "cow", "", letters])))] * draw(
            st.sampled_from([0, 1, 1, 1])
        )
        parts += [element("difficult", draw(st.sampled_from(["0", "1", "true", "?"])))] * draw(st.integers(0, 1))
        if levels:
            parts += [element("part", element("name", "head") + box())] * draw(st.integers(0, 1))
            parts += [thing(levels - 1)] * draw(st.sampled_from([0, 0, 0, 1]))
        return element("object", "".join(draw(st.permutations(parts))))

    prefix = draw(st.sampled_from(["", "", "v:"]))
    size = element("size", element("width", str(WIDTH)) + element("height", draw(st.sampled_from(["30", "31", "x"]))))
    things = "".join(thing(1) for _ in range(draw(st.integers(0, 4))))
    for _ in range(draw(st.sampled_from([0, 0, 1, 200]))):
        things = element("objects", things)
    head = element("filename", draw(st.sampled_from(["", "one.jpg", "gone.jpg", "damaged.png"])))
    content = "".join(draw(st.permutations([head, size, things, element("remark", letters)])))
    name = f"{prefix}{write('annotation')}"
    space = f' xmlns{":v" if prefix else ""}="urn:{draw(st.integers(0, 9))}"' if prefix or draw(st.booleans()) else ""
    end = draw(st.sampled_from([f"</{name}>"] * 6 + ["", "</wrong>", "&unknown;"]))
    return f"<{name}{space}>{content}{end}"


LETTERS = {"utf-8": "猫", "utf-16": "猫", "gbk": "猫", "windows-1252": "ö", "iso-8859-1": "ö", "shift_jis": "ネコ"}


@st.composite
def encoded_voc_files(draw: st.DrawFn) -> tuple[bytes, int | None]:
    """A file, and how many objects stand in it by another parser; None where it is no XML."""
    encoding = draw(st.sampled_from(list(LETTERS)))
    text = draw(voc_files(LETTERS[encoding]))
    declared = encoding if draw(st.integers(0, 5)) else ""
    whole = f'<?xml version="1.0" encoding="{declared}"?>\n{text}' if declared else text
    content = whole.encode(encoding)
    try:
        tree = minidom.parseString(text.encode() if declared else content)
    except Exception:  # of expat, for bytes that are no letters, too
        return content, None
    elements = [each for each in tree.getElementsByTagName("*") if each.localName.lower() == "object"]
    inside = [[child.localName and child.localName.lower() for child in each.childNodes] for each in elements]
    return content, sum(max(1, names.count("bndbox")) for names in inside)


ANCHOR = "<annotation><object><name>cat</name><bndbox>{}</bndbox></object></annotation>".format(
    "".join(f"<{name}>{value}</{name}>" for name, value in zip(CORNERS, (1, 1, 10, 10), strict=True))
)


@FIXED
@given(
    files=st.lists(encoded_voc_files(), min_size=1, max_size=3),
    missing=st.sampled_from([None, None, None, "one", "two", "three"]),
    listing=st.sampled_from([("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-16", "\r\n"), ("latin-1", "\n")]),
    twice=st.booleans(),
    classes=st.sampled_from([[], ["cat"], ["dog", "cat"]]),
)
def test_every_object_of_voc_files_is_used_or_named(voc, attempt, files, missing, listing, twice, classes):
    names = ["one", "two", "three"][: len(files)]
    expected, unread = 1, []
    for name, (content, number) in zip(names, files, strict=True):
        (voc / "VOC/Annotations" / f"{name}.xml").write_bytes(content)
        expected += number or 0
        unread += [name] * (number is None)
    for name in ("one", "two", "three"):
        image = voc / "VOC/JPEGImages" / f"{name}.jpg"
        image.unlink(missing_ok=True)
        if name != missing:
            image.hardlink_to(voc / "VOC/JPEGImages/öl.jpg")
    encoding, end = listing
    text = end.join(["öl", *names, *(names if twice else [])])
    (voc / "VOC/ImageSets/Main/train.txt").write_bytes(text.encode(encoding))
    data = Data(format="voc", root=voc, train=["VOC/train"], verify="full")
    with attempt("mutated annotations"):
        number, sentences = used(data, classes)
        assert number >= 1 and number + named(sentences) == expected
        said = [name for name in names for each in sentences if f"/{name}.xml: not an XML file: " in each]
        assert said == unread


@pytest.fixture(scope="module")
def voc(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / "VOC" / folder).mkdir(parents=True)
    (root / "VOC/Annotations/öl.xml").write_text(ANCHOR)
    write_image(root / "VOC/JPEGImages/öl.jpg")
    (root / "VOC/JPEGImages/damaged.png").write_bytes(b"\x89PNG")
    return root


# YOLO and CSV

tokens = st.sampled_from(
    ["0", "1", "2", "1.0", "-1", "7", "1e400", "nan", "x", "", ".25", ".5", "0.125", "2", "\x1b", "猫"]
)
encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])


@FIXED
@given(
    lines=st.lists(st.lists(tokens, max_size=9).map(" ".join), max_size=8),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    encoding=encodings,
    classes=st.sampled_from([[], ["cat"], ["dog", "cat"]]),
)
def test_every_object_of_label_files_is_used_or_named(yolo, attempt, lines, end, encoding, classes):
    (yolo / "labels/b.txt").write_bytes(end.join(lines).encode(encoding))
    (yolo / "labels/gone.txt").write_bytes(end.join(lines).encode(encoding))  # without an image
    (yolo / "labels/damaged.txt").write_bytes(end.join(lines).encode(encoding))
    data = Data(format="yolo", root=yolo, verify="full")
    with attempt("mutated annotations"):
        number, sentences = used(data, classes)
        damaged = sum("/damaged.png: " in each for each in sentences)
        assert damaged == 1
        whole = sum(bool(line.split()) for line in "\n".join(lines).splitlines())
        lost = sum(f"/{name}.txt: line " in each for each in sentences for name in ("b", "damaged"))
        assert number >= 1 and lost <= 2 * whole
        assert number + named(sentences) == 1 + 3 * whole


@pytest.fixture(scope="module")
def yolo(images, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    (root / "labels").mkdir()
    for name in ("a", "b", "damaged"):
        (root / "images").mkdir(exist_ok=True)
        (root / f"images/{name}.png").write_bytes((images / f"images/{name}.png").read_bytes())
    (root / "labels/a.txt").write_text("0 .5 .5 .25 .25")
    (root / "data.yaml").write_text("names: {0: cat, 1: dog, 2: cow}\ntrain: images\n")
    return root


cells = st.sampled_from(["", "1", "5", "12.5", " 20 ", "41", "-3", "1e3", "nan", "inf", "x", "1e999", "\x1b[31m"])
names = st.sampled_from(["images/a.png", "images/b.png", "gone.png", "images/damaged.png", "images\\\\a.png", "", "\0"])
kinds = st.sampled_from(["cat", "dog", "cow", " cat ", "", "猫"])


@FIXED
@given(
    rows=st.lists(st.tuples(names, cells, cells, cells, cells, kinds), max_size=8),
    encoding=encodings,
    delimiter=st.sampled_from([",", ";", "\t"]),
    classes=st.sampled_from([[], ["cat"], ["dog", "cat"]]),
)
def test_every_row_of_a_csv_file_is_used_or_named(images, attempt, rows, encoding, delimiter, classes):
    table = [("filename", "xmin", "ymin", "xmax", "ymax", "class"), ("images/a.png", "1", "1", "9", "9", "cat"), *rows]
    (images / "rows.csv").write_bytes("\n".join(map(delimiter.join, table)).encode(encoding))
    data = Data(format="csv", root=images, train=["rows.csv"], verify="full")
    with attempt("mutated annotations"):
        number, sentences = used(data, classes)
        boxes = sum(any(cell.strip() for cell in row[1:5]) for row in table[1:])
        assert number >= 1 and number + named(sentences) == boxes
