"""The contents of a data set, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detection.data.records import Annotations

# COCO's limits of small and medium objects, in square pixels.
SMALL, MEDIUM = 32**2, 96**2


@dataclass(frozen=True)
class ClassCount:
    """Objects of one class: all of them, those ignored (difficult or crowd), and the images that have any."""

    name: str
    num_objects: int
    num_ignored: int
    num_images: int


@dataclass(frozen=True)
class DataReport:
    """Counts of one split.

    Attributes:
        num_images: usable images.
        num_empty: those without any object.
        classes: one entry per class, in label order.
        widths, heights: smallest, median and largest image side in pixels.
        sizes: smallest, median and largest square root of an object's area in pixels; zeros without objects.
        num_small, num_medium, num_large: objects below 32^2, below 96^2, and from 96^2 square pixels on.
    """

    num_images: int
    num_empty: int
    classes: tuple[ClassCount, ...]
    widths: tuple[float, float, float]
    heights: tuple[float, float, float]
    sizes: tuple[float, float, float]
    num_small: int
    num_medium: int
    num_large: int


def report(annotations: Annotations) -> DataReport:
    """The counts of a split that has been read."""
    records = annotations.records
    labels = np.concatenate([record.labels for record in records])
    ignored = np.concatenate([record.ignore for record in records])
    areas = np.concatenate([record.area for record in records])
    with_label = np.concatenate([np.unique(record.labels) for record in records])
    classes = tuple(
        ClassCount(
            name,
            int((labels == label).sum()),
            int((ignored & (labels == label)).sum()),
            int((with_label == label).sum()),
        )
        for label, name in enumerate(annotations.categories, start=1)
    )
    return DataReport(
        num_images=len(records),
        num_empty=sum(len(record.labels) == 0 for record in records),
        classes=classes,
        widths=_spread([record.width for record in records]),
        heights=_spread([record.height for record in records]),
        sizes=_spread(np.sqrt(areas)),
        num_small=int((areas < SMALL).sum()),
        num_medium=int(((areas >= SMALL) & (areas < MEDIUM)).sum()),
        num_large=int((areas >= MEDIUM).sum()),
    )


def shared_images(train: Annotations, val: Annotations) -> tuple[str, ...]:
    """Paths of the images that are in both splits."""
    paths = {record.path.resolve() for record in train.records}
    return tuple(str(record.path) for record in val.records if record.path.resolve() in paths)


def _spread(values: np.ndarray | list[int]) -> tuple[float, float, float]:
    if len(values) == 0:
        return 0.0, 0.0, 0.0
    return float(np.min(values)), float(np.median(values)), float(np.max(values))
