"""The product of every reader: one checked `Record` per image."""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from detection.data.image_files import Verify, examine_image, load_image, settle
from detection.text import nearest, plural, printable

# Tools disagree about whether pixels start at 0 or 1; boxes beyond the border by no more are clipped without a word.
TOLERATED_EXCESS = 1.0
MAX_AREA = 1e10  # square pixels; pycocotools counts no larger object
MAX_NAMES = 20  # in one message

NUM_THREADS = 8  # that look at image files; more than cores, since files may lie on a slow disk

Layout = Literal["coco", "corners", "voc"]


@dataclass(frozen=True)
class Record:
    """One image and its objects, in pixels of the stored image.

    Invariant: 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height, also after rounding to float32.

    Shape:
        boxes: (M, 4) float32 x1 y1 x2 y2.
        labels: (M,) int64 in 1..K.
        ignore: (M,) bool, VOC "difficult" or COCO crowd: no training target, ignored in evaluation.
        area: (M,) float64 square pixels, the COCO annotation's "area", else the box's.
        xywh: (M, 4) float64 x y width height, a COCO file's own numbers if nothing was clipped; made of boxes if None.

    Attributes:
        path: the image file.
        image_id: of a COCO file, any integer or text; else a number.
        width, height: of the image that the boxes belong to.
        upright: that is the image turned as its EXIF orientation says.
    """

    path: Path
    image_id: int | str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    area: np.ndarray
    xywh: np.ndarray | None = None
    upright: bool = False

    def __post_init__(self) -> None:
        if self.xywh is None:
            boxes = self.boxes.astype(np.float64)
            object.__setattr__(self, "xywh", np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]))

    def read(self) -> np.ndarray:
        """Return the image, (height, width, 3) uint8 RGB; other kinds of records may have other channels."""
        return load_image(self.path, upright=self.upright)


@dataclass(frozen=True)
class Annotations:
    """All images of a split. Label k is named categories[k - 1], and category_ids[k - 1] in COCO results.

    `dropped` has one sentence for each thing that was left out or mended; each names the file. Objects are counted:
    "object left out" is one, "3 objects ... left out" and "image left out with 3 objects" are three.
    """

    records: tuple[Record, ...]
    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    dropped: tuple[str, ...] = ()


class RawObject(NamedTuple):
    """One object as its file has it: nothing but the label is checked yet."""

    name: str  # how messages call it
    box: Any
    label: int
    ignore: bool
    area: Any = None


def build_record(
    path: Path,
    image_id: int | str,
    width: int,
    height: int,
    objects: Iterable[RawObject],
    *,
    layout: Layout,
    source: Path,
    dropped: list[str],
) -> Record:
    """Return the record of one image; objects without a usable box are left out.

    Args:
        layout: coco: x, y, width, height; corners: xmin, ymin, xmax, ymax; voc: these from 1, last pixel included.
        source: annotation file, for the messages.
        dropped: receives one sentence for each box left out or clipped.
    """
    kept: list[RawObject] = []
    corners, sizes, areas = [], [], []
    border = np.array([width, height, width, height], dtype=np.float64)
    for item in objects:
        what = f"{source}: {item.name} of {path.name}"
        box = _four_numbers(item.box)
        if box is None:
            dropped.append(f"{what}: box {reprlib.repr(item.box)} is not four finite numbers; object left out")
            continue
        with np.errstate(over="ignore"):  # an endless box is clipped as any other
            raw = _to_corners(box, layout)
        clipped = np.clip(raw, 0, border)
        rounded = clipped.astype(np.float32)
        if not (rounded[:2] < rounded[2:]).all():
            why = "has no area" if not (raw[:2] < raw[2:]).all() else f"lies outside of the {width}x{height} image"
            dropped.append(f"{what}: box {_show(box)} {why}; object left out")
            continue
        if np.abs(raw - clipped).max() > TOLERATED_EXCESS:
            dropped.append(f"{what}: box {_show(box)} reaches out of the {width}x{height} image; clipped")
        unchanged = layout == "coco" and np.array_equal(raw, clipped)
        xywh = box if unchanged else np.concatenate([clipped[:2], clipped[2:] - clipped[:2]])
        area = finite_number(item.area)
        if area is None or not 0 <= area <= MAX_AREA:
            if item.area is not None:
                wrong = f"area {reprlib.repr(item.area)} is not in 0 to {MAX_AREA:g}"
                dropped.append(f"{what}: {wrong}; the box's is taken")
            area = float(xywh[2] * xywh[3])
        kept.append(item)
        corners.append(rounded)
        sizes.append(xywh)
        areas.append(area)
    return Record(
        path=path,
        image_id=image_id,
        width=width,
        height=height,
        boxes=np.array(corners, dtype=np.float32).reshape(-1, 4),
        labels=np.array([item.label for item in kept], dtype=np.int64),
        ignore=np.array([item.ignore for item in kept], dtype=bool),
        area=np.array(areas, dtype=np.float64),
        xywh=np.array(sizes, dtype=np.float64).reshape(-1, 4),
    )


