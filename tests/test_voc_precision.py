"""VOC average precision: cases counted by hand, agreement with the development kit's own way, and what is refused.

At the end: speed and memory of large evaluations.
"""

from __future__ import annotations

import json
import math
import runpy
import time
from collections.abc import Sequence

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation import AWAY, BOX, OTHER, ground_truth

from detection.evaluation import (
    CocoEvaluator,
    Detections,
    PrecisionRecall,
    average_precision,
    mean_average_precision,
    precision_recall,
)


def result(bbox: Sequence[float], score: float, image_id: int = 1, category_id: int = 1) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox), "score": score}


def curve_of(boxes: list[dict], *rows: dict, iou_threshold: float = 0.5) -> PrecisionRecall:
    """The curve of category 1."""
    return curves_of(ground_truth(boxes), rows, [1, 2], iou_threshold)["class 1"]


def curves_of(truth: dict, rows: Sequence[dict], category_ids: Sequence[int], iou_threshold: float = 0.5) -> dict:
    """The curves of rows as a file of results has them."""
    return precision_recall(truth, Detections.from_rows(rows, truth, category_ids), category_ids, iou_threshold)


def both(curve: PrecisionRecall) -> tuple[float, float]:
    """ "area" and "11-point"."""
    return average_precision(curve, "area"), average_precision(curve, "11-point")


def test_voc_both_interpolations_by_hand() -> None:
    """Four boxes; right, wrong, right, right, wrong, and the fourth box is never found.

    Precision 1, 1/2, 2/3, 3/4, 3/5 at recall 1/4, 1/4, 2/4, 3/4, 3/4; from the right it becomes 1, 3/4, 3/4, 3/4, 3/5.
    Area: 1/4 * 1 + 1/4 * 3/4 + 1/4 * 3/4 = 5/8.
    11 points: 1 at 0, 0.1, 0.2; 3/4 at 0.3 ... 0.7; 0 at 0.8, 0.9, 1: (3 + 5 * 3/4) / 11 = 27/44.
    """
    boxes = [{"bbox": BOX, "image_id": image_id} for image_id in (1, 2)]
    boxes += [{"bbox": OTHER, "image_id": image_id} for image_id in (1, 2)]
    curve = curve_of(
        boxes,
        result(AWAY, 0.5),
        result(OTHER, 0.6, 2),
        result(BOX, 0.9),
        result(AWAY, 0.8, 2),
        result(OTHER, 0.7),
    )
    assert curve.scores.tolist() == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert curve.true_positives.tolist() == [1, 1, 2, 3, 3]
    assert curve.recall.tolist() == [0.25, 0.25, 0.5, 0.75, 0.75]
    assert curve.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4, 3 / 5])
    assert curve.envelope.tolist() == pytest.approx([1, 3 / 4, 3 / 4, 3 / 4, 3 / 5])
    assert curve.num_boxes == 4
    assert both(curve) == pytest.approx((5 / 8, 27 / 44))


@pytest.mark.parametrize("num_found", range(11))
def test_voc_recall_is_compared_in_integers(num_found: int) -> None:
    """n of 10 boxes found without a mistake: recall n / 10 reaches n + 1 points (none without a detection)."""
    boxes = [{"bbox": [60.0 * i, 0.0, 50.0, 50.0]} for i in range(10)]
    curve = curve_of(boxes, *(result(box["bbox"], 0.9) for box in boxes[:num_found]))
    expected = (num_found + 1) / 11 if num_found else 0.0
    assert both(curve) == pytest.approx((num_found / 10, expected))


@pytest.mark.parametrize(("first", "expected"), [("right", 1.0), ("wrong", 0.5)])
def test_voc_equal_scores_rank_in_order_of_arrival(first: str, expected: float) -> None:
    rows = [result(BOX, 0.5), result(AWAY, 0.5, image_id=2)]
    curve = curve_of([{"bbox": BOX}], *(rows if first == "right" else rows[::-1]))
    assert both(curve) == pytest.approx((expected, expected))


def test_voc_second_detection_of_a_box_is_wrong() -> None:
    """Right, duplicate, right: area 1/2 * 1 + 1/2 * 2/3; six points (0 ... 0.5) at 1 and five at 2/3."""
    boxes = [{"bbox": BOX}, {"bbox": OTHER}]
    curve = curve_of(boxes, result(BOX, 0.9), result(BOX, 0.8), result(OTHER, 0.7))
    assert curve.true_positives.tolist() == [1, 1, 2]
    assert both(curve) == pytest.approx((5 / 6, (6 + 5 * 2 / 3) / 11))


