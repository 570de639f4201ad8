"""The formats of detection data by name, and the reading of a recipe's splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Literal

from detection.config.registry import add_to, find_reader
from detection.config.schema import Data
from detection.data.coco import read_coco
from detection.data.csv_files import read_csv
from detection.data.dataset import DetectionDataset
from detection.data.events.made import draw_recordings
from detection.data.events.recordings import read_recordings
from detection.data.records import Annotations
from detection.data.splitting import take_part
from detection.data.synthetic import draw_scenes
from detection.data.voc import read_voc
from detection.data.yolo import find_set, read_yolo

Split = Literal["train", "val"]
Reader = Callable[[Data, Split, Sequence[str]], Annotations]
ROBOFLOW = "_annotations.coco.json"  # its name in every folder of an export, beside the images
READERS: dict[str, Reader] = {}


def register_format(name: str) -> Callable[[Reader], Reader]:
    """Decorate a function (data, split, classes) -> `Annotations`, which reads files for `data.format: NAME`.

    `classes` are the names to keep, label 1 first; empty: all that the data have.

    Example:
        >>> @register_format("own")
        ... def read_own(data, split, classes):
        ...     return build_annotations(...)

    Raises:
        ValueError: the name is taken by another function.
    """
    return lambda reader: add_to(READERS, name, reader, "data.format")


def read_split(data: Data, split: Split, classes: Sequence[str] | None = None) -> DetectionDataset:
    """Return a split as it is stored, without augmentation.

    Args:
        data: where it is.
        split: "train" or "val".
        classes: names to keep, label 1 first; None: those of `data.classes`, or all that the data have.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: no such format, a key that the format needs is empty, or what the format's reader finds wrong.
    """
    reader, wanted = find_reader(READERS, data), data.classes if classes is None else classes
    if data.val_fraction:
        return DetectionDataset(take_part(reader(data, "train", wanted), split, data))
    return DetectionDataset(reader(data, split, wanted))


@register_format("voc")
def _voc(data: Data, split: Split, classes: Sequence[str]) -> Annotations:
    return read_voc(data.root, _named(data, split), classes, verify=data.verify)


@register_format("coco")
def _coco(data: Data, split: Split, classes: Sequence[str]) -> Annotations:
    files = _named(data, split)
    if len(files) > 1:
        raise ValueError(f"data.{split}: {files}; data.format 'coco' takes one annotation file")
    folder = getattr(data, f"{split}_images")
    if not folder and PurePath(files[0]).name == ROBOFLOW:
        folder = str(PurePath(files[0]).parent)
    images = data.root / folder
    return read_coco(data.root / files[0], images, classes, verify=data.verify, may_lack_classes=split == "val")


@register_format("yolo")
def _yolo(data: Data, split: Split, classes: Sequence[str]) -> Annotations:
    found = read_yolo(data.root, split, getattr(data, split), classes, verify=data.verify)
    if not data.val_fraction:
        return found
    named = find_set(data.root, [])
    if named.splits.get("val") in (None, named.splits.get("train")):
        return found
    why = f"{named.source}: its val is not read, since data.val_fraction is {data.val_fraction:g}"
    return replace(found, dropped=(*found.dropped, why))


@register_format("csv")
def _csv(data: Data, split: Split, classes: Sequence[str]) -> Annotations:
    files = _named(data, split)
    if len(files) > 1:
        raise ValueError(f"data.{split}: {files}; data.format 'csv' takes one file")
    name, _, value = files[0].rpartition(":")
    name, value = (name, value) if name and not (data.root / files[0]).is_file() else (files[0], None)
    folder = getattr(data, f"{split}_images")
    images = data.root / folder if folder else None
    return read_csv(data.root / name, split, images, classes, value=value, verify=data.verify)


@register_format("synthetic")
def _synthetic(data: Data, split: Split, classes: Sequence[str]) -> Annotations:
    draw_scenes(data.root, **data.scenes.model_dump())
    annotations = data.root / "annotations" / f"{split}.json"
    return read_coco(annotations, data.root / split, classes, verify=data.verify)


@register_format("events")
def _events(data: Data, split: Split, classes: Sequence[str]) -> Annotations:
    return _recordings(data, _named(data, split), classes)


@register_format("synthetic_events")
def _synthetic_events(data: Data, split: Split, classes: Sequence[str]) -> Annotations:
    draw_recordings(data.root, **data.scenes.model_dump())
    return _recordings(data, [split], classes)


def _recordings(data: Data, folders: Sequence[str], classes: Sequence[str]) -> Annotations:
    if data.augment.color:
        raise ValueError(f"data.augment.color {data.augment.color:g}: it takes pictures, not events")
    return read_recordings(data.root, folders, classes, data.events, verify=data.verify)


def _named(data: Data, split: Split) -> list[str]:
    names = getattr(data, split)
    if not names:
        raise ValueError(f"data.{split}: empty; data.format {data.format!r} needs it")
    return names
