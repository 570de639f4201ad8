"""Recognition of a folder's format by what lies in it."""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from detection.data.csv_files import SPLITS, Table, read_header, read_table, rows_of
from detection.data.image_files import is_image, visible_files
from detection.data.records import few, finite_number
from detection.data.voc import IMAGES, find_split, flat_pair, parse_xml, xml_file
from detection.data.yolo import find_set, is_label
from detection.text import plural

SAMPLE = 20  # files of a kind that are looked into
DEVKIT_LISTS = ("trainval", *SPLITS)
FRACTION = 0.2  # of the images, for validation, where there is one set alone
SOUGHT = (
    "data.yaml or classes.txt with label files (yolo), JSON with images, annotations and categories, such as "
    "train/_annotations.coco.json (coco), XML files in Annotations, annotations or beside images (voc), CSV files with "
    "a header (csv); a folder of images for each class is for a recipe with task classification, data.format folder; "
    "recordings of events for one with data.format events"
)


class Layout(NamedTuple):
    """A format that a folder may have.

    Attributes:
        format: its name, as `data.format`.
        saw: what speaks for it, a sentence each.
        share: of the files that were looked into, the part that is as the format says.
        values: keys of a recipe's section `data`.
        test: value of `data.val` by which the test set is read, which is in neither split; empty: none.
        test_images: the same of `data.val_images`.
    """

    format: str
    saw: tuple[str, ...]
    share: float
    values: dict[str, Any]
    test: tuple[str, ...] = ()
    test_images: str = ""


