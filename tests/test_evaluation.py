"""COCO average precision: cases counted by hand, agreement with other counts, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from backbones import HoyerSpike
from detection.config import schema
from detection.data import DetectionDataset, read_coco
from detection.evaluation import METRICS, CocoEvaluator, Detections, precision_recall
from detection.records import Evaluation
from detection.tasks import base
from detection.tasks import detection as detection_task
from detection.tasks.detection import DetectionTask
from detection.tasks.evaluate import evaluate_run
from detection.tasks.recipes import DetectionRecipe

BOX = [10.0, 20.0, 50.0, 60.0]  # x y w h; area 3000: "medium"
OTHER = [200.0, 20.0, 50.0, 60.0]
AWAY = [400.0, 300.0, 50.0, 60.0]  # overlaps nothing


def ground_truth(boxes: list[dict], num_images: int = 2, categories: tuple[int, ...] = (1, 2)) -> dict:
    """COCO instances from rows with "bbox" and, where not 1, "image_id", "category_id", "iscrowd"."""
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": math.prod(b["bbox"][2:]), **b}
        for i, b in enumerate(boxes, start=1)
    ]
    return {
        "images": [{"id": i, "width": 640, "height": 480} for i in range(1, num_images + 1)],
        "annotations": annotations,
        "categories": [{"id": c, "name": f"class {c}"} for c in categories],
    }


def detections(*rows: tuple[list[float], float, int]) -> dict[str, Tensor]:
    """torchvision's detections from (x y w h, score, label)."""
    boxes = torch.tensor([[x, y, x + w, y + h] for (x, y, w, h), _, _ in rows]).reshape(-1, 4)
    return {
        "boxes": boxes,
        "scores": torch.tensor([score for _, score, _ in rows]),
        "labels": torch.tensor([label for _, _, label in rows], dtype=torch.int64),
    }


def evaluate(truth: dict, per_image: dict[int, dict[str, Tensor]], category_ids: tuple[int, ...] = (1, 2)) -> dict:
    evaluator = CocoEvaluator(truth, category_ids)
    evaluator.update(list(per_image), list(per_image.values()))
    return evaluator.compute()


