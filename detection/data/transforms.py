"""Augmentation of images with their boxes: the only file that knows albumentations."""

from __future__ import annotations

import math
import os
import random
from typing import Any

import numpy as np
import torch

from detection.config import Augment
from detection.data.records import Transform

# albumentations looks for a newer version of itself on the network while it is imported. Set outright: a value that
# is already in the environment may be one that allows it.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import albumentations as A

# A crop keeps at least this fraction of each side, so that a lone small object is not blown up to the whole image.
MIN_CROP = 0.5


def build_transform(augment: Augment) -> Transform:
    """(image (H, W, 3) uint8, boxes (M, 4) x1 y1 x2 y2, labels (M,)) -> the same, changed at random.

    Boxes come back as float32 inside the image, with their labels as int64. A crop changes the image's size: its
    window contains every box and at least half of each side; the detector resizes anyway. Flipped and shifted
    coordinates are exact to about W * 1e-7 pixels, since albumentations divides by the size in float32.

    All randomness is drawn from torch's global generator, which `torch.manual_seed` sets and which DataLoader seeds
    in each worker.
    """
    return _Transform(augment)


class _Transform:
    def __init__(self, augment: Augment) -> None:
        self.compose = A.Compose(
            [
                A.HorizontalFlip(p=augment.hflip),
                A.VerticalFlip(p=augment.vflip),
                _WholeBoxCrop(p=augment.crop),
                A.ColorJitter(
                    brightness=(0.7, 1.3), contrast=(0.7, 1.3), saturation=(0.6, 1.4), hue=(0, 0), p=augment.color
                ),
            ],
            # A box so thin that it vanishes in float32 is taken out rather than refused.
            bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"], filter_invalid_bboxes=True),
        )

    def __call__(
        self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seed = int(torch.randint(2**62, ()))
        # Not set_random_seed(seed): that starts every transform from the same seed, and both flips always coincide.
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        result = self.compose(image=image, bboxes=boxes, labels=labels)
        image = result["image"]
        height, width = image.shape[:2]
        # The one place that casts: labels come back as a list or as floats, boxes as float64 slightly off the border.
        boxes = np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 4)
        boxes = np.clip(boxes, 0, np.array([width, height, width, height], dtype=np.float32))
        labels = np.asarray(result["labels"], dtype=np.int64).reshape(-1)
        kept = (boxes[:, :2] < boxes[:, 2:]).all(axis=1)
        return image, boxes[kept], labels[kept]


class _WholeBoxCrop(A.BBoxSafeRandomCrop):
    """Crops to a random window around all boxes.

    The base class rounds its window inwards, which cuts a pixel off boxes and fails for boxes thinner than that; and
    it never crops an image without boxes.
    """

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        boxes = np.asarray(data["bboxes"])[:, :4] * [width, height, width, height]
        left, right = self._draw_window(boxes[:, 0], boxes[:, 2], width)
        top, bottom = self._draw_window(boxes[:, 1], boxes[:, 3], height)
        return {"crop_coords": (left, top, right, bottom)}

    def _draw_window(self, low: np.ndarray, high: np.ndarray, size: int) -> tuple[int, int]:
        """Start and end of a window in [0, size] that contains [low, high]."""
        first = max(0, math.floor(low.min(initial=size)))
        last = min(size, math.ceil(high.max(initial=0)))
        length = self.py_random.randint(max(math.ceil(MIN_CROP * size), last - first), size)
        start = self.py_random.randint(max(0, last - length), min(first, size - length))
        return start, start + length
