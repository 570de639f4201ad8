"""Augmentation of images with their boxes: the only file that knows albumentations."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch

from detection.config.schema import Augment
from detection.data.dataset import Mixture, Sample, Transform

# albumentations looks for a newer version of itself on the network while it is imported. Set outright: a value that
# is already in the environment may be one that allows it.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import albumentations as A
from albumentations.core.transforms_interface import BaseTransformInitSchema
from albumentations.core.type_definitions import Targets

# OpenCV's pool of threads does not survive a fork: a loader worker of a process that has one would wait for ever.
cv2.setNumThreads(0)

# A crop keeps at least this fraction of each side, so that a lone small object is not blown up to the whole image.
MIN_CROP = 0.5

# SSD's random crop (Liu et al., arXiv:1512.02325): the window's sides as shares of the image's, its shape, and the
# IoU that it must have with some object, None for any; one is drawn after the other until a window is found.
WINDOW_SIDE = (0.3, 1.0)
WINDOW_RATIO = (0.5, 2.0)
WINDOW_IOU = (None, 0.1, 0.3, 0.5, 0.7, 0.9)
WINDOW_TRIES = 50

MIN_VISIBLE = 0.3  # scale jitter keeps objects of which at least this share of the area is in the frame
FRAME_COLOR = 114  # grey level around a shrunk image; nothing is around a frame of events

# Where the four images of a mosaic meet, in shares of each side.
MEETING_POINT = (0.3, 0.7)
BLEND = 32.0  # both parameters of the beta distribution of an image's weight in a mixup: near one half


def build_transform(augment: Augment) -> Transform:
    """(image (H, W, 3) uint8, boxes (M, 4) x1 y1 x2 y2, labels (M,)) -> the same, changed at random.

    Boxes come back as float32 inside the image, with their labels as int64. Crops change the image's size; the
    detector resizes anyway. Flipped and shifted coordinates are exact to about W * 1e-7 pixels, since albumentations
    divides by the size in float32.

    - crop: a window of at least half of each side that contains every box whole.
    - iou_crop: SSD's window, which may cut boxes; an object stays if its centre does, and at least one stays.
    - scale: the image shrunk or enlarged by a factor drawn evenly from `scale_range`, at a random place in a frame of
      its own size; objects stay, cut off at the frame, if 0.3 of their area does. Where none of 50 places shows an
      object, the image stays as it is.

    All randomness is drawn from torch's global generator, which `torch.manual_seed` sets and which DataLoader seeds
    in each worker.
    """
    return _Transform(augment)


def build_mixture(augment: Augment) -> Mixture | None:
    """(sample, draw) -> the sample with others in it, at random, as `augment` says; None where it says neither.

    A sample is (image (H, W, 3) uint8, boxes (M, 4) x1 y1 x2 y2 float32, labels (M,) int64); draw() gives one of the
    data set. The size stays that of the image; an image is scaled so that it just covers its place, and cut to it at
    random. Objects stay, cut off there, if 0.3 of their area does.

    - mosaic (Bochkovskiy et al., arXiv:2004.10934): the image and three others, in a random order, meet in a point.
    - mixup (Zhang et al., arXiv:1710.09412): with weights w and 1 - w of pixels, all objects of both.

    All randomness is drawn from torch's global generator.
    """
    return _Mixture(augment.mosaic, augment.mixup) if augment.mosaic or augment.mixup else None


class _Mixture:
    def __init__(self, mosaic: float, mixup: float) -> None:
        self.mosaic, self.mixup = mosaic, mixup

    def __call__(self, sample: Sample, draw: Callable[[], Sample]) -> Sample:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        if rng.random() < self.mosaic:
            sample = _mosaic([sample, *(draw() for _ in range(3))], rng)
        if rng.random() < self.mixup:
            sample = _blend(sample, draw(), rng)
        return sample


def _mosaic(samples: list[Sample], rng: np.random.Generator) -> Sample:
    """Four samples, in a random order, in the four parts of a frame of the first one's size."""
    frame = np.empty_like(samples[0][0])
    height, width = frame.shape[:2]
    x, y = (max(1, round(rng.uniform(*MEETING_POINT) * side)) for side in (width, height))
    places = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for number, (x1, y1, x2, y2) in zip(rng.permutation(4), places, strict=True):
        if x1 < x2 and y1 < y2:  # an image of one pixel has a single place
            frame[y1:y2, x1:x2], boxes, labels = _cover(samples[number], (x1, y1, x2, y2), rng)
            found.append((boxes, labels))
    boxes, labels = (np.concatenate(column) for column in zip(*found, strict=True))
    return frame, boxes, labels