def plain_pycocotools(truth: dict, rows: list[dict]) -> tuple[list[float], np.ndarray]:
    """stats and precision of the usual sequence of calls."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(rows)), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist(), evaluation.eval["precision"]


def random_case(seed: int, category_ids: tuple[int, ...]) -> tuple[dict, dict[int, dict[str, Tensor]]]:
    """12 images with crowds, all three sizes and noisy copies of the true boxes beside random ones."""
    rng = np.random.default_rng(seed)
    boxes, per_image = [], {}
    for image_id in range(1, 13):
        rows = []
        for _ in range(rng.integers(0, 9)):
            box = [*rng.uniform(0, 300, 2).tolist(), *np.exp(rng.uniform(2, 5.5, 2)).tolist()]
            label = int(rng.integers(1, len(category_ids)))  # the last category stays without ground truth
            boxes.append(
                {
                    "bbox": box,
                    "image_id": image_id,
                    "category_id": category_ids[label - 1],
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(rng.integers(0, 4)):
                noisy = np.abs(np.array(box) * rng.normal(1, 0.08, 4)).tolist()
                rows.append((noisy, round(float(rng.random()), 1), label))  # one decimal: scores tie
        for _ in range(rng.integers(0, 4)):
            box = [*rng.uniform(0, 300, 2).tolist(), *rng.uniform(5, 150, 2).tolist()]
            rows.append((box, float(rng.random()), int(rng.integers(1, len(category_ids) + 1))))
        per_image[image_id] = detections(*rows)
    return ground_truth(boxes, num_images=14, categories=category_ids), per_image


def test_one_perfect_box_is_one() -> None:
    metrics = evaluate(ground_truth([{"bbox": BOX}]), {1: detections((BOX, 0.9, 1))})
    assert tuple(metrics) == METRICS
    undefined = {"AP_small", "AP_large", "AR_small", "AR_large"}  # the only true box is of medium size
    assert metrics == {name: -1.0 if name in undefined else pytest.approx(1.0) for name in METRICS}


@pytest.mark.parametrize(("true_score", "expected"), [(0.9, 1.0), (0.1, 0.5)])
def test_false_positive_costs_by_its_rank(true_score: float, expected: float) -> None:
    """Ranked below the true one it costs nothing; above it, precision is 1/2 at every recall."""
    wrong = [300.0, 300.0, 50.0, 60.0]
    metrics = evaluate(ground_truth([{"bbox": BOX}]), {1: detections((BOX, true_score, 1), (wrong, 0.5, 1))})
    assert metrics["AP"] == pytest.approx(expected)
    assert metrics["AR100"] == 1.0
    assert metrics["AR1"] == (1.0 if true_score > 0.5 else 0.0)


def test_half_of_the_boxes_found() -> None:
    """Precision 1 up to recall 1/2: 51 of the 101 recall points."""
    truth = ground_truth([{"bbox": BOX}, {"bbox": BOX, "image_id": 2}])
    metrics = evaluate(truth, {1: detections((BOX, 0.9, 1))})
    assert metrics["AP"] == pytest.approx(51 / 101)
    assert metrics["AR100"] == 0.5


def test_second_detection_of_a_box_is_a_false_positive() -> None:
    truth = ground_truth([{"bbox": BOX}, {"bbox": BOX, "image_id": 2}])
    metrics = evaluate(truth, {1: detections((BOX, 0.9, 1), (BOX, 0.8, 1)), 2: detections((BOX, 0.7, 1))})
    assert metrics["AP"] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)


@pytest.mark.parametrize(("height", "num_thresholds"), [(50, 1), (75, 6), (95, 10), (49.99, 0), (74.99, 5)])
def test_iou_exactly_at_a_threshold_counts(height: float, num_thresholds: int) -> None:
    """The detection covers height % of the true box, so that is the IoU; thresholds 0.5, 0.55 ... 0.95."""
    truth = ground_truth([{"bbox": [0.0, 0.0, 100.0, 100.0]}])
    metrics = evaluate(truth, {1: detections(([0.0, 0.0, 100.0, height], 0.9, 1))})
    assert metrics["AP"] == pytest.approx(num_thresholds / 10)
    assert metrics["AP50"] == pytest.approx(float(num_thresholds >= 1))
    assert metrics["AP75"] == pytest.approx(float(num_thresholds >= 6))


def test_crowd_swallows_detections() -> None:
    """Detections inside a crowd are neither right nor wrong, however many and however high their score."""
    crowd = [200.0, 200.0, 200.0, 200.0]
    inside = [([210.0 + 20 * i, 220.0, 40.0, 40.0], 0.99, 1) for i in range(3)]
    found = detections(*inside, (BOX, 0.5, 1))
    assert evaluate(ground_truth([{"bbox": BOX}, {"bbox": crowd, "iscrowd": 1}]), {1: found})["AP"] == pytest.approx(1)
    assert evaluate(ground_truth([{"bbox": BOX}]), {1: found})["AP"] == pytest.approx(1 / 4)


def test_wrong_class_and_wrong_image_do_not_match() -> None:
    truth = ground_truth([{"bbox": BOX}])
    assert evaluate(truth, {1: detections((BOX, 0.9, 2))})["AP"] == 0.0
    assert evaluate(truth, {2: detections((BOX, 0.9, 1))})["AP"] == 0.0


@pytest.mark.parametrize("update", [False, True])
def test_no_detections_are_zero_where_there_are_boxes(update: bool) -> None:
    """Zero for what could have been found, -1 for the sizes and classes that have no box."""
    truth = ground_truth([{"bbox": BOX}, {"bbox": [0.0, 0.0, 8.0, 8.0], "image_id": 2}])
    evaluator = CocoEvaluator(truth, [1, 2])
    if update:
        evaluator.update([1, 2], [detections(), detections()])
    assert evaluator.compute() == {name: -1.0 if name.endswith("large") else 0.0 for name in METRICS}
    assert evaluator.per_class() == {
        "class 1": {"AP": 0.0, "AP50": 0.0, "num_boxes": 2},
        "class 2": {"AP": -1.0, "AP50": -1.0, "num_boxes": 0},
    }
    assert list(evaluator.results) == []


@pytest.mark.parametrize("num_images", [0, 2])
@pytest.mark.parametrize("found", [(), ((BOX, 0.9, 1),)])
def test_no_ground_truth_is_minus_one(num_images: int, found: tuple) -> None:
    truth = ground_truth([], num_images=num_images)
    per_image = {1: detections(*found)} if num_images else {}
    assert evaluate(truth, per_image) == dict.fromkeys(METRICS, -1.0)


def test_only_crowds_are_no_ground_truth() -> None:
    truth = ground_truth([{"bbox": BOX, "iscrowd": 1}])
    assert evaluate(truth, {1: detections((BOX, 0.9, 1))}) == dict.fromkeys(METRICS, -1.0)


def test_image_never_updated_has_no_detections() -> None:
    truth = ground_truth([{"bbox": BOX}, {"bbox": BOX, "image_id": 2}])
    with_empty = evaluate(truth, {1: detections((BOX, 0.9, 1)), 2: detections()})
    assert evaluate(truth, {1: detections((BOX, 0.9, 1))}) == with_empty


def test_sparse_category_ids() -> None:
    """Labels 1, 2, 3 are categories 90, 7, 13, in that order; results and per_class follow."""
    other = [100.0, 100.0, 50.0, 60.0]
    truth = ground_truth(
        [{"bbox": BOX, "category_id": 90}, {"bbox": other, "category_id": 7}, {"bbox": BOX, "category_id": 7}],
        categories=(7, 13, 90),
    )
    evaluator = CocoEvaluator(truth, [90, 7, 13])
    evaluator.update([1], [detections((BOX, 0.5, 1), (other, 0.25, 2))])
    assert list(evaluator.results) == [
        {"image_id": 1, "category_id": 90, "bbox": BOX, "score": 0.5},
        {"image_id": 1, "category_id": 7, "bbox": other, "score": 0.25},
    ]
    assert evaluator.compute()["AP"] == pytest.approx((1 + 51 / 101) / 2)
    per_class = evaluator.per_class()
    assert list(per_class) == ["class 90", "class 7", "class 13"]
    assert per_class["class 90"] == {"AP": pytest.approx(1), "AP50": pytest.approx(1), "num_boxes": 1}
    assert per_class["class 7"] == {"AP": pytest.approx(51 / 101), "AP50": pytest.approx(51 / 101), "num_boxes": 2}
    assert per_class["class 13"] == {"AP": -1.0, "AP50": -1.0, "num_boxes": 0}


def test_categories_outside_category_ids_are_left_out() -> None:
    truth = ground_truth([{"bbox": BOX}, {"bbox": BOX, "category_id": 2}])
    evaluator = CocoEvaluator(truth, [1])
    evaluator.update([1], [detections((BOX, 0.9, 1))])
    assert evaluator.compute()["AP"] == pytest.approx(1)
    assert list(evaluator.per_class()) == ["class 1"]


def test_only_the_100_best_of_an_image_and_class_count() -> None:
    wrong = [([300.0, 300.0, 50.0, 60.0], 0.9, 1)] * 100
    truth = ground_truth([{"bbox": BOX}])
    assert evaluate(truth, {1: detections(*wrong, (BOX, 0.5, 1))})["AP"] == 0.0
    assert evaluate(truth, {1: detections(*wrong[:99], (BOX, 0.5, 1))})["AP"] == pytest.approx(1 / 100)
    assert evaluate(truth, {1: detections((BOX, 0.95, 1), *wrong)})["AP"] == pytest.approx(1)


@pytest.mark.parametrize("ids", [(0, 1), (5, 5)])
def test_annotation_ids_do_not_matter(ids: tuple[int, int]) -> None:
    """pycocotools alone would take the box with id 0 for missed, and merge two boxes with one id."""
    truth = ground_truth([{"bbox": BOX, "id": ids[0]}, {"bbox": BOX, "image_id": 2, "id": ids[1]}])
    metrics = evaluate(truth, {1: detections((BOX, 0.9, 1)), 2: detections((BOX, 0.8, 1))})
    assert metrics["AP"] == pytest.approx(1)


@pytest.mark.parametrize("category_ids", [(1, 2, 3), (3, 17, 18, 90)])
@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_plain_pycocotools(seed: int, category_ids: tuple[int, ...]) -> None:
    truth, per_image = random_case(seed, category_ids)
    before = copy.deepcopy(truth)
    tensors_before = copy.deepcopy(per_image)
    evaluator = CocoEvaluator(truth, category_ids)
    for image_id, prediction in per_image.items():
        evaluator.update([image_id], [prediction])
    rows = list(evaluator.results)
    metrics = evaluator.compute()

    stats, precision = plain_pycocotools(before, rows)
    assert 0 < metrics["AP"] < 1
    assert list(metrics.values()) == pytest.approx(stats, rel=0, abs=1e-12)
    for k, values in enumerate(evaluator.per_class().values()):
        for key, part in (("AP", precision[:, :, k, 0, 2]), ("AP50", precision[0, :, k, 0, 2])):
            expected = part[part > -1].mean() if (part > -1).any() else -1.0
            assert values[key] == pytest.approx(expected, rel=0, abs=1e-12)

    assert evaluator.compute() == metrics  # a second time, the same
    assert list(evaluator.results) == rows
    assert truth == before
    for image_id, prediction in per_image.items():
        assert all(torch.equal(prediction[key], tensors_before[image_id][key]) for key in prediction)


def test_rows_are_xywh_in_double_precision_and_json() -> None:
    """w = x2 - x1 is taken in float64: in float32 it would lose digits, and pycocotools counts at the last one."""
    boxes = torch.tensor([[0.1, 0.2, 600.3, 400.7]])
    evaluator = CocoEvaluator(ground_truth([]), [1, 2])
    evaluator.update([1], [{"boxes": boxes, "scores": torch.tensor([0.3]), "labels": torch.tensor([2])}])
    x1, y1, x2, y2 = boxes[0].tolist()
    (row,) = evaluator.results
    assert row == {"image_id": 1, "category_id": 2, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(np.float32(0.3))}
    assert json.loads(json.dumps([row])) == [row]


def test_half_precision_and_gradients_are_accepted() -> None:
    found = detections((BOX, 0.5, 1))
    found = {key: value.bfloat16() if value.is_floating_point() else value for key, value in found.items()}
    found["boxes"].requires_grad_()
    assert evaluate(ground_truth([{"bbox": BOX}]), {1: found})["AP"] == pytest.approx(1)


def test_image_ids_may_be_integer_tensors() -> None:
    evaluator = CocoEvaluator(ground_truth([{"bbox": BOX}]), [1, 2])
    evaluator.update(torch.tensor([2, 1]), [detections(), detections((BOX, 0.9, 1))])
    assert [type(row["image_id"]) for row in evaluator.results] == [int]
    assert evaluator.compute()["AP"] == pytest.approx(1)


def test_compute_works_from_gathered_results() -> None:
    """Two processes, half of the images each; the first one gets the detections of both."""
    truth, per_image = random_case(0, (1, 2, 3))
    whole = evaluate(truth, per_image, (1, 2, 3))
    halves = [CocoEvaluator(truth, (1, 2, 3)) for _ in range(2)]
    for i, (image_id, prediction) in enumerate(per_image.items()):
        halves[i % 2].update([image_id], [prediction])
    halves[0].detections = Detections.join([half.detections for half in halves]).sorted_by_image()
    assert halves[0].compute() == pytest.approx(whole, rel=0, abs=1e-12)

    rows = [{"image_id": image_id, "category_id": 1, "bbox": BOX, "score": 0.5} for image_id in ("a", 99)]
    with pytest.raises(ValueError, match=r"image ids \[99, 'a'\] are not in the ground truth"):
        Detections.from_rows(rows, truth, (1, 2, 3))


def test_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(ground_truth([{"bbox": BOX}]), {1: detections((BOX, 0.9, 1))})
    assert capsys.readouterr().out == ""


def test_per_class_needs_compute() -> None:
    evaluator = CocoEvaluator(ground_truth([{"bbox": BOX}]), [1, 2])
    with pytest.raises(RuntimeError, match=r"call compute\(\)"):
        evaluator.per_class()
    evaluator.compute()
    evaluator.per_class()["class 1"]["AP"] = 5.0
    assert evaluator.per_class()["class 1"]["AP"] == 0.0
    evaluator.update([1], [detections((BOX, 0.9, 1))])
    with pytest.raises(RuntimeError, match=r"call compute\(\)"):
        evaluator.per_class()


@pytest.mark.parametrize(
    ("image_ids", "change", "message"),
    [
        ([99], {}, "image id 99 is not one of the ground truth's 2 images"),
        ([1, 1], {}, "image id 1 was updated twice"),
        ([1, 2], {"labels": torch.tensor([3])}, r"image id 1: found label 3 at index 0; labels are in 1\.\.2"),
        ([1], {"labels": torch.tensor([0])}, r"found label 0 at index 0; labels are in 1\.\.2"),
        ([1], {"labels": torch.tensor([1.0])}, r"expected integer labels, got torch\.float32"),
        ([1], {"labels": torch.tensor([1, 2])}, r"got labels of shape \(2,\) with N = 1"),
        ([1], {"scores": torch.tensor([[0.5]])}, r"got scores of shape \(1, 1\) with N = 1"),
        ([1], {"scores": torch.tensor([math.nan])}, "found score nan at index 0"),
        ([1], {"scores": [0.9]}, "expected tensors, got scores as a list"),
        ([1], {"labels": np.ones(1, np.int64)}, "expected tensors, got labels as a ndarray"),
        ([1], {"boxes": torch.zeros(4)}, r"got boxes of shape \(4,\) with N = 4"),
        ([1], {"boxes": torch.tensor(0.0)}, r"got boxes of shape \(\) with N = 0"),
        ([1], {"boxes": torch.tensor([[0, 0, 1, math.inf]])}, r"found box \[0\.0, 0\.0, 1\.0, inf\] at index 0"),
        ([1], {"boxes": torch.tensor([[9.0, 9.0, 5.0, 30.0]])}, r"found box .* expected x1 <= x2 and y1 <= y2"),
    ],
)
def test_bad_predictions_are_named_and_not_kept(image_ids: list[int], change: dict, message: str) -> None:
    evaluator = CocoEvaluator(ground_truth([{"bbox": BOX}]), [1, 2])
    good = detections((BOX, 0.9, 1))
    with pytest.raises(ValueError, match=message):
        evaluator.update(image_ids, [good | change] * len(image_ids))
    assert list(evaluator.results) == []
    evaluator.update([1, 2], [good, good])  # a refused update leaves no trace
    with pytest.raises(ValueError, match="image id 2 was updated twice"):
        evaluator.update([2], [good])


def test_other_bad_updates() -> None:
    evaluator = CocoEvaluator(ground_truth([]), [1, 2])
    with pytest.raises(ValueError, match="expected one prediction per image, got 1 for 2 images"):
        evaluator.update([1, 2], [detections()])
    with pytest.raises(ValueError, match=r"image id 1: no \['scores', 'labels'\], got the keys \['boxes'\]"):
        evaluator.update([1], [{"boxes": torch.zeros(0, 4)}])


def test_bad_categories() -> None:
    with pytest.raises(ValueError, match=r"ground truth, image id 1: bbox \[1, 2, 3\]: x y w h"):
        CocoEvaluator(ground_truth([{"bbox": [1, 2, 3]}]), [1, 2])
    with pytest.raises(ValueError, match=r"ground truth, image id 1: bbox .*: x y w h"):
        precision_recall(ground_truth([{"bbox": [*BOX, 1.0]}]), Detections.none(), [1, 2])
    truth = ground_truth([])
    with pytest.raises(ValueError, match=r"category_ids \[3\]: expected one or more of .* \[1, 2\]"):
        CocoEvaluator(truth, [1, 3])
    with pytest.raises(ValueError, match=r"category_ids \[\]: expected one or more"):
        CocoEvaluator(truth, [])
    with pytest.raises(ValueError, match=r"category_ids: expected each one once, got \[1, 1\]"):
        CocoEvaluator(truth, [1, 1])
    truth["categories"][1]["name"] = "class 1"
    with pytest.raises(ValueError, match="names of category_ids: expected each one once"):
        CocoEvaluator(truth, [1, 2])


# Backends and files


@pytest.fixture(params=["pycocotools", "faster-coco-eval"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    return request.param


def expect_equal_backends(truth: dict, rows: list[dict], category_ids: Sequence[int]) -> None:
    pytest.importorskip("faster_coco_eval")
    numbers = []
    for backend in ("pycocotools", "faster-coco-eval"):
        evaluator = CocoEvaluator(truth, category_ids, backend)
        evaluator.detections = Detections.from_rows(rows, truth, category_ids)
        numbers.append((evaluator.compute(), evaluator.per_class(), list(evaluator.results)))
    (plain, plain_classes, _), (fast, fast_classes, fast_rows) = numbers
    assert fast == pytest.approx(plain, rel=0, abs=1e-12)
    assert list(fast) == list(plain) and list(fast_classes) == list(plain_classes)
    for name, values in fast_classes.items():
        assert values == pytest.approx(plain_classes[name], rel=0, abs=1e-12)
    assert fast_rows == rows


@pytest.mark.parametrize("boxes", [[], [{"bbox": BOX}], [{"bbox": BOX, "iscrowd": 1}], [{"bbox": BOX}] * 2])
@pytest.mark.parametrize("found", [[], [0.9], [0.9, 0.8], [0.5] * 130])
@pytest.mark.parametrize("num_images", [0, 2])
def test_backends_agree_where_there_is_little(boxes: list[dict], found: list[float], num_images: int) -> None:
    """No images, no boxes, only crowds, no detections, duplicates, more than 100 detections."""
    truth = ground_truth(boxes if num_images else [], num_images=num_images)
    rows = [{"image_id": 1, "category_id": 1, "bbox": BOX, "score": score} for score in (found if num_images else [])]
    expect_equal_backends(truth, rows, (1, 2))


@pytest.mark.parametrize("seed", range(3))
def test_backends_agree_on_noisy_boxes(seed: int) -> None:
    truth, per_image = random_case(seed, (3, 17, 18, 90))
    evaluator = CocoEvaluator(truth, (90, 3, 18, 17))
    evaluator.update(list(per_image), list(per_image.values()))
    expect_equal_backends(truth, list(evaluator.results), (90, 3, 18, 17))


whole_boxes = st.tuples(*[st.integers(0, 60)] * 2, *[st.sampled_from([0, 4, 20, 40, 100])] * 2)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2), whole_boxes, st.sampled_from([0, 0, 1])), max_size=12),
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 2), whole_boxes, st.sampled_from([0.1, 0.2, 0.3])), max_size=20
    ),
)
def test_backends_agree_on_drawn_sets(true: list[tuple], found: list[tuple]) -> None:
    """Boxes with few different values, some without area: IoUs at the thresholds, equal scores, crowds."""
    truth = ground_truth(
        [
            {"image_id": image_id, "category_id": category_id, "bbox": list(map(float, box)), "iscrowd": crowd}
            for image_id, category_id, box, crowd in true
        ],
        num_images=3,
    )
    rows = [
        {"image_id": image_id, "category_id": category_id, "bbox": list(map(float, box)), "score": score}
        for image_id, category_id, box, score in found
    ]
    expect_equal_backends(truth, rows, (2, 1))


def test_missing_and_unknown_backends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = ground_truth([])
    with pytest.raises(ValueError, match="backend: expected one of pycocotools, faster-coco-eval, got 'fast'"):
        CocoEvaluator(truth, [1], "fast")
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match=r"faster-coco-eval needs its package: pip install hoyer-det\[fast\]"):
        CocoEvaluator(truth, [1], "faster-coco-eval")


def test_coco128_gives_the_official_tools_numbers(real_data, tmp_path: Path, backend: str) -> None:
    """The original annotation file and the saved predictions through pycocotools alone: the same in every digit.

    Noisy detections of each true box: shifted and stretched, some with a wrong label, some twice, some invented.
    """
    folder = real_data("coco128") / "coco128"
    annotation_file = folder / "annotations" / "instances_train2017.json"
    dataset = DetectionDataset(read_coco(annotation_file, folder / "train2017"))
    rng = np.random.default_rng(0)
    evaluator = CocoEvaluator(dataset.ground_truth(), dataset.annotations.category_ids, backend)
    num_classes = len(dataset.annotations.category_ids)
    for record in dataset.annotations.records:
        size = np.array([record.width, record.height] * 2)
        copies = rng.integers(0, 4, len(record.boxes))
        true = np.repeat(record.boxes, copies, axis=0)
        wide = np.tile(true[:, 2:] - true[:, :2], 2)
        boxes = np.concatenate([true + wide * rng.normal(0, 0.08, true.shape), size * rng.random((5, 4))])
        boxes = np.hstack([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])])
        labels = np.concatenate([np.repeat(record.labels, copies), rng.integers(1, num_classes + 1, 5)])
        wrong = rng.random(len(labels)) < 0.1
        labels[wrong] = rng.integers(1, num_classes + 1, wrong.sum())
        prediction = {"boxes": boxes.astype(np.float32), "labels": labels, "scores": rng.random(len(labels)).round(2)}
        prediction = {key: torch.from_numpy(values) for key, values in prediction.items()}
        evaluator.update([record.image_id], [prediction])
    evaluator.save_results(tmp_path / "predictions.json")
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotation_file))
        evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "predictions.json")), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = evaluator.compute()
    assert 0.1 < metrics["AP"] < 0.9 and -1 not in metrics.values()
    assert list(metrics.values()) == pytest.approx(evaluation.stats.tolist(), rel=0, abs=1e-12)


# A detector


class Stub(nn.Module):
    """Finds the given boxes, and fires where a pixel is above its threshold of 1."""

    def __init__(self, found: Sequence[dict[str, Tensor]]) -> None:
        super().__init__()
        self.spike, self.found = HoyerSpike(3), iter(found)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        for image in images:
            self.spike(image[None])
        return [next(self.found) for _ in images]


class Accelerator:
    """What `DetectionTask.evaluate` needs of accelerate's."""

    is_main_process = True
    autocast = contextlib.nullcontext


