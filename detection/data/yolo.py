"""YOLO folders: data.yaml with the names, and a text file of boxes or polygons for each image -> `Annotations`."""

from __future__ import annotations

import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

from detection.config.yaml_files import read_yaml
from detection.data.image_files import examine_image, is_image, stored_size, visible_files
from detection.data.records import (
    NUM_THREADS,
    Annotations,
    RawObject,
    Record,
    Verify,
    build_annotations,
    build_record,
    check_classes,
    few,
    finite_number,
    image_left_out,
    others_left_out,
    outside_of,
    require_folder,
)
from detection.files import read_text, require_size
from detection.text import plural

NAME_LISTS = ("classes.txt", "obj.names", "_darknet.labels")  # a name per line, where there is no data.yaml
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
NOT_LABELS = {*NAME_LISTS, "notes.txt", "readme.txt", "readme.dataset.txt", "readme.roboflow.txt"}
NOT_LABELS |= {f"{name}.txt" for names in SPLITS.values() for name in names}
MAX_LABELS = 64 * 2**20  # bytes of a label file


class YoloSet(NamedTuple):
    """The content of a data.yaml, or of a list of names.

    Attributes:
        source: that file.
        names: of the classes, by their numbers in label files.
        base: folder that paths start from.
        splits: folders and list files by "train", "val" and "test", as far as they are named.
        num_keypoints: numbers behind a box that are no part of it.
    """

    source: Path
    names: dict[int, str]
    base: Path
    splits: dict[str, list[str]]
    num_keypoints: int = 0


class _Reading(NamedTuple):
    """A pass over label files: the set, the label of each class to keep, objects of others, and sentences."""

    set: YoloSet
    labels: dict[str, int]
    others: Counter[str]
    dropped: list[str]


def read_yolo(
    root: Path, split: str, entries: Sequence[str] = (), classes: Sequence[str] = (), *, verify: Verify = "header"
) -> Annotations:
    """Return images and boxes of a split; an image without a label file, or with an empty one, has no objects.

    The label file of an image has its name with .txt, under `labels` where the image lies under `images`, else beside
    it. A line is `class cx cy w h` in shares of the upright image, or `class x1 y1 x2 y2 ...`, a polygon, whose box is
    taken. An image's id is its position among the images of the split, sorted by path, counted from 1.

    Args:
        root: folder of the data.yaml.
        split: "train" or "val": the one of data.yaml, unless there are `entries`.
        entries: keys of data.yaml, or folders of images and .txt lists of them, as data.yaml would name them.
        classes: names to keep, label 1 first; empty: all, in the order of their numbers.
        verify: how images are checked, see `examine_image`; those that fail are left out.

    Raises:
        FileNotFoundError: no data.yaml or list of names, or a folder or list that is named is missing.
        ValueError: data.yaml is none, a class that it does not have, or nothing to train on.
    """
    dropped: list[str] = []
    what = few(entries) or split
    found = find_set(require_folder(Path(root), "the folder with data.yaml"), dropped)
    check_classes(classes, list(found.names.values()), source=str(found.source))
    categories = tuple(classes) or tuple(found.names.values())
    reading = _Reading(found, {name: label for label, name in enumerate(categories, start=1)}, Counter(), dropped)
    images = _images(found, split, entries, dropped)
    dropped += outside_of(found.base, (path for path, _ in images), found.source)
    missing = [each for each in images if not os.path.isfile(each[1]) and os.path.isfile(each[0])]
    if images and len(missing) == len(images):
        first = f"{missing[0][1]} of {missing[0][0].name}"
        raise ValueError(f"{found.source}: none of {len(images)} images of {what} has a label file, such as {first}")
    if missing:
        number = plural(len(missing), "image")
        dropped.append(f"{found.source}: {number} of {what} without a label file, the first: {missing[0][0]}")
    with ThreadPool(NUM_THREADS) as pool:
        sizes = pool.map(stored_size, [path for path, _ in images])
    records = [
        _record(number, path, label, size, reading)
        for number, ((path, label), size) in enumerate(zip(images, sizes, strict=True), start=1)
    ]
    dropped += others_left_out(reading.others, categories, found.source)
    usable, ids = [record for record in records if record is not None], range(1, len(categories) + 1)
    return build_annotations(usable, categories, ids, dropped, source=f"{found.source} {what}", verify=verify)


