#!/usr/bin/env python3
"""Evaluates a saved run again: COCO's 12 numbers, VOC's AP50, per-class AP and spike activity, beside its log's."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from detection.cli import run_tool
from detection.evaluation import METRICS
from detection.tasks import evaluate_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--weights", choices=("last", "best"), default="last", help="which weights (default: last)")
    parser.add_argument(
        "--save", metavar="FOLDER", help="new folder for predictions.json (COCO results), metrics.json and pictures"
    )
    options = parser.parse_args()
    metrics, logged = evaluate_run(options.run, options.weights, save=options.save)
    keys = [*METRICS, *(["activity"] if "activity" in metrics else [])]
    table = Table(
        "metric", "now", f"logged in epoch {logged['epoch']}", title=f"{options.run}, {options.weights} weights"
    )
    for key in keys:
        table.add_row(key, f"{metrics[key]:.4f}", f"{logged[key]:.4f}")
    for key, interpolation in (("AP50_11point", "11 points"), ("AP50_area", "area")):
        before = [f"{logged['voc'][key]:.4f}"] if "voc" in logged else []  # older logs have none
        table.add_row(f"VOC AP50 ({interpolation})", f"{metrics['voc'][key]:.4f}", *before)
    for name, values in metrics["per_class"].items():
        table.add_row(f"AP {name}", f"{values['AP']:.4f}", f"{logged['per_class'][name]['AP']:.4f}")
    Console().print(table)
    different = [key for key in keys if metrics[key] != logged[key]]
    print(f"not equal to the log: {', '.join(different)}" if different else "equal to the log in every digit")


if __name__ == "__main__":
    run_tool(main)