def test_voc_detection_does_not_move_on_to_its_second_best_box() -> None:
    """Both overlap the first box most (IoU 1 and 9/11); one has 7/13 with the second box too, where COCO counts it."""
    boxes = [{"bbox": [0.0, 0.0, 100.0, 100.0]}, {"bbox": [40.0, 0.0, 100.0, 100.0]}]
    rows = [result(boxes[0]["bbox"], 0.9), result([10.0, 0.0, 100.0, 100.0], 0.8)]
    assert curve_of(boxes, *rows).true_positives.tolist() == [1, 1]
    evaluator = CocoEvaluator(ground_truth(boxes), [1, 2])
    evaluator.detections = Detections.from_rows(rows, ground_truth(boxes), [1, 2])
    assert evaluator.compute()["AP50"] == pytest.approx(1)


def test_voc_first_of_equal_boxes_is_taken() -> None:
    """The same box twice: both detections go to the first, and the second box is never found."""
    curve = curve_of([{"bbox": BOX}, {"bbox": BOX}], result(BOX, 0.9), result(BOX, 0.8))
    assert curve.true_positives.tolist() == [1, 1]
    # With the first of the two difficult, both detections are ignored.
    curve = curve_of([{"bbox": BOX, "iscrowd": 1}, {"bbox": BOX}], result(BOX, 0.9), result(BOX, 0.8))
    assert (curve.true_positives.tolist(), curve.num_boxes) == ([], 1)


def test_voc_difficult_boxes_are_neither_right_nor_wrong() -> None:
    boxes = [{"bbox": BOX, "iscrowd": 1}, {"bbox": OTHER}]
    curve = curve_of(boxes, result(BOX, 0.9), result(BOX, 0.8), result(OTHER, 0.7))
    assert (curve.scores.tolist(), curve.true_positives.tolist(), curve.num_boxes) == ([0.7], [1], 1)
    assert both(curve) == (1.0, 1.0)


def test_voc_difficult_box_wins_over_another_that_overlaps_enough() -> None:
    """IoU 9/11 with the difficult box and 7/13 with the other: ignored, and the other stays unfound."""
    boxes = [{"bbox": [40.0, 0.0, 100.0, 100.0]}, {"bbox": [0.0, 0.0, 100.0, 100.0], "iscrowd": 1}]
    curve = curve_of(boxes, result([10.0, 0.0, 100.0, 100.0], 0.9))
    assert (curve.scores.tolist(), curve.num_boxes) == ([], 1)
    assert both(curve) == (0.0, 0.0)


def test_voc_difficult_box_below_the_threshold_excuses_nothing() -> None:
    boxes = [{"bbox": [0.0, 0.0, 100.0, 100.0], "iscrowd": 1}, {"bbox": AWAY}]
    curve = curve_of(boxes, result([0.0, 0.0, 100.0, 49.0], 0.9), result(AWAY, 0.8))
    assert curve.true_positives.tolist() == [0, 1]
    assert both(curve) == (0.5, 0.5)


@pytest.mark.parametrize(("iou_threshold", "right"), [(0.3, 3), (0.5, 3), (0.500001, 2), (0.75, 2), (0.9, 1), (1.0, 1)])
def test_voc_overlap_at_the_threshold_counts(iou_threshold: float, right: int) -> None:
    """Detections with IoU 1, 3/4 and 1/2."""
    boxes = [{"bbox": [0.0, 0.0, 100.0, 100.0], "image_id": image_id} for image_id in (1, 2, 3)]
    rows = [result([0.0, 0.0, 100.0, height], 0.9, image_id) for image_id, height in ((1, 100), (2, 75), (3, 50))]
    curves = curves_of(ground_truth(boxes, num_images=3), rows, [1], iou_threshold)
    assert curves["class 1"].true_positives[-1] == right
    assert average_precision(curves["class 1"], "area") == pytest.approx(right / 3)


def test_voc_equal_boxes_have_iou_one_whatever_their_digits() -> None:
    rng = np.random.default_rng(0)
    boxes = [{"bbox": box} for box in rng.uniform(0.1, 300, (200, 4)).tolist()]
    curve = curve_of(boxes, *(result(box["bbox"], 0.5) for box in boxes), iou_threshold=1.0)
    assert both(curve) == (1.0, 1.0)