def find_set(root: Path, dropped: list[str]) -> YoloSet:
    """Return what data.yaml in a folder says, or another YAML file with names in it, or a list of names.

    Args:
        root: the folder.
        dropped: receives a sentence for each thing in it that is not as it says.

    Raises:
        FileNotFoundError: there is none of them.
        ValueError: its names are none.
    """
    found = [path for path in (root / "data.yaml", root / "dataset.yaml") if path.is_file()]
    found += sorted(path for path in root.iterdir() if path.suffix.lower() in (".yaml", ".yml") and path.is_file())
    for path in found:
        try:
            content = read_yaml(path, names=True, what="YOLO data")
        except ValueError:
            if path.stem in ("data", "dataset"):
                raise
            continue  # another tool's
        if isinstance(content, dict) and "names" in content:
            return _from_yaml(path, content, dropped)
    for path in (root / name for name in NAME_LISTS):
        if path.is_file():
            lines = [line.strip() for line in read_text(path).splitlines()]
            return YoloSet(path, _names(list(filter(None, lines)), path), root, {})
    raise FileNotFoundError(f"{root}: no data.yaml with names in it; expected it, or one of {', '.join(NAME_LISTS)}")


def _from_yaml(path: Path, content: dict[Any, Any], dropped: list[str]) -> YoloSet:
    names = _names(content["names"], path)
    number = content.get("nc", len(names))
    if number != len(names):
        dropped.append(f"{path}: nc is {reprlib.repr(number)}, but it has {len(names)} names; the names are taken")
    base, said = path.parent, content.get("path")
    if said is not None:
        if isinstance(said, str) and "\0" not in said and (base / said).is_dir():
            base = base / said
        else:
            dropped.append(f"{path}: path {reprlib.repr(said)} is no folder; paths start from that of the file")
    splits = {}
    for split, keys in SPLITS.items():
        key = next((key for key in keys if content.get(key)), None)
        if key is not None:
            entries = content[key] if isinstance(content[key], list) else [content[key]]
            if not all(isinstance(entry, str) and "\0" not in entry for entry in entries):
                raise ValueError(f"{path}: {key}: expected a folder or a list, or several, got {reprlib.repr(entries)}")
            splits[split] = entries
    shape = content.get("kpt_shape")
    whole = isinstance(shape, list) and all(isinstance(each, int) and 0 < each < 1000 for each in shape)
    return YoloSet(path, names, base, splits, math.prod(shape) if whole else 0)


def _names(said: Any, source: Path) -> dict[int, str]:
    """Names by number, in the order of the numbers."""
    pairs = list(said.items() if isinstance(said, dict) else enumerate(said if isinstance(said, list) else []))
    names = {int(key): name for key, name in pairs if str(key).isdecimal() and name and isinstance(name, str)}
    if not names or len(names) != len(pairs):
        what = "a list of names, or names by number from 0"
        raise ValueError(f"{source}: names: expected {what}, got {reprlib.repr(said)}")
    check_classes(list(names.values()), source=f"{source}: names")
    return dict(sorted(names.items()))


def _images(found: YoloSet, split: str, entries: Sequence[str], dropped: list[str]) -> list[tuple[Path, Path]]:
    """Each image of a split once, with its label file, which need not be there; sorted."""
    named = [entry for each in entries or [split] for entry in found.splits.get(each, [each] if entries else [])]
    if not named:
        more = "" if split == "train" else ", or data.val_fraction, which takes a part of the training images"
        raise ValueError(f"{found.source}: names no {split}; data.{split} takes a folder of images or a list{more}")
    images: dict[Path, Path] = {}
    for entry in named:
        place = _place(found, entry)
        inside = sorted(filter(is_image, visible_files(place))) if place.is_dir() else _listed(place, found, dropped)
        if not inside:
            raise ValueError(f"{place}: no images in it, though {found.source.name} names it")
        pairs = {path: label_file(path, found.base) for path in inside}
        if place.is_dir():
            dropped += _without_image(place, pairs, found.base)
        twice = images.keys() & pairs.keys()
        if twice:
            dropped.append(f"{found.source}: {plural(len(twice), 'image')} of {entry} named already; used once")
        images |= pairs
    shared = [label for label, number in Counter(images.values()).items() if number > 1 and os.path.isfile(label)]
    dropped += [f"{label}: two images or more have this name; all have its objects" for label in shared]
    return sorted(images.items())


def _place(found: YoloSet, entry: str) -> Path:
    """The folder or list of an entry."""
    for base in dict.fromkeys((found.base, found.source.parent)):
        for place in _tries(base, entry):
            if os.path.isdir(place) or (os.path.isfile(place) and place.suffix.lower() == ".txt"):
                return place
    raise FileNotFoundError(
        f"{found.base / entry}: no such folder or .txt list; expected the images that {found.source.name} or the "
        "recipe names"
    )


def _tries(base: Path, name: str) -> list[Path]:
    """Where a path may lead; exports of Roboflow have a ../ too many, those of CVAT a data/."""
    return [base / each for each in dict.fromkeys((name, name.removeprefix("../"), name.removeprefix("data/")))]


