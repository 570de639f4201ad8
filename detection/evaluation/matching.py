"""Right and wrong detections of an image, and the boxes that are missed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torchvision.ops import box_iou

from detection.data.records import Record

IOU_THRESHOLD = 0.5


@dataclass(frozen=True)
class Match:
    """The detections of one image beside its boxes.

    Attributes:
        detections: x1, y1, x2, y2, score, label of each, highest score first.
        right: per detection whether it finds a box; None on a difficult box, where it is neither right nor wrong.
        found: per box whether it is found.
        ignore: per box whether it is difficult.
    """

    detections: list[list[float]]
    right: list[bool | None]
    found: list[bool]
    ignore: list[bool]

    @property
    def num_right(self) -> int:
        """Detections that find a box."""
        return self.right.count(True)

    @property
    def num_wrong(self) -> int:
        """Detections that find none."""
        return self.right.count(False)

    @property
    def num_missed(self) -> int:
        """Boxes that no detection finds, difficult ones left out."""
        return sum(not found and not ignore for found, ignore in zip(self.found, self.ignore, strict=True))

    @property
    def f1(self) -> float:
        """2 right / (2 right + wrong + missed), in [0, 1]; 1 where there is nothing to find and nothing found."""
        total = 2 * self.num_right + self.num_wrong + self.num_missed
        return 2 * self.num_right / total if total else 1.0


def match(record: Record, detections: Iterable[Sequence[float]]) -> Match:
    """Match the detections of an image with its boxes, by VOC's rule as in `precision_recall`, at IoU 0.5.

    Args:
        record: the image and its boxes.
        detections: x1, y1, x2, y2, score, label of each.
    """
    rows = sorted((list(row) for row in detections), key=lambda row: -row[4])
    found = [False] * len(record.boxes)
    right: list[bool | None] = []
    boxes = torch.from_numpy(record.boxes)
    for row in rows:
        overlaps = box_iou(torch.tensor([row[:4]]), boxes)[0] if len(boxes) else torch.zeros(0)
        overlaps[torch.from_numpy(record.labels != int(row[5]))] = 0
        best = int(overlaps.argmax()) if len(overlaps) else -1
        if best < 0 or overlaps[best] < IOU_THRESHOLD:
            right.append(False)
        elif record.ignore[best]:
            right.append(None)
        else:
            right.append(not found[best])
            found[best] = True
    return Match(rows, right, found, record.ignore.tolist())
