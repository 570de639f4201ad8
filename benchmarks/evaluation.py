#!/usr/bin/env python3
"""Does a large validation set fit? Time and memory of an evaluation of drawn detections, by both counting packages."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import add_log_option, print_table, run_benchmark, write_log

from detection.evaluation import CocoEvaluator, import_backend, precision_recall

SIDE = 640  # pixels of an image
NOISE = 0.05  # of a found box's corners, in sides of the box


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000, help="(default: 100000)")
    parser.add_argument("--boxes", type=int, default=7, help="true boxes per image (default: 7)")
    parser.add_argument("--detections", type=int, default=8, help="per image (default: 8)")
    parser.add_argument("--classes", type=int, default=80, help="(default: 80)")
    add_log_option(parser, "evaluation", picture=False)
    options = parser.parse_args()
    size = {key: getattr(options, key) for key in ("images", "boxes", "detections", "classes")}
    rows = []
    for backend in ("pycocotools", "faster-coco-eval"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # the peak is that of a whole process
            rows.append({"backend": backend} | pool.apply(measure, (backend, size)))
    columns = ("detecting", "counting", "voc", "writing")
    print_table(
        f"{options.images * options.detections:,} detections on {options.images:,} images, {options.classes} classes",
        ("package", *(f"{column}, s" for column in columns), "peak memory, GiB"),
        [
            (
                row["backend"],
                *(f"{row[f'{column}_seconds']:.1f}" for column in columns),
                f"{row['peak_bytes'] / 2**30:.2f}",
            )
            for row in rows
        ],
    )
    write_log(options.log, size | {"rows": rows})


def measure(backend: str, size: dict[str, int]) -> dict[str, Any]:
    """Return the seconds of each part of an evaluation, and the most memory that this process had, then and before."""
    import_backend(backend)
    before = most_bytes()
    truth, predictions = draw(size, np.random.default_rng(0))
    category_ids = [category["id"] for category in truth["categories"]]
    evaluator = CocoEvaluator(truth, category_ids, backend)
    clock, cpu = [time.perf_counter()], time.process_time()
    for image_id, prediction in enumerate(predictions, start=1):
        evaluator.update([image_id], [prediction])
    clock.append(time.perf_counter())
    metrics = evaluator.compute()
    clock.append(time.perf_counter())
    cpu = time.process_time() - cpu
    precision_recall(truth, evaluator.detections, category_ids)
    clock.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        evaluator.save_results(Path(folder) / "predictions.json")
    clock.append(time.perf_counter())
    seconds = np.diff(clock).round(2).tolist()
    names = ("detecting_seconds", "counting_seconds", "voc_seconds", "writing_seconds")
    found = {"cpu_seconds": round(cpu, 3), "peak_bytes": most_bytes(), "before_bytes": before, "AP": metrics["AP"]}
    return dict(zip(names, seconds, strict=True)) | found


def most_bytes() -> int:
    """Return the most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def draw(size: dict[str, int], rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    """Return a ground truth, and detections image by image: true boxes moved a little, some invented.

    A class is the rarer the higher its number, as in COCO.
    """
    number, classes = size["images"] * size["boxes"], size["classes"]
    weights = 1 / np.arange(1, classes + 1)
    labels = rng.choice(classes, number, p=weights / weights.sum()) + 1
    corners = np.hstack([rng.uniform(0, SIDE / 2, (number, 2)), np.exp(rng.uniform(2, 5.5, (number, 2)))])
    annotations = [
        {
            "id": index + 1,
            "image_id": index // size["boxes"] + 1,
            "category_id": label,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for index, (label, box) in enumerate(zip(labels.tolist(), corners.tolist(), strict=True))
    ]
    truth = {
        "images": [{"id": index + 1, "width": SIDE, "height": SIDE} for index in range(size["images"])],
        "annotations": annotations,
        "categories": [{"id": index + 1, "name": f"class {index + 1}"} for index in range(classes)],
    }

    def detections() -> Any:
        boxes = np.hstack([corners[:, :2], corners[:, :2] + corners[:, 2:]]).reshape(size["images"], -1, 4)
        for image, found in enumerate(boxes):
            chosen = rng.integers(0, size["boxes"], size["detections"])
            moved = found[chosen] + NOISE * rng.normal(size=(size["detections"], 4)) * np.ptp(found[chosen], 1)[:, None]
            own = labels.reshape(size["images"], -1)[image, chosen]
            drawn = rng.integers(1, classes + 1, size["detections"])
            yield {
                "boxes": torch.from_numpy(np.hstack([moved[:, :2], np.maximum(moved[:, 2:], moved[:, :2] + 1)])),
                "scores": torch.from_numpy(rng.random(size["detections"])),
                "labels": torch.from_numpy(np.where(rng.random(size["detections"]) < 0.2, drawn, own)),
            }

    return truth, detections()


if __name__ == "__main__":
    run_benchmark(main)
