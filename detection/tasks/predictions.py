"""Predictions for single images: boxes with scores and names, or class probabilities."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from detection.runs import Run
from detection.text import plural

PIXELS = 2**26  # of the images that are in memory at a time, if they are several: 800 MB as floats
Item = TypeVar("Item")


def in_batches(items: Iterable[Item], most: int, size: Callable[[Item], int] = lambda item: 0) -> Iterator[list[Item]]:
    """Yield the items in lists of at most `most`, which have `PIXELS` at most, or are of one item.

    Args:
        items: images, or what stands for them.
        most: length of a list.
        size: pixels of an item.
    """
    batch, total = [], 0
    for item in items:
        pixels = size(item)
        if batch and total + pixels > PIXELS:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += pixels
        if len(batch) == most:  # at once, since a camera may take its time over the next one
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


@dataclass(frozen=True, eq=False, repr=False)
class AnyPrediction:
    """The answer of a network to one image.

    Attributes:
        image: (H, W, 3) uint8 RGB, upright, whole: the network may have seen a part of it.
        class_names: of all classes, in label order.
        path: file that the image comes from; None: it was given as pixels.
    """

    image: np.ndarray
    class_names: tuple[str, ...]
    path: Path | None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels, as PIL has it."""
        return self.image.shape[1], self.image.shape[0]

    def __repr__(self) -> str:
        width, height = self.size
        of = "" if self.path is None else f"{self.path}, "
        return f"{type(self).__name__}({of}{width}x{height} pixels: {self})"

    def draw(self) -> Image.Image:
        """Return the image with the prediction in it; a small one is enlarged and a huge one reduced."""
        raise NotImplementedError

    def to_results(self, image_id: int) -> list[dict[str, Any]]:
        """Return the rows of a file of results."""
        raise NotImplementedError

    def above(self, score_threshold: float) -> Self:
        """Return the prediction without boxes whose score is not higher; itself, if it has none."""
        return self

    def top(self, number: int = 5) -> list[tuple[str, float]]:
        """Return the likeliest classes of the image; none, where it has boxes instead."""
        return []

    def since(self, clean: Self) -> str:
        """Say what has become of another prediction of the same image, such as one without noise."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class Prediction(AnyPrediction):
    """The boxes that a detector finds in one image, highest score first.

    Attributes:
        boxes: (N, 4) float32 x1 y1 x2 y2 in pixels of `image`.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64 in 1..K; label k is class_names[k - 1].
        category_ids: COCO's category of the labels 1..K.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    category_ids: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        """The class name of each box."""
        return [self.class_names[label - 1] for label in self.labels.tolist()]

    def to_results(self, image_id: int) -> list[dict[str, Any]]:
        """Return rows of COCO's result format: image_id, category_id, bbox (x, y, width, height), score."""
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        return [
            {
                "image_id": image_id,
                "category_id": self.category_ids[label - 1],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for (x1, y1, x2, y2), score, label in rows
        ]

    def above(self, score_threshold: float) -> Self:
        kept = self.scores > score_threshold
        return replace(self, boxes=self.boxes[kept], scores=self.scores[kept], labels=self.labels[kept])

    def since(self, clean: Self) -> str:
        """Count boxes by the rule of `matching.match`: IoU of 0.5 and the same class."""
        from detection.data.records import Record
        from detection.evaluation.matching import match

        boxes, labels = clean.boxes.numpy(), clean.labels.numpy()
        ignore, area = np.zeros(len(clean), bool), np.zeros(len(clean))
        record = Record(Path(), 0, *clean.size, boxes, labels, ignore, area)
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        matched = match(record, [[*corners, score, label] for corners, score, label in rows])
        return f"{matched.num_right} of {len(clean)} found again, {matched.num_missed} lost, {matched.num_wrong} new"

    def draw(self) -> Image.Image:
        """Return the image with its boxes, see `draw.draw_detections`."""
        from detection.draw import draw_detections

        found = {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}
        return Image.fromarray(draw_detections(self.image, found, self.class_names))

    def __len__(self) -> int:
        return len(self.scores)

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {name}" for name, number in Counter(self.names).most_common())
        return plural(len(self), "detection") + (f" ({counts})" if counts else "")


@dataclass(frozen=True, eq=False, repr=False)
class ClassPrediction(AnyPrediction):
    """The class probabilities of one image.

    Attributes:
        probabilities: (K,) float32, they add up to 1; number k belongs to class_names[k].
    """

    probabilities: Tensor

    def top(self, number: int = 5) -> list[tuple[str, float]]:
        """Return the likeliest classes with their probabilities, the likeliest first; all, if there are fewer."""
        values, labels = self.probabilities.topk(min(number, len(self.class_names)))
        return [(self.class_names[label], value) for label, value in zip(labels.tolist(), values.tolist(), strict=True)]

    def to_results(self, image_id: int) -> list[dict[str, Any]]:
        """Return one row: image_id, and the likeliest classes with their probabilities."""
        return [{"image_id": image_id, "probabilities": dict(self.top())}]

    def since(self, clean: Self) -> str:
        (name, before), now = clean.top(1)[0], self.top(1)[0][0]
        share = float(self.probabilities[self.class_names.index(name)])
        return f"{'still' if now == name else 'no longer'} {name}, probability {share:.3f} instead of {before:.3f}"

    def draw(self) -> Image.Image:
        """Return the image with its five likeliest classes in the corner, sized as a detector's."""
        from detection.draw import draw_classes

        return Image.fromarray(draw_classes(self.image, self.top()))

    def __str__(self) -> str:
        return ", ".join(f"{name} {probability:.3f}" for name, probability in self.top())


def read_category_ids(run: Run) -> tuple[tuple[int, ...], Path | None]:
    """Return COCO's category of label 1, 2, ..., K, and the file that says so.

    That is run.json. Where that is missing, or of an earlier version, which did not write them, they are other ones
    than 1..K only if the run is on COCO files: then their annotation file says it. Where that is gone, or has other
    classes by now, it is 1..K and no file.
    """
    known, config = (run.folder / "run.json").is_file(), run.config
    recorded = run.info().category_ids if known else None
    if recorded is not None:
        return tuple(recorded), run.folder / "run.json"
    classes = config.data.classes
    numbers = tuple(range(1, len(classes) + 1))
    if config.data.format != "coco":
        return numbers, None
    try:
        path = config.data.root / (config.data.val or config.data.train)[0]  # without val, a part of train is for that
        id_of = {item["name"]: int(item["id"]) for item in json.loads(path.read_text("utf-8"))["categories"]}
        return tuple(id_of[name] for name in classes), path
    except (OSError, ValueError, LookupError, TypeError):
        return numbers, None