class Images:
    """Two images with a box each."""

    class annotations:
        category_ids = (1, 2)

    def ground_truth(self) -> dict:
        return ground_truth([{"bbox": BOX}, {"bbox": BOX, "image_id": 2}])


# Half of the pixels of the first image are above 1, a fifth of the second one's.
LOADER = [([torch.linspace(0, end, 300).reshape(3, 10, 10)], [{"image_id": i}]) for i, end in ((1, 2.0), (2, 1.25))]
FOUND = [detections((BOX, 0.9, 1)), detections((AWAY, 0.9, 1), (BOX, 0.7, 1))]


def evaluate_stub(images: slice, backend: str = "pycocotools", save: Path | None = None) -> Evaluation:
    data, evaluation = schema.Data(format="synthetic"), schema.Evaluation(backend=backend)
    task = DetectionTask(DetectionRecipe(data=data, evaluation=evaluation))
    return task.evaluate(Stub(FOUND[images]).eval(), LOADER[images], Images(), Accelerator(), save=save)


def test_evaluation_writes_what_it_returns(tmp_path: Path, backend: str) -> None:
    found = evaluate_stub(slice(None), backend, save=tmp_path / "new" / "folder")
    # Right, wrong with the same score, right: precision 1 up to recall 1/2, then 2/3; class 2 has no boxes.
    assert found.tables["voc"]["AP50_area"] == pytest.approx((1 + 2 / 3) / 2)
    assert found.tables["voc"]["AP50_11point"] == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert tuple(found.metrics) == METRICS
    assert found.metrics["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    class_1 = {key: pytest.approx(found.metrics[key]) for key in ("AP", "AP50")}
    class_2 = {"AP": -1.0, "AP50": -1.0}
    assert found.tables["per_class"] == {"class 1": class_1 | {"num_boxes": 2}, "class 2": class_2 | {"num_boxes": 0}}
    assert found.activity == 0.35 and found.activity_per_layer == {"spike": 0.35}
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["precision_recall.png", "predictions.json"]
    rows = json.loads((folder / "predictions.json").read_text())
    assert [(row["image_id"], row["bbox"]) for row in rows] == [(1, BOX), (2, AWAY), (2, BOX)]


def test_numbers_of_two_processes_are_those_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process sees one image; both report the boxes and the spikes of both, whoever comes first."""

    def numbers(images: slice) -> dict:  # the histograms are of each process's own first batch
        metrics = evaluate_stub(images).to_json()
        assert len(metrics.pop("potentials")["spike"]) == 40
        return metrics

    def gather_by(function) -> None:
        for module in (base, detection_task):
            monkeypatch.setattr(module, "gather_object", function)

    whole = numbers(slice(None))
    given_away: list[list] = []
    gather_by(lambda share: given_away.append(share) or share)
    shares = [evaluate_stub(slice(i, i + 1)).activity for i in (0, 1)]
    assert [*shares, whole["activity"]] == [0.5, 0.2, 0.35]

    first, second = given_away[:2], given_away[2:]
    other = iter(second)
    gather_by(lambda share: share + next(other))
    assert numbers(slice(0, 1)) == whole
    other = iter(first)
    gather_by(lambda share: share + next(other))
    assert numbers(slice(1, 2)) == whole


def test_an_evaluation_takes_the_backend_of_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    evaluate_stub(slice(None), "pycocotools")
    with pytest.raises(ImportError, match=r"pip install hoyer-det\[fast\]"):
        evaluate_stub(slice(None), "faster-coco-eval")


def test_a_full_folder_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        evaluate_run(tmp_path / "no such run", save=tmp_path)