def _listed(place: Path, found: YoloSet, dropped: list[str]) -> list[Path]:
    """The images in a list, one per line, from the base, from the list's folder, or by their whole paths."""
    lines = list(filter(None, map(str.strip, read_text(place).replace("\0", "").splitlines())))
    for line, number in Counter(lines).items():
        if number > 1:
            dropped.append(f"{place}: {line} is listed {number} times; used once")
    choices = ([path for base in (found.base, place.parent) for path in _tries(base, line)] for line in lines)
    return list(dict.fromkeys(next(filter(os.path.exists, paths), paths[0]) for paths in choices))


def label_file(image: Path, base: Path) -> Path:
    """Return where the label file of an image is, or would be; `base` is the folder that holds all of them."""
    own = beside = image.with_suffix(".txt")
    inner = image.relative_to(base).parts if image.is_relative_to(base) else image.absolute().parts
    places = [index for index, part in enumerate(inner[:-1]) if part == "images"]
    if places:
        own = base.joinpath(*inner[: places[-1]], "labels", *inner[places[-1] + 1 :]).with_suffix(".txt")
    choices = (own, beside, own.with_suffix(".TXT"), beside.with_suffix(".TXT"))
    return next(filter(os.path.isfile, choices), own)


def is_label(path: Path) -> bool:
    """Return whether a file has the name of a label file."""
    return path.suffix.lower() == ".txt" and path.name.lower() not in NOT_LABELS


def _without_image(place: Path, pairs: dict[Path, Path], base: Path) -> list[str]:
    """A sentence for each label file that belongs to no image of a folder."""
    folder, known = label_file(place / "_.jpg", base).parent, set(pairs.values())
    inside = sorted(visible_files(folder)) if folder.is_dir() else []
    alone = [path for path in inside if is_label(path) and path not in known]
    return [f"{path}: no image of its name; {image_left_out(_count(path))}" for path in alone]


def _count(path: Path) -> int:
    try:
        return len(_lines(path))
    except (OSError, ValueError):
        return 0


def _lines(path: Path) -> dict[int, str]:
    """The lines of a label file that have something in them, by number.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    require_size(path, MAX_LABELS)
    lines = enumerate(read_text(path).splitlines(), start=1)
    return {number: line.strip() for number, line in lines if line.strip()}


def _record(
    number: int, path: Path, label: Path, stored: tuple[int, int, int] | None, reading: _Reading
) -> Record | None:
    """An image and its objects; None with a sentence if it has no use."""
    try:
        lines = _lines(label) if os.path.isfile(label) else {}
    except (OSError, ValueError) as error:
        reading.dropped.append(f"{label}: not a label file: {error}; image left out")
        return None
    if stored is None:
        problem = examine_image(path).problem or "no readable image header"
        reading.dropped.append(f"{path}: {problem}; {image_left_out(len(lines))}")
        return None
    width, height, orientation = stored
    width, height = (height, width) if orientation >= 5 else (width, height)
    objects = list(_objects(label, lines, (width, height), reading))
    record = build_record(path, number, width, height, objects, layout="coco", source=label, dropped=reading.dropped)
    return replace(record, upright=orientation > 1)


def _objects(label: Path, lines: dict[int, str], size: tuple[int, int], reading: _Reading) -> Iterable[RawObject]:
    """The objects of a label file whose class is to be kept; a sentence for each line that is none."""
    names, seen = reading.set.names, {}
    for number, line in lines.items():
        what, (kind, *numbers) = f"line {number}", line.split()
        index = finite_number(kind)
        name = names.get(int(index)) if index is not None and index.is_integer() else None
        numbers = numbers[:4] if reading.set.num_keypoints == len(numbers) - 4 else numbers
        problem = None
        if line in seen:
            problem = f"is line {seen[line]} once more"
        elif name is None:
            problem = f"has class {reprlib.repr(kind)} (allowed: {few(names)})"
        elif len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
            problem = f"has {len(numbers)} numbers behind its class; expected 4 of a box, or pairs, 3 or more"
        seen.setdefault(line, number)
        if problem is not None:
            reading.dropped.append(f"{label}: {what} {problem}; object left out")
        elif name not in reading.labels:
            reading.others[name] += 1
        else:
            yield RawObject(what, _box(numbers, *size), reading.labels[name], False)


def _box(texts: list[str], width: int, height: int) -> list[float] | list[str]:
    """x y w h in pixels; the texts, which `build_record` refuses, where one is no number."""
    numbers = [finite_number(text) for text in texts]
    if None in numbers:
        return texts
    if len(numbers) == 4:
        cx, cy, w, h = numbers
        return [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
    left, top = min(numbers[::2]), min(numbers[1::2])
    return [left * width, top * height, (max(numbers[::2]) - left) * width, (max(numbers[1::2]) - top) * height]