def recognise(root: Path, format: str | None = None) -> list[Layout]:
    """Return the formats that a folder may have, the likeliest first; at least one.

    Args:
        root: the folder, or one that has it alone inside.
        format: the only one to look for; None: all.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it has none of the formats; says what was looked for.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    if format is not None and format not in LOOKS:
        raise ValueError(f"format {format!r}: recognised are {', '.join(LOOKS)}")
    unfit: list[str] = []
    found = [LOOKS[name](root, unfit) for name in LOOKS if format in (None, name)]
    layouts = sorted((each for each in found if each is not None), key=lambda each: -each.share)
    if not layouts:
        inner = [path for path in root.iterdir() if not path.name.startswith((".", "__"))]
        if len(inner) == 1 and inner[0].is_dir():  # as archives are often unpacked
            return recognise(inner[0], format)
        inside = list(itertools.islice(visible_files(root), 2000))
        pictures = sum(map(is_image, inside))
        sought = SOUGHT if format is None else f"files of format {format}"
        more = f"{plural(pictures, 'image')}, but " if pictures else ""
        why = f"{'; '.join(unfit)}; sought were {sought}" if unfit else f"{more}none of {sought}"
        raise ValueError(f"{root}: not a data set that is recognised: {why}")
    return layouts


def _splits(names: Mapping[str, Any], *, instead: bool = True) -> dict[str, Any]:
    """What belongs to train, val and test by names such as train2017, trainset; `instead`: test is val if none is.

    The name of a file counts before those of its folders. A set of both, trainval, is that of training where no other
    is, and then no part of it is val.
    """
    sets: dict[tuple[str, ...], Any] = {}
    for name, value in sorted(names.items()):
        for text in (PurePosixPath(name).name, name):
            words = {word.removesuffix("set") for word in re.findall("train(?=val)|[a-z]+", text.lower())}
            if said := tuple(split for split in SPLITS if not words.isdisjoint(SPLITS[split])):
                sets.setdefault(said, value)
                break
    found = {split: sets[split,] for split in SPLITS if (split,) in sets}
    if "train" not in found and ("train", "val") in sets:
        found = {"train": sets["train", "val"]} | {split: found[split] for split in found if split == "test"}
    if instead and "train" in found and "val" not in found and "test" in found:
        found["val"] = found.pop("test")
    return found


def _alone(names: Mapping[str, Any], unfit: list[str]) -> dict[str, Any]:
    """The one file of a set, whatever it is called, as that of training; nothing of several, with a sentence."""
    if len(names) > 1:
        unfit.append(f"{few(names)}: no name has the word train; rename them, or write a recipe with data.train")
    return {"train": next(iter(names.values()))} if len(names) == 1 else {}


def _values(format: str, root: Path, splits: Mapping[str, str], alone: str | None = None) -> dict[str, Any] | None:
    """The keys of `data` for splits, or for one set alone; None where there is neither."""
    values: dict[str, Any] = {"format": format, "root": str(root)}
    if "train" in splits and "val" in splits:
        return values | {"train": [splits["train"]], "val": [splits["val"]]}
    one = alone if alone is not None else splits.get("train", next(iter(splits.values()), None))
    return None if one is None else values | {"train": [one], "val_fraction": FRACTION}


def _require_fitting(fitting: Mapping[str, Any], others: Mapping[str, str]) -> None:
    """Raise ValueError for a file that is called train or val where none is that can be read.

    Those of test sets are often without boxes.
    """
    found, broken = _splits(fitting), _splits(others, instead=False)
    for split in ("train", "val"):
        if fitting and split in broken and split not in found:
            raise ValueError(f"{broken[split]}; mend it, or remove it to go on without")


def _lists(root: Path) -> dict[str, str]:
    """Names of the lists of images in a folder, such as train.txt, by themselves."""
    stems = sum(SPLITS.values(), ())
    return {path.name: path.name for path in root.glob("*.[tT][xX][tT]") if path.stem.lower() in stems}


# YOLO


def _yolo(root: Path, unfit: list[str]) -> Layout | None:
    try:
        found = find_set(root, [])
    except FileNotFoundError:
        return None
    labels = [path for path in visible_files(root) if is_label(path) and path.is_file()]  # no links to nothing
    sample = [path for path in sorted(labels) if path.stat().st_size < 10**6][:: max(1, len(labels) // SAMPLE)]
    lines = [line.split() for path in sample for line in path.read_text(errors="replace").splitlines() if line.strip()]
    good = sum(len(line) >= 5 and None not in map(finite_number, line) for line in lines)
    if not good:
        unfit.append(f"{found.source}: it names classes, but no text file has lines of a class and numbers")
        return None
    saw = (
        f"{found.source.name} names {plural(len(found.names), 'class', 'classes')}",
        f"{good} of {plural(len(lines), 'line')} in {plural(len(sample), 'text file')} are a class and numbers",
    )
    values: dict[str, Any] | None = {"format": "yolo", "root": str(root)}
    test: tuple[str, ...] = ()
    if "train" in found.splits and "val" in found.splits:
        test = ("test",) if "test" in found.splits else ()
    elif "train" in found.splits and "test" in found.splits:
        values["val"] = ["test"]
    elif "train" in found.splits:
        values["val_fraction"] = FRACTION
    else:
        place = next((path for path in root.iterdir() if path.is_dir() and path.name.lower() == "images"), root)
        inside, tops = (
            {path.name: path.relative_to(root).as_posix() for path in folder.iterdir() if path.is_dir()}
            for folder in (place, root)
        )
        splits = _splits(_lists(root)) or _splits(inside) or _splits(tops)
        values = _values("yolo", root, splits, None if splits else place.relative_to(root).as_posix())
        test = (splits["test"],) if values.get("val") and "test" in splits else ()
    return Layout("yolo", saw, good / max(1, len(lines)), values, test)


# COCO


def _coco(root: Path, unfit: list[str]) -> Layout | None:
    every = {path.relative_to(root).as_posix(): path for path in _near(root, ".json")}
    fitting = {name: path for name, path in every.items() if _is_coco(path)}
    why = "no JSON with images, annotations and categories, or cut off"
    _require_fitting(fitting, {name: f"{path}: {why}" for name, path in every.items() if name not in fitting})
    names = {name: path for name, path in fitting.items() if "instances" in path.name} or fitting
    splits = _splits(names) or _alone(names, unfit)
    if not splits:
        return None
    folders = {split: _image_folder(root, path) for split, path in splits.items()}
    relative = {split: path.relative_to(root).as_posix() for split, path in splits.items()}
    values = _values("coco", root, relative)
    values["train_images"] = folders.get("train", next(iter(folders.values())))
    if "val" in values:
        values["val_images"] = folders["val"]
    test = (relative["test"],) if "val" in values and "test" in splits else ()
    sample = [name for name, path in names.items() if path in splits.values()]
    saw = tuple(f"{name} has images, annotations and categories" for name in sample)
    return Layout("coco", saw, 1.0, values, test, folders.get("test", ""))


def _near(root: Path, suffix: str) -> list[Path]:
    """Files with a suffix, in capitals or not, in a folder, and one and two levels lower, sorted."""
    found = [path for pattern in ("*", "*/*", "*/*/*") for path in root.glob(pattern) if path.suffix.lower() == suffix]
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def _is_coco(path: Path) -> bool:
    """Whether the names of the three lists stand in a file; it may be too large to be parsed for that."""
    if path.stat().st_size < 2:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return all(content.find(f'"{key}"'.encode()) >= 0 for key in ("images", "annotations", "categories"))


def _image_folder(root: Path, source: Path) -> str:
    """The folder, from the root, in which the first images of a COCO file lie."""
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        said = re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', content)
        texts = [each[1] for each in itertools.islice(said, SAMPLE)]
        del said  # which holds the map
    try:
        names = [json.loads(text).replace("\\", "/") for text in texts]
    except ValueError as error:
        raise ValueError(f"{source}: not a JSON file: {error}") from None
    split = re.sub("^(instances|annotations)_?|_?(annotations|instances|coco)$", "", source.stem)
    places = [root, root / split, root / "images" / split, root / "images", source.parent / "images"]
    folder = _place(root, source, places, names)
    return "" if folder == "." else folder


def _place(root: Path, source: Path, places: Sequence[Path], names: Sequence[str], *, bare: bool = False) -> str:
    """The folder, from the root, with most of these images (by their `bare` names, too); of equals, its split's."""
    own = _splits({source.relative_to(root).as_posix(): 0}, instead=False)
    places = [source.parent, *places, *sorted(path for path in (*root.glob("*"), *root.glob("*/*")) if path.is_dir())]

    def fit(place: Path) -> tuple[int, bool]:
        tries = ((name, PurePosixPath(name).name if bare else name) for name in names)
        number = sum(any(os.path.isfile(place / name) for name in each) for each in tries)
        return number, _splits({place.name: 0}, instead=False) == own

    return max(places, key=fit).relative_to(root).as_posix()


