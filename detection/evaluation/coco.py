"""Average precision of a detector's boxes as COCO counts it: 12 numbers, by pycocotools or an equal of it."""

from __future__ import annotations

import contextlib
import io
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from detection.files import write_list

Backend = Literal["pycocotools", "faster-coco-eval"]

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
METRICS += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")
"""Names of pycocotools' `stats`, in its order: average precision and recall in [0, 1], -1 where nothing is defined."""


@dataclass
class Detections:
    """Detections in columns: 56 bytes each, where a row of COCO's result format has ten times as many.

    Attributes:
        image: (N,) int64, number of the image, as its place in the ground truth.
        label: (N,) int64 in 1..K.
        boxes: (N, 4) float64 x y width height in pixels of the original image.
        scores: (N,) float64.
    """

    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    @classmethod
    def none(cls) -> Detections:
        """Return no detections."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], ground_truth: Mapping[str, Any], category_ids: Sequence[int]
    ) -> Detections:
        """Return rows of COCO's result format in columns; those of other categories are left out.

        Raises:
            ValueError: an image id is not in the ground truth, or a row lacks a key, or numbers.
        """
        number_of = {image_id: number for number, image_id in enumerate(sorted_ids(ground_truth))}
        label_of = {category_id: label for label, category_id in enumerate(category_ids, start=1)}
        rows = [*rows]
        require_keys(rows, ("image_id", "category_id", "bbox", "score"), "results")
        kept = [row for row in rows if row["category_id"] in label_of]
        unknown = {row["image_id"] for row in kept} - number_of.keys()
        if unknown:
            raise ValueError(f"results: image ids {in_order(unknown)[:5]} are not in the ground truth")
        for row in kept:
            if len(row["bbox"]) != 4 or not all(map(math.isfinite, (*row["bbox"], row["score"]))):
                raise ValueError(f"results: expected a bbox x y w h and a score, all finite, got {row}")
        return cls(
            np.array([number_of[row["image_id"]] for row in kept], dtype=np.int64),
            np.array([label_of[row["category_id"]] for row in kept], dtype=np.int64),
            np.array([row["bbox"] for row in kept], dtype=np.float64).reshape(-1, 4),
            np.array([row["score"] for row in kept], dtype=np.float64),
        )

    @classmethod
    def join(cls, parts: Sequence[Detections]) -> Detections:
        """Return the detections of all parts, one after the other."""
        columns = ([getattr(part, field.name) for part in (cls.none(), *parts)] for field in fields(cls))
        return cls(*map(np.concatenate, columns))

    def __len__(self) -> int:
        return len(self.scores)

    def choose(self, index: np.ndarray) -> Detections:
        """Return these detections, in the order of the index."""
        return Detections(*(getattr(self, field.name)[index] for field in fields(self)))

    def sorted_by_image(self) -> Detections:
        """Return them in the order of the images; those of an image keep theirs."""
        return self.choose(np.argsort(self.image, kind="stable"))


class CocoEvaluator:
    """Average precision and recall of boxes, as pycocotools counts them, or faster-coco-eval with equal numbers.

    Every image of the ground truth is evaluated: one that `update` never saw counts as having no detections. Only
    the categories in `category_ids` are evaluated, one after the other, so that the memory needed is that of the
    detections and of one category. A number is -1 where its ground truth is empty (no boxes at all, or none of that
    size), and 0 where there are boxes but no detection found one.

    Ids of images may be any integers or texts: the counting packages, which keep 64 bits of them at the most and some
    less, get numbers.

    Args:
        ground_truth: COCO instances: "images" (id), "annotations" (image_id, category_id, bbox x y w h, area,
            iscrowd) and "categories" (id, name). It is not changed.
        category_ids: COCO category of label 1, 2, ..., K, that is `category_ids[label - 1]`.
        backend: which package counts: "pycocotools" or "faster-coco-eval".

    Attributes:
        detections: in order of arrival. `compute` needs nothing else, so those gathered from several processes may
            take their place. Each image's have to be in it once.
        image_ids: of the ground truth, by number; `detections.image` counts them from 0.

    Raises:
        ImportError: the backend's package is not installed.
        ValueError: a part of the ground truth is missing, or a category is not in it, or twice.
    """

    def __init__(
        self, ground_truth: Mapping[str, Any], category_ids: Sequence[int], backend: Backend = "pycocotools"
    ) -> None:
        self._coco_class, self._evaluation_class = import_backend(backend)
        self.category_ids = tuple(category_ids)
        self._names = category_names(ground_truth, self.category_ids, "area")
        self.image_ids = sorted_ids(ground_truth)
        self._number_of = {image_id: number for number, image_id in enumerate(self.image_ids)}
        self._annotations = defaultdict(list)  # by category; those of other images are left out
        for annotation in ground_truth["annotations"]:
            if annotation["image_id"] in self._number_of:
                self._annotations[annotation["category_id"]].append(annotation)
        self._updated: set[int] = set()
        self._per_class: dict[str, dict[str, float]] | None = None
        self._parts: list[Detections] = []

    @property
    def detections(self) -> Detections:
        """All detections so far."""
        self._parts = [Detections.join(self._parts)]
        return self._parts[0]

    @detections.setter
    def detections(self, value: Detections) -> None:
        """Put these in the place of all."""
        self._parts = [value]

    @property
    def results(self) -> Iterator[dict[str, Any]]:
        """One row of COCO's result format per detection, image ids being those of the ground truth."""
        found = self.detections
        columns = (found.image.tolist(), found.label.tolist(), found.boxes.tolist(), found.scores.tolist())
        for image, label, box, score in zip(*columns, strict=True):
            category_id = self.category_ids[label - 1]
            yield {"image_id": self.image_ids[image], "category_id": category_id, "bbox": box, "score": score}

    def update(self, image_ids: Sequence[int | str], predictions: Sequence[Mapping[str, Tensor]]) -> None:
        """Add the detections of some images; nothing is added if one of them is refused.

        Args:
            image_ids: one id of the ground truth per image.
            predictions: torchvision's detections per image: "boxes" (N, 4) x1 y1 x2 y2 in pixels of the original
                image, "scores" (N,), "labels" (N,) in 1..K.
        """
        if len(image_ids) != len(predictions):
            raise ValueError(f"expected one prediction per image, got {len(predictions)} for {len(image_ids)} images")
        parts: list[Detections] = []
        updated: set[int] = set()
        for image_id, prediction in zip(image_ids, predictions, strict=True):
            image_id = image_id if isinstance(image_id, str) else operator.index(image_id)
            if image_id not in self._number_of:
                raise ValueError(f"image id {image_id} is not one of the ground truth's {len(self.image_ids)} images")
            number = self._number_of[image_id]
            if number in self._updated or number in updated:
                raise ValueError(f"image id {image_id} was updated twice; each image goes in once")
            updated.add(number)
            parts.append(self._columns(image_id, number, prediction))
        self._updated |= updated
        self._parts += parts
        self._per_class = None

    def compute(self) -> dict[str, float]:
        """Return the 12 numbers of `METRICS`; `per_class` has its own afterwards."""
        found, summary = self.detections, COCOeval(iouType="bbox")
        params = summary.params
        sizes = (len(params.areaRng), len(params.maxDets))
        order = sorted(range(len(self.category_ids)), key=lambda place: self.category_ids[place])
        # -1 stands for undefined: no boxes to find.
        precision = -np.ones((len(params.iouThrs), len(params.recThrs), len(order), *sizes))
        recall = -np.ones((len(params.iouThrs), len(order), *sizes))
        by_label = np.argsort(found.label, kind="stable")
        starts = np.searchsorted(found.label[by_label], range(1, len(order) + 2))
        self._per_class = {}
        for place, index in enumerate(order):
            annotations = self._annotations[self.category_ids[index]]
            if annotations:
                own = found.choose(by_label[starts[index] : starts[index + 1]])
                precision[:, :, place], recall[:, place] = self._count(annotations, own)
        for index, (name, category_id) in enumerate(zip(self._names, self.category_ids, strict=True)):
            values = precision[:, :, order.index(index), 0, -1]  # area "all", 100 detections
            self._per_class[name] = {
                "AP": mean_defined(values),
                "AP50": mean_defined(values[0]),  # the thresholds start at IoU 0.5
                "num_boxes": sum(not each.get("iscrowd", 0) for each in self._annotations[category_id]),
            }
        summary.eval = {"precision": precision, "recall": recall}
        with contextlib.redirect_stdout(io.StringIO()):
            summary.summarize()
        return dict(zip(METRICS, map(float, summary.stats), strict=True))

    def _count(self, annotations: Sequence[Mapping[str, Any]], found: Detections) -> tuple[np.ndarray, np.ndarray]:
        """Precision (IoU, recall, area, detections) and recall (IoU, area, detections) of one category."""
        # Fresh ids from 1: pycocotools takes a box with id 0 for unmatched, and merges boxes that share an id.
        truth = [
            _row(number, self._number_of[each["image_id"]], list(each["bbox"]), each["area"], each.get("iscrowd", 0))
            for number, each in enumerate(annotations, start=1)
        ]
        columns = zip(found.image.tolist(), found.boxes.tolist(), found.scores.tolist(), strict=True)
        rows = [
            _row(number, image, box, box[2] * box[3]) | {"score": score}
            for number, (image, box, score) in enumerate(columns, start=1)
        ]
        images = sorted({row["image_id"] for row in (*truth, *rows)})  # no other has a say
        with contextlib.redirect_stdout(io.StringIO()):
            indices = (self._index(images, each) for each in (truth, rows))
            evaluation = self._evaluation_class(*indices, iouType="bbox")
            evaluation.params.imgIds, evaluation.params.catIds = images, [1]
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]

    def _index(self, images: Sequence[int], annotations: list[dict[str, Any]]) -> COCO:
        """The backend's index of ground truth or detections of one category."""
        coco = self._coco_class()
        coco.dataset = {
            "images": [{"id": image} for image in images],
            "annotations": annotations,
            "categories": [{"id": 1}],
        }
        coco.createIndex()
        return coco

    def per_class(self) -> dict[str, dict[str, float]]:
        """Return category name -> AP, AP50 (-1 without ground truth) and num_boxes (ground truth without crowds)."""
        if self._per_class is None:
            raise RuntimeError("per_class() reports the last compute(): call compute() after the last update()")
        return {name: dict(values) for name, values in self._per_class.items()}

    def save_results(self, path: str | Path) -> None:
        """Write `results` as a COCO results file; the file is replaced in one step or not at all.

        Every number is written in full, so the official tools count from it what `compute` counts. `COCO.loadRes` of
        pycocotools does not read a file without detections.
        """
        write_list(Path(path), self.results)

    def _columns(self, image_id: int | str, number: int, prediction: Mapping[str, Tensor]) -> Detections:
        """One image's detections, checked."""
        where = f"prediction for image id {image_id}"
        missing = [key for key in ("boxes", "scores", "labels") if key not in prediction]
        if missing:
            raise ValueError(f"{where}: no {missing}, got the keys {sorted(prediction)}")
        for key in ("boxes", "scores", "labels"):
            if not isinstance(prediction[key], Tensor):
                raise ValueError(f"{where}: expected tensors, got {key} as a {type(prediction[key]).__name__}")
        boxes, scores, labels = prediction["boxes"], prediction["scores"], prediction["labels"]
        n = len(boxes) if boxes.dim() else 0
        for key, tensor, shape in (("boxes", boxes, (n, 4)), ("scores", scores, (n,)), ("labels", labels, (n,))):
            if tensor.shape != shape:
                raise ValueError(
                    f"{where}: expected boxes (N, 4), scores (N,), labels (N,), got {key} of shape "
                    f"{tuple(tensor.shape)} with N = {n}"
                )
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"{where}: expected integer labels, got {labels.dtype}")
        boxes, scores = boxes.detach().to("cpu", torch.float64), scores.detach().to("cpu", torch.float64)
        labels, num_classes = labels.cpu(), len(self.category_ids)
        for valid, values, what, allowed in (
            (boxes.isfinite().all(1), boxes, "box", "coordinates have to be finite"),
            ((boxes[:, 2:] >= boxes[:, :2]).all(1), boxes, "box", "expected x1 <= x2 and y1 <= y2 (not x y w h)"),
            (scores.isfinite(), scores, "score", "scores have to be finite"),
            ((labels >= 1) & (labels <= num_classes), labels, "label", f"labels are in 1..{num_classes}"),
        ):
            if not valid.all():
                index = int(valid.int().argmin())
                raise ValueError(f"{where}: found {what} {values[index].tolist()} at index {index}; {allowed}")
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
        return Detections(np.full(n, number), labels.numpy().astype(np.int64), boxes.numpy(), scores.numpy())