def _blend(sample: Sample, other: Sample, rng: np.random.Generator) -> Sample:
    image, boxes, labels = sample
    more, more_boxes, more_labels = _cover(other, (0, 0, *image.shape[1::-1]), rng)
    weight = rng.beta(BLEND, BLEND)
    mixed = (weight * image + (1 - weight) * more).round().astype(image.dtype)
    return mixed, np.concatenate([boxes, more_boxes]), np.concatenate([labels, more_labels])


def _cover(sample: Sample, place: tuple[int, int, int, int], rng: np.random.Generator) -> Sample:
    """A sample scaled so that it just covers a place x1, y1, x2, y2 of a frame, cut to it at random, boxes there."""
    image, boxes, labels = sample
    height, width = image.shape[:2]
    corner, size = place[:2], (place[2] - place[0], place[3] - place[1])
    factor = max(size[0] / width, size[1] / height)
    scaled_size = max(size[0], round(factor * width)), max(size[1], round(factor * height))
    left, top = (int(rng.integers(have - want + 1)) for have, want in zip(scaled_size, size, strict=True))
    scaled = _resize(image, scaled_size, shrinks=factor < 1)
    rows = np.column_stack([boxes / np.tile([width, height], 2), labels])
    rows = _place(rows, size, scaled_size, (-left, -top))
    moved = (rows[:, :4] * np.tile(size, 2) + np.tile(corner, 2)).astype(np.float32)
    kept = (moved[:, :2] < moved[:, 2:]).all(axis=1)
    return scaled[top : top + size[1], left : left + size[0]], moved[kept], rows[kept, 4].astype(np.int64)


