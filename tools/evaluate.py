#!/usr/bin/env python3
"""Evaluates a saved run again, beside its log: accuracy, or COCO's 12 numbers, VOC's AP50 and AP per class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import PartialState
from rich.table import Table

from detection.checkpoint import Run
from detection.classification import evaluate_classification_run
from detection.cli import run_tool, saved_run_parser, table_console
from detection.evaluation import METRICS
from detection.tasks import evaluate_run


def main() -> None:
    parser = saved_run_parser(__doc__)
    parser.add_argument(
        "--save",
        metavar="FOLDER",
        help="detectors: new folder for predictions.json (COCO results), metrics.json and pictures",
    )
    options = parser.parse_args()
    if Run.open(options.run).config.task == "classification":
        if options.save:
            parser.error(f"--save: {options.run} is a classifier, which has no boxes to save")
        keys = ["top1", "top5", "val_loss"]
        metrics, logged = evaluate_classification_run(options.run, options.weights, data_root=options.data_root)
        rows: list[tuple[str, ...]] = []
    else:
        keys = list(METRICS)
        metrics, logged = evaluate_run(options.run, options.weights, data_root=options.data_root, save=options.save)
        rows = list(detection_rows(metrics, logged))
    if not PartialState().is_main_process:  # of several, one tells
        return
    keys += ["activity"] if "activity" in metrics else []
    table = Table(
        "metric", "now", f"logged in epoch {logged['epoch']}", title=f"{options.run}, {options.weights} weights"
    )
    for key in keys:
        table.add_row(key, shown(metrics[key]), shown(logged[key]))
    for row in rows:
        table.add_row(*row)
    table_console().print(table)
    different = [key for key in keys if metrics[key] != logged[key]]
    print(f"not equal to the log: {', '.join(different)}" if different else "equal to the log in every digit")


def detection_rows(metrics: dict[str, Any], logged: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """VOC's numbers and those of each class."""
    for key, interpolation in (("AP50_11point", "11 points"), ("AP50_area", "area")):
        before = [f"{logged['voc'][key]:.4f}"] if "voc" in logged else []  # older logs have none
        yield f"VOC AP50 ({interpolation})", f"{metrics['voc'][key]:.4f}", *before
    for name, values in metrics["per_class"].items():
        yield f"AP {name}", shown(values["AP"]), shown(logged["per_class"][name]["AP"])


def shown(value: float) -> str:
    """Four digits; COCO's -1, of what has no objects, in words."""
    return "no objects" if value == -1 else f"{value:.4f}"


if __name__ == "__main__":
    run_tool(main)