def build_annotations(
    records: Sequence[Record],
    categories: Sequence[str],
    category_ids: Sequence[int],
    dropped: Sequence[str],
    *,
    source: str,
    verify: Verify = "header",
) -> Annotations:
    """Return the annotations of a split; images that `examine_image` finds fault with are left out.

    Records of one file are joined into the first of them.

    Raises:
        ValueError: no image has a box to train on.
    """
    # Reading and decoding release the interpreter's lock. This pool hands out many files at a time: a look at one takes
    # less than handing it out.
    with ThreadPool(NUM_THREADS) as pool:
        looks = pool.starmap(
            examine_image, [(each.path, each.width, each.height, verify, each.upright) for each in records]
        )
    told, usable = list(dropped), []
    for record, look in zip(records, settle(looks), strict=True):
        told += [f"{record.path}: {note}" for note in look.notes]
        if look.problem is not None:
            told.append(f"{record.path}: {look.problem}; {image_left_out(len(record.labels))}")
        else:
            usable.append(replace(record, upright=True) if look.upright else record)
    usable = _join(usable, told)
    told = [printable(sentence) for sentence in told]
    if not any((~record.ignore).any() for record in usable):
        raise ValueError(f"{source}: none of its {len(usable)} usable images has a box to train on{_why(usable, told)}")
    return Annotations(tuple(usable), tuple(categories), tuple(category_ids), tuple(told))


def image_left_out(num_objects: int) -> str:
    """Return the end of a sentence about an image that is left out."""
    return "image left out" + (f" with {plural(num_objects, 'object')}" if num_objects else "")


def _join(records: Sequence[Record], told: list[str]) -> list[Record]:
    """The records with those of one image joined, and a sentence for each such image."""
    same: dict[tuple[str, int, int], list[Record]] = defaultdict(list)
    for record in records:
        same[os.path.abspath(record.path), record.width, record.height].append(record)
    joined = []
    for first, *others in same.values():
        if others:
            told.append(f"{first.path}: described {1 + len(others)} times; joined into image {first.image_id}")
            columns = ("boxes", "labels", "ignore", "area", "xywh")
            parts = {key: [getattr(record, key) for record in (first, *others)] for key in columns}
            whole = {key: np.concatenate(values) for key, values in parts.items()}
            once = np.unique(np.column_stack([whole["labels"], whole["xywh"]]), axis=0, return_index=True)[1]
            first = replace(first, **{key: values[np.sort(once)] for key, values in whole.items()})
        joined.append(first)
    return joined


def _why(records: Sequence[Record], told: Sequence[str]) -> str:
    """The end of a refusal: what was left out, and the sentence that explains best why there is nothing to train on."""
    ignored = sum(len(record.labels) for record in records)
    why = f"; {plural(ignored, 'object')} difficult or crowds" if ignored else ""
    if not told:
        return why or "; nothing was left out"
    # Of usable images it is the objects that are missing.
    sought = r"\bobjects?\b.* left out|left out with" if records else "image left out"
    first = next((sentence for sentence in told if re.search(sought, sentence)), told[0])
    return f"{why}; {len(told)} left out or mended, the first: {first}"


def outside_of(folder: Path, paths: Iterable[Path], source: Path) -> list[str]:
    """Return a sentence about the paths that lead out of a folder by their names (links may), none without any."""
    root = os.path.abspath(folder)
    outside = [path for path in paths if not Path(os.path.abspath(path)).is_relative_to(root)]
    number = plural(len(outside), "image file")
    return [f"{source}: {number} outside of {folder}, the first: {outside[0]}; used all the same"] if outside else []


def others_left_out(others: Mapping[str, int], categories: Sequence[str], source: Path) -> list[str]:
    """Return a sentence for each class that is not among those to keep, with the number of its objects."""
    end = f"left out, not among the classes {few(categories)}"
    return [f"{source}: {plural(count, 'object')} of category {name!r} {end}" for name, count in others.items()]


def is_true(value: Any) -> bool:
    """Return whether a file's value says yes."""
    return isinstance(value, (str, int, float)) and str(value).strip().lower() in ("1", "1.0", "true", "yes", "y")


def few(names: Iterable[Any]) -> str:
    """Return names for a message, the first ones of many."""
    names = list(names)
    return ", ".join(map(str, names[:MAX_NAMES])) + (", ..." if len(names) > MAX_NAMES else "")


def check_classes(classes: Sequence[str], known: Sequence[str] | None = None, *, source: str = "classes") -> None:
    """Raise ValueError for a class given twice, or one that is not among `known`."""
    for position, name in enumerate(classes):
        if name in classes[:position]:
            raise ValueError(f"{source}: class {name!r} is given twice in {list(classes)}")
        if known is not None and name not in known:
            wanted = "wanted are those of data.classes or, where it is empty, of the training data"
            raise ValueError(f"{source}: no class {name!r}{nearest(name, known)}; {wanted}")


def require_file(path: Path, expected: str) -> Path:
    """`path` itself; raises FileNotFoundError that says what was expected there."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {expected}")
    return path


def require_folder(path: Path, expected: str) -> Path:
    """`path` itself; raises FileNotFoundError that says what was expected there."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; expected {expected}")
    return path


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder of a set with one per class, sorted, none that is hidden."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _to_corners(box: np.ndarray, layout: Layout) -> np.ndarray:
    low, high = box[:2], box[2:]
    if layout != "voc":
        return box if layout == "corners" else np.concatenate([low, low + high])
    # Formally xmin == xmax is one pixel wide, but in practice it is a slip of the annotator (two such boxes in BCCD):
    # without the shift it stays without area.
    return np.concatenate([low - 1, high]) if (low < high).all() else box


def _four_numbers(values: Any) -> np.ndarray | None:
    if not isinstance(values, (list, tuple)) or len(values) != 4:
        return None
    numbers = [finite_number(value) for value in values]
    return None if None in numbers else np.array(numbers, dtype=np.float64)


def finite_number(value: Any) -> float | None:
    """Return a number or its text as a float; None for anything else, infinity and no number included."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _show(box: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"