class _Transform:
    def __init__(self, augment: Augment) -> None:
        self.compose = A.Compose(
            [
                A.HorizontalFlip(p=augment.hflip),
                A.VerticalFlip(p=augment.vflip),
                _ScaleJitter(augment.scale_range, p=augment.scale),
                _IoUCrop(p=augment.iou_crop),
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


class _IoUCrop(A.BBoxSafeRandomCrop):
    """Crops to a window that overlaps some object by a drawn IoU; objects stay if their centre is in it, clipped."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        boxes = np.asarray(data["bboxes"])[:, :4] * [width, height, width, height]
        for wanted in self.py_random.sample(WINDOW_IOU, len(WINDOW_IOU)):
            for _ in range(WINDOW_TRIES):
                window = self._draw_window(width, height)
                w, h = window[2:] - window[:2]
                if not WINDOW_RATIO[0] <= w / h <= WINDOW_RATIO[1]:
                    continue
                if len(boxes) == 0 or (
                    _centers_inside(boxes, window).any()
                    and (wanted is None or _overlap(boxes, window)[1].max() >= wanted)
                ):
                    return {"crop_coords": tuple(window.tolist())}
        return {"crop_coords": (0, 0, width, height)}

    def _draw_window(self, width: int, height: int) -> np.ndarray:
        w, h = (max(1, round(self.py_random.uniform(*WINDOW_SIDE) * side)) for side in (width, height))
        left, top = self.py_random.randint(0, width - w), self.py_random.randint(0, height - h)
        return np.array([left, top, left + w, top + h])

    def apply_to_bboxes(self, bboxes: np.ndarray, crop_coords: tuple[int, ...], **params: Any) -> np.ndarray:
        height, width = params["shape"][:2]
        inside = _centers_inside(bboxes[:, :4] * [width, height, width, height], np.array(crop_coords))
        return super().apply_to_bboxes(bboxes[inside], crop_coords, **params)


class _ScaleJitter(A.DualTransform):
    """Shrinks or enlarges the image within a frame of its own size."""

    _targets = (Targets.IMAGE, Targets.BBOXES)

    class InitSchema(BaseTransformInitSchema):
        scale_range: tuple[float, float]

    def __init__(self, scale_range: tuple[float, float], p: float = 1.0) -> None:
        super().__init__(p=p)
        self.scale_range = scale_range

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        boxes = np.asarray(data["bboxes"])
        factor = self.py_random.uniform(*self.scale_range)
        w, h = max(1, round(factor * width)), max(1, round(factor * height))
        for _ in range(WINDOW_TRIES):
            # Negative where the scaled image is larger than the frame.
            left, top = (self.py_random.randint(min(0, slack), max(0, slack)) for slack in (width - w, height - h))
            if len(boxes) == 0 or len(_place(boxes, (width, height), (w, h), (left, top))):
                return {"scaled_size": (w, h), "offset": (left, top)}
        return {"scaled_size": (width, height), "offset": (0, 0)}

    def apply(
        self, img: np.ndarray, scaled_size: tuple[int, int], offset: tuple[int, int], **params: Any
    ) -> np.ndarray:
        (w, h), (left, top) = scaled_size, offset
        height, width = img.shape[:2]
        scaled = _resize(img, scaled_size, shrinks=w < width)
        frame = np.full_like(img, FRAME_COLOR if img.shape[2] == 3 else 0)
        x1, y1, x2, y2 = max(0, left), max(0, top), min(width, left + w), min(height, top + h)
        frame[y1:y2, x1:x2] = scaled[y1 - top : y2 - top, x1 - left : x2 - left]
        return frame

    def apply_to_bboxes(
        self, bboxes: np.ndarray, scaled_size: tuple[int, int], offset: tuple[int, int], **params: Any
    ) -> np.ndarray:
        height, width = params["shape"][:2]
        return _place(bboxes, (width, height), scaled_size, offset)


def _resize(image: np.ndarray, size: tuple[int, int], *, shrinks: bool) -> np.ndarray:
    """An image (H, W, C) of any number of channels in another size, width and height."""
    kind = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    # OpenCV takes four channels at a time; frames of events have more.
    parts = np.split(image, range(4, image.shape[2], 4), axis=2)
    return np.dstack([cv2.resize(np.ascontiguousarray(part), size, interpolation=kind) for part in parts])


def _place(
    boxes: np.ndarray, size: tuple[int, int], scaled_size: tuple[int, int], offset: tuple[int, int]
) -> np.ndarray:
    """Boxes (N, 4 or more) in shares of the image -> those that stay visible, in shares of the frame, clipped to it."""
    moved = boxes.copy()
    moved[:, :4] = boxes[:, :4] * np.tile(np.divide(scaled_size, size), 2) + np.tile(np.divide(offset, size), 2)
    visible = _overlap(moved[:, :4], np.array([0, 0, 1, 1]))[0]
    moved[:, :4] = moved[:, :4].clip(0, 1)
    return moved[visible >= MIN_VISIBLE]


def _centers_inside(boxes: np.ndarray, window: np.ndarray) -> np.ndarray:
    centers = (boxes[:, :2] + boxes[:, 2:4]) / 2
    return ((centers > window[:2]) & (centers < window[2:])).all(axis=1)


def _overlap(boxes: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of each box (N, 4) that lies in the window (4,), and its IoU with it; 0 for boxes without area."""
    sides = np.minimum(boxes[:, 2:4], window[2:]) - np.maximum(boxes[:, :2], window[:2])
    common = sides.clip(0).prod(axis=1)
    areas = (boxes[:, 2:4] - boxes[:, :2]).prod(axis=1)
    union = areas + (window[2:] - window[:2]).prod() - common
    return common / np.maximum(areas, 1e-12), common / union