def test_voc_classes_and_images_are_apart_and_classes_without_boxes_leave_the_mean_alone() -> None:
    """Class 1: found. 2: a detection on a box of class 1. 3: nothing to find. 4: nothing found. 5: only difficult."""
    truth = ground_truth(
        [
            {"bbox": BOX},
            {"bbox": AWAY, "category_id": 2},
            {"bbox": AWAY, "category_id": 4},
            {"bbox": BOX, "category_id": 5, "iscrowd": 1},
        ],
        categories=(1, 2, 3, 4, 5),
    )
    rows = [result(BOX, 0.9), result(BOX, 0.9, category_id=2), result(AWAY, 0.9, 2, 2), result(BOX, 0.9, category_id=3)]
    curves = curves_of(truth, rows, [4, 1, 2, 3, 5])
    assert list(curves) == ["class 4", "class 1", "class 2", "class 3", "class 5"]
    for interpolation in ("area", "11-point"):
        values = [average_precision(curve, interpolation) for curve in curves.values()]
        assert values == [0.0, 1.0, 0.0, -1.0, -1.0]
        assert mean_average_precision(curves, interpolation) == pytest.approx(1 / 3)
    assert curves["class 4"].recall.tolist() == []
    assert np.isnan(curves["class 3"].recall).all() and curves["class 3"].precision.tolist() == [0.0]
    assert list(curves_of(truth, rows, [2])) == ["class 2"]


@pytest.mark.parametrize("num_images", [0, 2])
def test_voc_no_ground_truth_is_minus_one(num_images: int) -> None:
    curves = curves_of(ground_truth([], num_images=num_images), [], [1, 2])
    assert [both(curve) for curve in curves.values()] == [(-1.0, -1.0)] * 2
    assert mean_average_precision(curves, "area") == -1.0


@pytest.mark.filterwarnings("error")
def test_voc_box_without_area_is_never_found() -> None:
    curve = curve_of([{"bbox": [10.0, 20.0, 0.0, 5.0]}], result([10.0, 20.0, 0.0, 5.0], 0.9))
    assert (curve.true_positives.tolist(), curve.num_boxes) == ([0], 1)


def test_boxes_of_unknown_images_are_left_out() -> None:
    """As where the images were reduced to some of the file's: COCO and VOC alike."""
    truth = ground_truth([{"bbox": BOX}, {"bbox": BOX, "image_id": 3}], num_images=2)
    rows = [result(BOX, 0.9)]
    assert curves_of(truth, rows, [1])["class 1"].num_boxes == 1
    evaluator = CocoEvaluator(truth, [1])
    evaluator.detections = Detections.from_rows(rows, truth, [1])
    assert evaluator.compute()["AP"] == pytest.approx(1)


def test_voc_bad_input_is_named() -> None:
    truth = ground_truth([{"bbox": BOX}])
    for threshold in (0, 1.01, math.nan):
        with pytest.raises(ValueError, match=rf"iou_threshold: expected a number in \(0, 1\], got {threshold}"):
            curves_of(truth, [], [1], threshold)
    with pytest.raises(ValueError, match=r"image ids \[7\] are not in the ground truth"):
        curves_of(truth, [result(BOX, 0.5, image_id=7)], [1])
    with pytest.raises(ValueError, match=r"category_ids \[9\]: expected one or more of .* \[1, 2\]"):
        curves_of(truth, [], [1, 9])
    with pytest.raises(ValueError, match="interpolation: expected one of area, 11-point, got '11'"):
        average_precision(curve_of([{"bbox": BOX}]), "11")