def _row(number: int, image: int, box: list[float], area: float, iscrowd: int = 0) -> dict[str, Any]:
    """Return a box for the counting packages, whose ids count from 1."""
    return {"id": number, "image_id": image + 1, "category_id": 1, "bbox": box, "area": area, "iscrowd": iscrowd}


def sorted_ids(ground_truth: Mapping[str, Any]) -> list[int | str]:
    """Return the ids of the images, integers before texts: by their number, in which equal scores are ranked."""
    return in_order({image["id"] for image in ground_truth["images"]})


def in_order(ids: Iterable[int | str]) -> list[int | str]:
    """Return ids sorted, integers before texts."""
    return sorted(ids, key=lambda image_id: (isinstance(image_id, str), image_id))


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


def require_keys(rows: Iterable[Mapping[str, Any]], keys: Iterable[str], place: str) -> None:
    """Raise ValueError for the first row that lacks a key; names both."""
    for index, row in enumerate(rows):
        for key in keys:
            if row.get(key) is None:
                which = f"with id {row['id']!r}" if "id" in row else f"at index {index}"
                raise ValueError(f"{place}: the entry {which} has no {key!r}")


def category_names(ground_truth: Mapping[str, Any], category_ids: Sequence[int], *also: str) -> list[str]:
    """Names of the categories, which have to be in the ground truth, itself complete, and to differ.

    Annotations have an image, a category and a box, and the keys in `also`.
    """
    parts = {"images": ["id"], "annotations": ["image_id", "category_id", "bbox", *also], "categories": ["id", "name"]}
    for part, keys in parts.items():
        if part not in ground_truth:
            raise ValueError(f"ground truth without {part!r}: COCO instances have {', '.join(parts)}")
        require_keys(ground_truth[part], keys, f"ground truth, {part}")
    for each in ground_truth["annotations"]:
        if len(each["bbox"]) != 4:
            raise ValueError(f"ground truth, image id {each['image_id']}: bbox {each['bbox']}: x y w h")
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


def mean_defined(values: np.ndarray) -> float:
    """Mean of the entries above -1, pycocotools' mark for undefined; -1 without any."""
    defined = values[values > -1]
    return float(defined.mean()) if len(defined) else -1.0
