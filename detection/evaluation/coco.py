"""Average precision of a detector's boxes as COCO counts it: 12 numbers, by pycocotools or an equal of it."""

from __future__ import annotations

import contextlib
import io
import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from detection.files import write_whole

Backend = Literal["pycocotools", "faster-coco-eval"]

METRICS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
"""Names of pycocotools' `stats`, in its order: average precision and recall in [0, 1], -1 where nothing is defined."""


class CocoEvaluator:
    """Average precision and recall of boxes, as pycocotools counts them, or faster-coco-eval with equal numbers.

    Every image of the ground truth is evaluated: one that `update` never saw counts as having no detections. Only
    the categories in `category_ids` are evaluated. A number is -1 where its ground truth is empty (no boxes at all,
    or none of that size), and 0 where there are boxes but no detection found one.

    Args:
        ground_truth: COCO instances: "images" (id), "annotations" (image_id, category_id, bbox x y w h, area,
            iscrowd) and "categories" (id, name). It is not changed.
        category_ids: COCO category of label 1, 2, ..., K, that is `category_ids[label - 1]`.
        backend: which package counts: "pycocotools" or "faster-coco-eval".

    Attributes:
        results: one row of COCO's result format per detection, in order of arrival: image_id, category_id,
            bbox (x, y, w, h in pixels of the original image), score. `compute` needs nothing else, so rows gathered
            from several processes may take its place. Each image's rows have to be in it once: pycocotools counts
            a row that comes twice as a second detection.

    Raises:
        ImportError: the backend's package is not installed.
    """

    def __init__(
        self, ground_truth: Mapping[str, Any], category_ids: Sequence[int], backend: Backend = "pycocotools"
    ) -> None:
        self._coco_class, self._evaluation_class = import_backend(backend)
        self.category_ids = tuple(category_ids)
        self._names = category_names(ground_truth, self.category_ids)
        self._image_ids = {image["id"] for image in ground_truth["images"]}
        # Fresh ids from 1: pycocotools takes a box with id 0 for unmatched, and merges boxes that share an id.
        annotations = [
            {
                "id": index,
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": list(annotation["bbox"]),
                "area": annotation["area"],
                "iscrowd": annotation.get("iscrowd", 0),
            }
            for index, annotation in enumerate(ground_truth["annotations"], start=1)
        ]
        self._coco = self._index(annotations)
        self._updated: set[int] = set()
        self._per_class: dict[str, dict[str, float]] | None = None
        self.results: list[dict[str, Any]] = []

    def update(self, image_ids: Sequence[int], predictions: Sequence[Mapping[str, Tensor]]) -> None:
        """Add the detections of some images; nothing is added if one of them is refused.

        Args:
            image_ids: one id of the ground truth per image.
            predictions: torchvision's detections per image: "boxes" (N, 4) x1 y1 x2 y2 in pixels of the original
                image, "scores" (N,), "labels" (N,) in 1..K.
        """
        if len(image_ids) != len(predictions):
            raise ValueError(f"expected one prediction per image, got {len(predictions)} for {len(image_ids)} images")
        rows: list[dict[str, Any]] = []
        updated: set[int] = set()
        for image_id, prediction in zip(map(operator.index, image_ids), predictions, strict=True):
            if image_id not in self._image_ids:
                raise ValueError(f"image id {image_id} is not one of the ground truth's {len(self._image_ids)} images")
            if image_id in self._updated or image_id in updated:
                raise ValueError(f"image id {image_id} was updated twice; each image goes in once")
            updated.add(image_id)
            rows += self._rows(image_id, prediction)
        self._updated |= updated
        self.results.extend(rows)
        self._per_class = None

    def compute(self) -> dict[str, float]:
        """The 12 numbers of `METRICS` from `results`; `per_class` has its own afterwards."""
        check_image_ids(self.results, self._image_ids)
        # COCO.loadRes fails on an empty list and writes into the rows it is given; for boxes it adds only these keys.
        detections = self._index(
            [
                row | {"id": index, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
                for index, row in enumerate(self.results, start=1)
            ]
        )
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = self._evaluation_class(self._coco, detections, iouType="bbox")
            evaluation.params.catIds = list(self.category_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        self._per_class = self._by_category(evaluation)
        return dict(zip(METRICS, map(float, evaluation.stats), strict=True))

    def per_class(self) -> dict[str, dict[str, float]]:
        """Category name -> AP, AP50 (-1 without ground truth) and num_boxes (ground truth without crowds)."""
        if self._per_class is None:
            raise RuntimeError("per_class() reports the last compute(): call compute() after the last update()")
        return {name: dict(values) for name, values in self._per_class.items()}

    def save_results(self, path: str | Path) -> None:
        """Write `results` as a COCO results file; the file is replaced in one step or not at all.

        Every number is written in full, so the official tools count from it what `compute` counts. `COCO.loadRes` of
        pycocotools does not read a file without detections.
        """
        write_whole(Path(path), json.dumps(self.results).encode())

    def _index(self, annotations: list[dict[str, Any]]) -> COCO:
        """The backend's index of ground truth or detections."""
        coco = self._coco_class()
        coco.dataset = {
            "images": [{"id": image_id} for image_id in sorted(self._image_ids)],
            "annotations": [row for row in annotations if row["image_id"] in self._image_ids],
            "categories": [{"id": category_id} for category_id in self.category_ids],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def _rows(self, image_id: int, prediction: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """One image's detections as rows of COCO's result format."""
        missing = [key for key in ("boxes", "scores", "labels") if key not in prediction]
        if missing:
            raise ValueError(f"prediction for image id {image_id}: no {missing}, got the keys {sorted(prediction)}")
        boxes, scores, labels = prediction["boxes"], prediction["scores"], prediction["labels"]
        n = len(boxes) if boxes.dim() else 0
        for key, tensor, shape in (("boxes", boxes, (n, 4)), ("scores", scores, (n,)), ("labels", labels, (n,))):
            if tensor.shape != shape:
                raise ValueError(
                    f"prediction for image id {image_id}: expected boxes (N, 4), scores (N,), labels (N,), "
                    f"got {key} of shape {tuple(tensor.shape)} with N = {n}"
                )
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"prediction for image id {image_id}: expected integer labels, got {labels.dtype}")
        boxes, scores = boxes.detach().to("cpu", torch.float64), scores.detach().to("cpu", torch.float64)
        labels = labels.cpu()

        def check(valid: Tensor, values: Tensor, what: str, allowed: str) -> None:
            if not valid.all():
                index = int(valid.int().argmin())
                raise ValueError(
                    f"prediction for image id {image_id}: found {what} {values[index].tolist()} at index {index}; "
                    f"{allowed}"
                )

        check(boxes.isfinite().all(1), boxes, "box", "coordinates have to be finite")
        check((boxes[:, 2:] >= boxes[:, :2]).all(1), boxes, "box", "expected x1 <= x2 and y1 <= y2 (not x y w h)")
        check(scores.isfinite(), scores, "score", "scores have to be finite")
        num_classes = len(self.category_ids)
        check((labels >= 1) & (labels <= num_classes), labels, "label", f"labels are in 1..{num_classes}")

        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
        return [
            {"image_id": image_id, "category_id": self.category_ids[label - 1], "bbox": box, "score": score}
            for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
        ]

    def _by_category(self, evaluation: COCOeval) -> dict[str, dict[str, float]]:
        """AP and AP50 of each category: the means that `summarize` takes, over one category."""
        # (IoU thresholds, recall thresholds, categories); area "all" and 100 detections. Categories are sorted by id.
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        num_boxes = dict.fromkeys(self.category_ids, 0)
        for annotation in self._coco.anns.values():
            if annotation["category_id"] in num_boxes and not annotation["iscrowd"]:
                num_boxes[annotation["category_id"]] += 1
        order = sorted(self.category_ids)
        table = {}
        for category_id, name in zip(self.category_ids, self._names, strict=True):
            values = precision[:, :, order.index(category_id)]
            table[name] = {
                "AP": mean_defined(values),
                "AP50": mean_defined(values[0]),  # the thresholds start at IoU 0.5
                "num_boxes": num_boxes[category_id],
            }
        return table


def import_backend(backend: Backend) -> tuple[type, type]:
    """The classes of a backend that index annotations and that count: COCO and COCOeval, or what stands for them.

    Raises:
        ImportError: the backend's package is not installed.
        ValueError: no such backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend == "pycocotools":
        return COCO, COCOeval
    try:
        import faster_coco_eval
    except ImportError:
        raise ImportError(
            "evaluation.backend faster-coco-eval needs its package: pip install hoyer-det[fast]"
        ) from None
    return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster


def category_names(ground_truth: Mapping[str, Any], category_ids: Sequence[int]) -> list[str]:
    """Names of the categories, which have to be in the ground truth and to differ."""
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    unknown = [category_id for category_id in category_ids if category_id not in names]
    if unknown or not category_ids:
        raise ValueError(
            f"category_ids {unknown or list(category_ids)}: expected one or more of the ground truth's "
            f"categories {sorted(names)}"
        )
    chosen = [names[category_id] for category_id in category_ids]
    for what, values in (("category_ids", category_ids), ("names of category_ids", chosen)):
        if len(set(values)) < len(values):
            raise ValueError(f"{what}: expected each one once, got {list(values)}")
    return chosen


def check_image_ids(results: Sequence[Mapping[str, Any]], image_ids: set[int]) -> None:
    """Raise ValueError if detections lie on images that are not in the ground truth."""
    unknown = {row["image_id"] for row in results} - image_ids
    if unknown:
        raise ValueError(f"results: image ids {sorted(unknown)[:5]} are not in the ground truth")


def mean_defined(values: np.ndarray) -> float:
    """Mean of the entries above -1, pycocotools' mark for undefined; -1 without any."""
    defined = values[values > -1]
    return float(defined.mean()) if len(defined) else -1.0