def devkit(objects: list[dict], found: list[dict], threshold: float) -> tuple[float, float]:
    """Average precision of one class, area and 11 points, from boxes in pixels from 1, ends included: loops and "+1".

    objects: "image", "box" (xmin ymin xmax ymax), "difficult". found: "image", "box", "score".
    """
    num_boxes = sum(not thing["difficult"] for thing in objects)
    if num_boxes == 0:
        return -1.0, -1.0
    taken: set[int] = set()
    right, wrong, points = 0, 0, []
    for detection in sorted(found, key=lambda row: row["score"], reverse=True):  # sorted keeps the order of equals
        xmin, ymin, xmax, ymax = detection["box"]
        best, best_overlap = None, -math.inf
        for index, thing in enumerate(objects):
            if thing["image"] != detection["image"]:
                continue
            a, b, c, d = thing["box"]
            width, height = min(c, xmax) - max(a, xmin) + 1, min(d, ymax) - max(b, ymin) + 1
            if width > 0 and height > 0:
                area = (xmax - xmin + 1) * (ymax - ymin + 1) + (c - a + 1) * (d - b + 1) - width * height
                if width * height / area > best_overlap:
                    best, best_overlap = index, width * height / area
        if best_overlap < threshold:
            wrong += 1
        elif not objects[best]["difficult"]:
            right, wrong = right + (best not in taken), wrong + (best in taken)
            taken.add(best)
        if right + wrong:
            points.append((right, right / (right + wrong)))
    area = sum(max((p for n, p in points if n >= k), default=0.0) for k in range(1, num_boxes + 1)) / num_boxes
    eleven = [max((p for n, p in points if 10 * n >= k * num_boxes), default=0.0) for k in range(11)]
    return area, sum(eleven) / 11


@st.composite
def pixel_boxes(draw: st.DrawFn) -> list[int]:
    """xmin ymin xmax ymax in pixels from 1; few values, so overlaps, equal boxes and equal IoUs are frequent."""
    low = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    return [*low, *(start + draw(st.integers(0, 5)) for start in low)]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"image": st.integers(1, 2), "box": pixel_boxes(), "difficult": st.booleans()})),
    st.lists(
        st.fixed_dictionaries(
            {"image": st.integers(1, 2), "box": pixel_boxes(), "score": st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5])}
        ),
        max_size=20,
    ),
    st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.7, 0.75, 1.0]),
)
def test_voc_agrees_with_the_development_kits_boxes(objects: list[dict], found: list[dict], threshold: float) -> None:
    """Its "+1" on pixels counted from 1 is the plain IoU of (xmin - 1, ymin - 1, xmax, ymax)."""

    def xywh(box: list[int]) -> list[float]:
        return [box[0] - 1.0, box[1] - 1.0, box[2] - box[0] + 1.0, box[3] - box[1] + 1.0]

    boxes = [
        {"bbox": xywh(thing["box"]), "image_id": thing["image"], "iscrowd": int(thing["difficult"])}
        for thing in objects
    ]
    rows = [result(xywh(row["box"]), row["score"], row["image"]) for row in found]
    curve = curve_of(boxes, *rows, iou_threshold=threshold)
    assert both(curve) == pytest.approx(devkit(objects, found, threshold), rel=0, abs=1e-12)


def test_voc_is_quick() -> None:
    """100 000 detections on 1000 images of 20 classes."""
    rng = np.random.default_rng(0)
    categories = tuple(range(1, 21))

    def drawn(n: int) -> list[tuple[int, int, list[float]]]:
        corners = np.hstack([rng.uniform(0, 400, (n, 2)), rng.uniform(10, 100, (n, 2))])
        return list(
            zip(rng.integers(1, 1001, n).tolist(), rng.integers(1, 21, n).tolist(), corners.tolist(), strict=True)
        )

    truth = ground_truth(
        [{"image_id": image, "category_id": category, "bbox": box} for image, category, box in drawn(3000)],
        num_images=1000,
        categories=categories,
    )
    scores = rng.random(100_000).tolist()
    rows = [
        result(box, score, image, category)
        for (image, category, box), score in zip(drawn(100_000), scores, strict=True)
    ]
    start = time.process_time()
    curves_of(truth, rows, categories)
    assert time.process_time() - start < 10


def test_the_benchmark_of_a_large_evaluation_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages count the same of 1600 detections; in the log of 800,000 each of them needs less than 4 GB."""
    pytest.importorskip("faster_coco_eval")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = runpy.run_path(str(ROOT / "benchmarks" / "evaluation.py"))["measure"]
    size = {"images": 200, "boxes": 7, "detections": 8, "classes": 4}
    plain, fast = (measure(backend, size) for backend in ("pycocotools", "faster-coco-eval"))
    assert fast["AP"] == pytest.approx(plain["AP"], abs=1e-12) and 0.01 < plain["AP"] < 0.5
    log = json.loads((ROOT / "results" / "benchmarks" / "evaluation.json").read_text())
    assert (log["images"] * log["detections"], log["classes"]) == (800_000, 80)
    assert [row["backend"] for row in log["rows"]] == ["pycocotools", "faster-coco-eval"]
    assert all(row["peak_bytes"] < 4e9 and row["AP"] == log["rows"][0]["AP"] for row in log["rows"])
