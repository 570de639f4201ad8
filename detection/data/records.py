"""The product of every reader: one checked `Record` per image, and the dataset over them."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detection.data.image_files import Verify, examine_image, load_image

# Tools disagree about whether pixels start at 0 or 1; boxes beyond the border by no more are clipped without a word.
TOLERATED_EXCESS = 1.0

NUM_THREADS = 8  # that look at image files; more than cores, since files may lie on a slow disk

Transform = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Record:
    """One image and its objects, in pixels of the stored image.

    Invariant: 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height, also after rounding to float32.

    Shape:
        boxes: (M, 4) float32 x1 y1 x2 y2.
        labels: (M,) int64 in 1..K.
        ignore: (M,) bool, VOC "difficult" or COCO crowd: no training target, ignored in evaluation.
        area: (M,) float64 square pixels, the COCO annotation's "area", else the box's.
        xywh: (M, 4) float64 x y width height, a COCO file's own numbers if nothing was clipped; None: as boxes.

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


@dataclass(frozen=True)
class Annotations:
    """All images of a split. Label k is named categories[k - 1], and category_ids[k - 1] in COCO results.

    `dropped` has one sentence for each thing that was left out or mended; each names the file.
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
    image_id: int,
    width: int,
    height: int,
    objects: Iterable[RawObject],
    *,
    layout: Literal["coco", "voc"],
    source: Path,
    dropped: list[str],
) -> Record:
    """The record of one image; objects without a usable box are left out and appended to `dropped`.

    Args:
        layout: coco: x, y, width, height; voc: xmin, ymin, xmax, ymax counted from 1, the last pixel included.
        source: annotation file, for the messages.
        dropped: receives one sentence for each box left out or clipped.
    """
    kept: list[RawObject] = []
    corners, sizes, areas = [], [], []
    for item in objects:
        what = f"{source}: {item.name} of {path.name}"
        box = _four_numbers(item.box)
        if box is None:
            dropped.append(f"{what}: box {item.box!r} is not four finite numbers; left out")
            continue
        raw = _to_corners(box, layout)
        clipped = np.clip(raw, 0, [width, height, width, height])
        rounded = clipped.astype(np.float32)
        if not (rounded[:2] < rounded[2:]).all():
            why = "has no area" if not (raw[:2] < raw[2:]).all() else f"lies outside of the {width}x{height} image"
            dropped.append(f"{what}: box {_show(box)} {why}; left out")
            continue
        if np.abs(raw - clipped).max() > TOLERATED_EXCESS:
            dropped.append(f"{what}: box {_show(box)} reaches out of the {width}x{height} image; clipped")
        unchanged = layout == "coco" and np.array_equal(raw, clipped)
        xywh = box if unchanged else np.concatenate([clipped[:2], clipped[2:] - clipped[:2]])
        area = _number(item.area)
        kept.append(item)
        corners.append(rounded)
        sizes.append(xywh)
        areas.append(float(xywh[2] * xywh[3]) if area is None else area)
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
    records, joined = join_records(records)
    # Reading and decoding release the interpreter's lock. This pool hands out many files at a time: a look at one takes
    # less than handing it out.
    with ThreadPool(NUM_THREADS) as pool:
        looks = pool.starmap(examine_image, [(each.path, each.width, each.height, verify) for each in records])
    told = [*dropped, *joined]
    left_out, kept = [], []
    for record, look in zip(records, looks, strict=True):
        told += [f"{record.path}: {note}" for note in look.notes]
        if look.problem is not None:
            left_out.append(f"{record.path}: {look.problem}; left out")
        else:
            kept.append(replace(record, upright=True) if look.upright else record)
    told += left_out
    if not any((~record.ignore).any() for record in kept):
        raise ValueError(f"{source}: none of its {len(kept)} usable images has a box to train on{_reason(told)}")
    return Annotations(tuple(kept), tuple(categories), tuple(category_ids), tuple(told))


def join_records(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Return the records with those of one file joined, and a sentence for each such file."""
    by_path: dict[Path, list[Record]] = {}
    for record in records:
        by_path.setdefault(record.path, []).append(record)
    joined, told = [], []
    for path, same in by_path.items():
        first, parts = same[0], [each for each in same if len(each.labels)] or same[:1]
        if len(same) > 1:
            told.append(f"{path}: described {len(same)} times; joined into image {first.image_id}")
            columns = ("boxes", "labels", "ignore", "area", "xywh")
            first = replace(first, **{key: np.concatenate([getattr(part, key) for part in parts]) for key in columns})
        joined.append(first)
    return joined, told


