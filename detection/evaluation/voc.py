"""Average precision as PASCAL VOC's development kit counts it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

from detection.evaluation.coco import Detections, category_names, mean_defined, sorted_ids

Interpolation = Literal["area", "11-point"]


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision over recall of one class: a point per detection, that one and all with higher scores taken together.

    Detections on difficult boxes are left out, as they are neither right nor wrong.

    Attributes:
        scores: (N,) falling.
        true_positives: (N,) boxes found by the first 1, 2, ..., N detections.
        num_boxes: boxes to be found, so without difficult ones.
    """

    scores: np.ndarray
    true_positives: np.ndarray
    num_boxes: int

    @property
    def recall(self) -> np.ndarray:
        """(N,) share of the boxes that are found; NaN without boxes."""
        return self.true_positives / (self.num_boxes or np.nan)

    @property
    def precision(self) -> np.ndarray:
        """(N,) share of the detections that are right."""
        return self.true_positives / np.arange(1, len(self.scores) + 1)

    @property
    def envelope(self) -> np.ndarray:
        """(N,) highest precision here or further on, so at no lower recall: precision made monotone from the right."""
        return np.maximum.accumulate(self.precision[::-1])[::-1]


def precision_recall(
    ground_truth: Mapping[str, Any], detections: Detections, category_ids: Sequence[int], iou_threshold: float = 0.5
) -> dict[str, PrecisionRecall]:
    """Return category name -> precision over recall, counted as PASCAL VOC's development kit does.

    The detections of a class are gone through over all images, highest score first, equal scores in order of arrival.
    Each one goes to the box of its image and class that it overlaps most, the first of equals, difficult or not; it
    never moves on to another box, as it would in COCO. With IoU = intersection / union below the threshold it is
    wrong; on a difficult box it is left out; on a box that no detection has taken yet it is right; else it is wrong.

    The development kit adds 1 to widths and heights, because its boxes are pixels counted from 1, the last one
    included. The readers turn such a box into (xmin - 1, ymin - 1, xmax, ymax), whose width has the 1 already, so
    both give the same IoU.

    Args:
        ground_truth: COCO instances as for `CocoEvaluator`; iscrowd = 1 says difficult.
        detections: such as `CocoEvaluator.detections`, or `Detections.from_rows` of a file of results.
        category_ids: the categories to count, that of label 1 first.
        iou_threshold: in (0, 1].

    Raises:
        ValueError: a part of the ground truth is missing, a category is not in it, or twice, or the threshold is wrong.
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold: expected a number in (0, 1], got {iou_threshold}")
    names = category_names(ground_truth, category_ids)
    number_of = {image_id: number for number, image_id in enumerate(sorted_ids(ground_truth))}
    boxes: dict[int, dict[int, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for annotation in ground_truth["annotations"]:
        if annotation["image_id"] in number_of:
            row = [*annotation["bbox"], annotation.get("iscrowd", 0)]
            boxes[annotation["category_id"]][number_of[annotation["image_id"]]].append(row)
    return {
        name: _match(boxes[category_id], detections.choose(detections.label == label), iou_threshold)
        for label, (name, category_id) in enumerate(zip(names, category_ids, strict=True), start=1)
    }


def average_precision(curve: PrecisionRecall, interpolation: Interpolation) -> float:
    """PASCAL VOC's average precision in [0, 1]; 0 if nothing is found, -1 if there is nothing to find.

    With p(r) the highest precision at recall >= r: "area" (from 2010 on) is the integral of p over r in [0, 1],
    "11-point" (until 2009) the mean of p(r) over r = 0, 0.1, ..., 1.
    """
    if interpolation not in get_args(Interpolation):
        raise ValueError(f"interpolation: expected one of {', '.join(get_args(Interpolation))}, got {interpolation!r}")
    if curve.num_boxes == 0:
        return -1.0
    if interpolation == "area":
        right = np.diff(curve.true_positives, prepend=0) > 0  # recall rises by 1 / num_boxes at each of them
        return float(curve.envelope[right].sum() / curve.num_boxes)
    # Whether true_positives / num_boxes >= k / 10 is asked in integers: 3 of 10 boxes are 0.3, but 3 * 0.1 > 0.3.
    first = np.searchsorted(10 * curve.true_positives, curve.num_boxes * np.arange(11))
    return float(np.append(curve.envelope, 0.0)[first].mean())  # precision 0 at a recall that is never reached


def mean_average_precision(curves: Mapping[str, PrecisionRecall], interpolation: Interpolation) -> float:
    """Mean of `average_precision` over the classes that have boxes; -1 if none has."""
    return mean_defined(np.array([average_precision(curve, interpolation) for curve in curves.values()]))


def _match(boxes: Mapping[int, Sequence[Sequence[float]]], found: Detections, iou_threshold: float) -> PrecisionRecall:
    """The curve of one class from its boxes (x, y, w, h, difficult) by number of the image and its detections."""
    found = found.choose(np.argsort(-found.scores, kind="stable"))
    of_image: dict[int, list[int]] = defaultdict(list)
    for position, image in enumerate(found.image.tolist()):
        of_image[image].append(position)

    taken = np.full(len(found), -1)  # the box that each detection goes to, numbered over all images; -1: none
    difficult: list[bool] = []
    for image, truth in boxes.items():
        positions = of_image.get(image)
        if positions:
            overlaps = _iou(found.boxes[positions], np.array([box[:4] for box in truth], dtype=np.float64))
            best = overlaps.argmax(1)
            enough = overlaps.max(1) >= iou_threshold
            taken[positions] = np.where(enough, len(difficult) + best, -1)
        difficult += [bool(box[4]) for box in truth]

    on_box = np.flatnonzero(taken >= 0)
    ignored = np.zeros(len(found), dtype=bool)
    ignored[on_box] = np.array(difficult, dtype=bool)[taken[on_box]]
    right = np.zeros(len(found), dtype=bool)
    right[on_box[np.unique(taken[on_box], return_index=True)[1]]] = True  # of each box's detections the first
    return PrecisionRecall(found.scores[~ignored], np.cumsum(right[~ignored]), len(difficult) - sum(difficult))


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, M) intersection over union of (N, 4) and (M, 4) x y w h; 0 where both boxes have no area."""
    # Every length is taken from corners: with w * h for an area, rounding would make the IoU of equal boxes miss 1.
    corners = (box_convert(torch.from_numpy(boxes), "xywh", "xyxy") for boxes in (a, b))
    return box_iou(*corners).nan_to_num(0.0).numpy()
