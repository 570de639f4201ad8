"""Likely mistakes in a recipe and its data: short runs, few boxes, objects beside cells and anchors that find them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from detection.config import Recipe, set_values
from detection.data.records import Annotations
from detection.models import build_detector
from detection.models.detectors import retinanet_anchors
from detection.text import plural

FEW = 10  # boxes of a class, below which it is hardly learnt
PADDED = 32  # torchvision pads images to multiples of so many pixels
MOST = 20_000  # objects that are looked at


class Objects(NamedTuple):
    """Objects as the network sees them.

    Shape:
        boxes: (M, 4) float64 x1 y1 x2 y2 in pixels of the resized image.
        images: (M, 2) int64 height and width of the padded image of each.
    """

    boxes: np.ndarray
    images: np.ndarray

    @property
    def sides(self) -> np.ndarray:
        """Square roots of their areas in pixels, (M,)."""
        return np.sqrt(np.prod(self.boxes[:, 2:] - self.boxes[:, :2], axis=1))


def resized(annotations: Annotations, min_size: int, max_size: int, *, square: bool = False) -> Objects:
    """Return the objects that are trained on, of images resized as torchvision's detectors do; at most about `MOST`.

    A square, as of an SSD, has sides of `max_size`.
    """
    boxes, images = [np.empty((0, 4))], [np.empty((0, 2), dtype=np.int64)]
    for record in annotations.records:
        sides = np.array([record.width, record.height])
        scale = max_size / sides if square else np.full(2, min(min_size / sides.min(), max_size / sides.max()))
        own = record.boxes[~record.ignore].astype(np.float64) * np.tile(scale, 2)
        padded = [math.ceil(int(side) / PADDED) * PADDED for side in (sides * scale)[::-1]]
        boxes.append(own)
        images.append(np.tile(np.maximum(padded, PADDED), (len(own), 1)))
    found = Objects(np.concatenate(boxes), np.concatenate(images))
    step = max(1, len(found.boxes) // MOST)
    return Objects(found.boxes[::step], found.images[::step])


def best_overlaps(objects: Objects, strides: Sequence[int], scale: float) -> np.ndarray:
    """Return the IoU of each object with the RetinaNet anchor that covers it best, (M,) in [0, 1].

    An anchor of some shape overlaps most where its centre is nearest, so that one place per shape is looked at.

    Args:
        objects: the objects.
        strides: of the levels, finest first.
        scale: `model.head.anchor_scale`.
    """
    best = np.zeros(len(objects.boxes))
    low, high = objects.boxes[:, :2], objects.boxes[:, 2:]
    areas, centres = np.prod(high - low, axis=1), (low + high) / 2
    for stride, shapes in zip(strides, retinanet_anchors(strides, scale).cell_anchors, strict=True):
        cells = np.ceil(objects.images[:, ::-1] / stride)  # x, y
        pixels = objects.images[:, ::-1] // cells  # per cell, as torchvision counts them
        places = np.clip(np.round(centres / pixels), 0, cells - 1) * pixels
        for shape in shapes.double().numpy():
            sides = np.minimum(high, places + shape[2:]) - np.maximum(low, places + shape[:2])
            inner = np.prod(np.clip(sides, 0, None), axis=1)
            best = np.maximum(best, inner / (areas + np.prod(shape[2:] - shape[:2]) - inner))
    return best


def run_warnings(config: Recipe, num_images: int) -> list[str]:
    """Return a sentence for each warm-up that is longer than the run on so many images."""
    train, optimizer, hoyer, found = config.train, config.optimizer, config.hoyer, []
    steps = math.ceil(math.ceil(num_images / train.batch_size) / train.accumulate) * train.epochs
    if optimizer.warmup_steps > steps // 2:
        found.append(
            f"optimizer.warmup_steps {optimizer.warmup_steps}: the whole run has {plural(steps, 'step')}, and the "
            f"warm-up is half of them, {steps // 2}"
        )
    if hoyer.weight and hoyer.warmup_epochs >= train.epochs:
        found.append(
            f"hoyer.warmup_epochs {hoyer.warmup_epochs:g}: the whole run has {plural(train.epochs, 'epoch')}, so that "
            "the regulariser never reaches its weight"
        )
    return found


def small_objects(config: Recipe, annotations: Annotations) -> list[str]:
    """Return a sentence about objects that are smaller than a cell of the finest map, if there are any."""
    plain = set_values(config, {"model.backbone.weights": None, "data.classes": ["object"]})
    with torch.device("meta"):  # without memory for weights
        stride = build_detector(plain).backbone.strides[0]
    min_size, max_size = config.model.min_size[-1], config.model.max_size
    sides = resized(annotations, min_size, max_size, square=config.model.detector == "ssd").sides
    small = int((sides < stride).sum())
    if not small:
        return []
    return [
        f"{small} of {plural(len(sides), 'object')} are smaller than a cell of the finest level, {stride} pixels, "
        f"in images of {min_size} pixels (model.min_size): they are hardly found; a larger model.min_size and "
        "model.max_size, or a finer level in model.neck.levels, may help"
    ]


def few_boxes(annotations: Annotations) -> list[str]:
    """Return a sentence for each class with fewer than `FEW` boxes to train on."""
    labels = Counter(label for each in annotations.records for label in each.labels[~each.ignore].tolist())
    return [
        f"class {name!r} has {plural(labels[label], 'box', 'boxes')}, fewer than {FEW}: too few to learn it"
        for label, name in enumerate(annotations.categories, start=1)
        if labels[label] < FEW
    ]