def _reason(told: Sequence[str]) -> str:
    """The end of a refusal: how much was left out, and a sentence that explains it best."""
    if not told:
        return "; nothing was left out"
    # A note about something that was mended explains nothing.
    explaining = [sentence for sentence in told if sentence.endswith("left out")] or list(told)
    return f"; {len(told)} left out or mended, the first: {explaining[0]}"


def check_classes(classes: Sequence[str], known: Sequence[str] | None = None, *, source: str = "classes") -> None:
    """Raise ValueError for a class given twice, or one that is not among `known`."""
    for position, name in enumerate(classes):
        if name in classes[:position]:
            raise ValueError(f"{source}: class {name!r} is given twice in {list(classes)}")
        if known is not None and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{source}: no class {name!r}{hint} (allowed: {', '.join(known)})")


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


class DetectionDataset(Dataset):
    """Images and targets as torchvision's detectors take them.

    An item is (image, target): image (3, H, W) float32 RGB in [0, 1]; target {"boxes": (M, 4) float32 x1 y1 x2 y2,
    "labels": (M,) int64 in 1..K, "image_id": of the record}, without the ignored objects.

    Args:
        annotations: what to read.
        transform: augmentation of (image (H, W, 3) uint8, boxes, labels); the boxes are then pixels of its result.
    """

    def __init__(self, annotations: Annotations, transform: Transform | None = None) -> None:
        self.annotations = annotations
        self.transform = transform

    def __len__(self) -> int:
        return len(self.annotations.records)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels 1..K."""
        return self.annotations.categories

    @property
    def dropped(self) -> tuple[str, ...]:
        """A sentence for each thing that was left out or mended."""
        return self.annotations.dropped

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        record = self.annotations.records[index]
        image = load_image(record.path, upright=record.upright)
        height, width = image.shape[:2]
        if (width, height) != (record.width, record.height):
            raise ValueError(
                f"{record.path}: the image is {width}x{height} pixels, its annotations say "
                f"{record.width}x{record.height}; correct the annotation file"
            )
        boxes, labels = record.boxes[~record.ignore], record.labels[~record.ignore]
        if self.transform is not None:
            image, boxes, labels = self.transform(image, boxes, labels)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels), "image_id": record.image_id}
        return pixels.float() / 255, target

    def fingerprint(self) -> str:
        """Return a SHA-256 of images' names and sizes, boxes, labels and classes: what a run depends on."""
        digest = hashlib.sha256(repr(self.annotations.categories).encode())
        for record in self.annotations.records:
            about = (record.path.name, record.path.stat().st_size, record.width, record.height, record.upright)
            digest.update(repr(about).encode())
            for column in (record.boxes, record.labels, record.ignore):
                digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def choose(self, indices: Sequence[int]) -> DetectionDataset:
        """Return these images alone."""
        records = self.annotations.records
        chosen = replace(self.annotations, records=tuple(records[index] for index in indices))
        return DetectionDataset(chosen, self.transform)

    def ground_truth(self) -> dict[str, Any]:
        """A COCO dictionary for pycocotools, in pixels of the stored images; ignored objects have iscrowd = 1.

        A detection that lies on an ignored object counts neither as right nor as wrong.
        """
        images, annotations = [], []
        for record in self.annotations.records:
            images.append(
                {
                    "id": record.image_id,
                    "file_name": record.path.name,
                    "width": record.width,
                    "height": record.height,
                }
            )
            boxes = record.boxes.astype(np.float64)
            xywh = record.xywh if record.xywh is not None else np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
            for box, label, ignore, area in zip(xywh, record.labels, record.ignore, record.area, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,  # pycocotools takes id 0 for "unmatched"
                        "image_id": record.image_id,
                        "category_id": self.annotations.category_ids[label - 1],
                        "bbox": box.tolist(),
                        "area": float(area),
                        "iscrowd": int(ignore),
                    }
                )
        categories = [
            {"id": category_id, "name": name}
            for category_id, name in zip(self.annotations.category_ids, self.annotations.categories, strict=True)
        ]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _to_corners(box: np.ndarray, layout: Literal["coco", "voc"]) -> np.ndarray:
    low, high = box[:2], box[2:]
    if layout == "coco":
        return np.concatenate([low, low + high])
    # Formally xmin == xmax is one pixel wide, but in practice it is a slip of the annotator (two such boxes in BCCD):
    # without the shift it stays without area.
    return np.concatenate([low - 1, high]) if (low < high).all() else box


def _four_numbers(values: Any) -> np.ndarray | None:
    if not isinstance(values, (list, tuple)) or len(values) != 4:
        return None
    numbers = [_number(value) for value in values]
    return None if None in numbers else np.array(numbers, dtype=np.float64)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _show(box: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"