# VOC


def _voc(root: Path, unfit: list[str]) -> Layout | None:
    devkits = [path.parents[1] for depth in ("", "*/", "*/*/") for path in root.glob(f"{depth}ImageSets/Main")]
    found = _devkit(root, sorted(devkits), unfit) if devkits else _flat_voc(root)
    if found is None:
        return None
    values, test, what = found
    sample: list[Path] = []
    for split in values["train"]:
        place = find_split(root, split, [])
        sample += [xml_file(place.sources, key) for key in place.keys[:: max(1, len(place.keys) // SAMPLE)]]
    good = sum(map(_is_voc, sample))
    if not good:
        unfit.append(f"{what}, but none of the files looked into is XML with an annotation")
        return None
    saw = (what, f"{good} of {plural(len(sample), 'file')} looked into are XML with an annotation")
    return Layout("voc", saw, good / len(sample), values, test)


def _devkit(
    root: Path, devkits: Sequence[Path], unfit: list[str]
) -> tuple[dict[str, Any], tuple[str, ...], str] | None:
    """trainval and test, or train and val, of all years; else the one list that there is, whatever it is called."""
    lists: dict[str, list[str]] = {}
    broken: dict[str, str] = {}
    for devkit in devkits:
        for path in sorted((devkit / "ImageSets" / "Main").glob("*.[tT][xX][tT]")):
            name = next((split for split, names in SPLITS.items() if path.stem.lower() in names), path.stem.lower())
            first = next(iter(path.read_text(errors="replace").splitlines()), "").strip()
            if not xml_file(devkit / "Annotations", first).is_file():
                broken[name] = f"{path}: its first image, {first!r}, has no annotation"
            else:
                folder = devkit.relative_to(root).as_posix()
                lists.setdefault(name, []).append(path.stem if folder == "." else f"{folder}/{path.stem}")
    saw = f"ImageSets/Main has {', '.join(sorted(lists))}"
    named = {name: lists[name] for name in DEVKIT_LISTS if name in lists}
    if broken and not lists:
        unfit.append(next(iter(broken.values())))
    lists = named or _alone(lists, unfit)
    for train, val in (("trainval", "test"), ("train", "val"), ("train", "test")):
        if train in lists and val in lists:
            test = tuple(lists.get("test", ())) if val == "val" else ()
            values = {"format": "voc", "root": str(root), "train": lists[train], "val": lists[val]}
            return values, test, saw
    if lists and "trainval" not in lists:
        known = {name.replace("trainval", "train"): why for name, why in broken.items() if name in DEVKIT_LISTS}
        _require_fitting(lists, known)
    one = lists.get("trainval") or lists.get("train") or next(iter(lists.values()), None)
    values = {"format": "voc", "root": str(root), "train": one, "val_fraction": FRACTION}
    return None if one is None else (values, (), saw)


def _flat_voc(root: Path) -> tuple[dict[str, Any], tuple[str, ...], str] | None:
    tops = {path.name: path.name for path in root.iterdir() if path.is_dir() and flat_pair(path) is not None}
    inner = [path for top in root.iterdir() if top.name.lower() in IMAGES and top.is_dir() for path in top.iterdir()]
    inside = {path.name: path.name for path in inner if path.is_dir() and flat_pair(root, path.name) is not None}
    pair = flat_pair(root)
    splits = _splits(inside) or _splits(tops) or (_splits(_lists(root)) if pair else {})
    values = _values("voc", root, splits, "." if pair and not splits else None)
    if values is None:
        return None
    test = (splits["test"],) if "val" in values and "test" in splits else ()
    return values, test, "XML files in " + ", ".join(sorted(splits.values()) or ["the folder"])


def _is_voc(path: Path) -> bool:
    with contextlib.suppress(Exception):  # a parser may fail in any way
        return any(element.tag == "annotation" for element in parse_xml(path).iter())
    return False


# CSV


def _csv(root: Path, unfit: list[str]) -> Layout | None:
    fitting: dict[str, Path] = {}
    others: dict[str, str] = {}
    for path in _near(root, ".csv"):
        name = path.relative_to(root).as_posix()
        try:
            read_header(next(rows_of(path), (1, []))[1], path)
            fitting[name] = path
        except (ValueError, OSError) as error:
            others[name] = str(error)
    _require_fitting(fitting, others)
    unfit += list(others.values())[: not fitting]
    splits = _splits(fitting) or _alone(fitting, unfit)
    if not splits:
        return None
    relative = {split: path.relative_to(root).as_posix() for split, path in splits.items()}
    values = _values("csv", root, relative)
    source, test = root / values["train"][0], (relative["test"],) if "val" in values and "test" in splits else ()
    tables: dict[Path, Table] = {}
    for split, path in splits.items():
        beside = split == "test" and "train" in splits  # training does not read it
        with contextlib.suppress(ValueError) if beside else contextlib.nullcontext():
            tables[path] = read_table(path, [])
    said = tables[source].split_values
    if "val_fraction" in values and said:
        known = {split: [each for each in names if each in said] for split, names in SPLITS.items()}
        if known["train"] and (known["val"] or known["test"]):
            name = values["train"][0]
            values = {key: value for key, value in values.items() if key != "val_fraction"}
            values["val"] = [name if known["val"] else f"{name}:{known['test'][0]}"]
            test = (f"{name}:{known['test'][0]}",) if known["val"] and known["test"] else ()
    places = {path: _csv_images(root, path, table) for path, table in tables.items()}
    values["train_images"] = places[source]
    folders = {split: places[path] for split, path in splits.items() if path in places}
    if "val" in values:
        values["val_images"] = folders.get("val", values["train_images"])
    saw = tuple(f"{name} has a header with columns for image, class and box" for name in relative.values())
    return Layout("csv", saw, 1.0, values, test, folders.get("test", values["train_images"]))


def _csv_images(root: Path, source: Path, table: Table) -> str:
    """The folder, from the root, in which the first images of a CSV file lie."""
    names = [name.replace("\\", "/") for name in itertools.islice(table.images, SAMPLE)]
    return _place(root, source, [*sorted(filter(Path.is_dir, source.parent.iterdir())), root], names, bare=True)


LOOKS: dict[str, Callable[[Path, list[str]], Layout | None]] = {"yolo": _yolo, "coco": _coco, "voc": _voc, "csv": _csv}
