#!/usr/bin/env python3
"""Write results/controlled_cifar10/README.md: runs that differ from a base in one thing each, beside their twins.

With --check nothing is written: the status is 1 if the file says something else than the logs.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from detection.cli.common import Parser, run_verb
from detection.config import FREE_KEYS, Recipe, flatten
from detection.runs import Run
from detection.text import spread

FOLDER = "controlled_cifar10"
HEADER = """# Controlled runs on CIFAR-10 (JPEG)

Made from the logs by `python results/controlled_runs.py`. All networks have a quarter of the published width and 8
epochs; a row differs from the base only in what it names. The base: Muon (learning rate 0.02, 3 Newton-Schulz steps),
AdamW (2e-3, decay 0.05) for what is no hidden convolution, cosine, label smoothing 0.1, alternating flip, bf16, batches
of 128, no regulariser. Top-1 is that of the last epoch; ± is the standard deviation over the seeds. The gap is to the
twin of the same structure, in points.
"""
NAMES = {"vgg16": "VGG16", "resnet18": "ResNet18"}
BASE = {"vgg16": "vgg_base_s0", "resnet18": "res_base_s0"}
STRUCTURE = ("model.backbone.head", "model.backbone.shortcut")
# Keys that say nothing of a difference, or come with another.
ASIDE = {*FREE_KEYS, "train.seed", "distillation.logits", "distillation.temperature", "distillation.features"}


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Write the table, or compare it."""
    parser = Parser(__doc__, prog)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="folder that has it")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    folder = options.folder / FOLDER
    runs = [run for path in sorted(folder.glob("*/config.yaml")) if (run := Run.open(path.parent)).finished]
    page, path = page_of(runs), folder / "README.md"
    if options.check:
        if not path.is_file() or path.read_text("utf-8") != page:
            print(f"{path}: says something else than the logs; python results/controlled_runs.py writes it")
            sys.exit(1)
        return
    path.write_text(page, encoding="utf-8")
    print(f"{path}: {len(runs)} runs")


def page_of(runs: Sequence[Run]) -> str:
    """Return the page: a table for each network."""
    parts = [HEADER]
    for name, title in NAMES.items():
        ours = [run for run in runs if run.config.model.backbone.name == name]
        base = next(run for run in ours if run.folder.name == BASE[name])
        rows: dict[str, list[Run]] = defaultdict(list)
        for run in ours:
            rows[describe(run.config, base.config)].append(run)
        twins = {structure(run): top1(rows[change]) for change, (run, *_) in rows.items() if is_twin(run)}
        lines = [f"## {title}\n", "| change | seeds | top-1 | gap | activity | minutes | runs |", "|---" * 7 + "|"]
        lines += [row(change, each, twins) for change, each in sorted(rows.items(), key=lambda item: -top1(item[1]))]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def row(change: str, runs: Sequence[Run], twins: dict[tuple[str, ...], float]) -> str:
    """Return the line of the runs of one change, which differ in their seeds."""
    values = [run.history()[-1].evaluation for run in runs]
    activity = [each.activity for each in values if each.activity is not None]
    twin = None if is_twin(runs[0]) else twins.get(structure(runs[0]))
    seconds = [line.total_seconds or 0.0 for run in runs for line in run.history()]
    cells = [
        change,
        str(len(runs)),
        spread([each.metrics["top1"] for each in values], 4),
        "" if twin is None else f"{100 * (twin - top1(runs)):.1f}",
        f"{statistics.mean(activity):.3f}" if activity else "",
        f"{sum(seconds) / 60 / len(runs):.0f}",
        ", ".join(f"[{run.config.train.seed}]({run.folder.name}/)" for run in runs),
    ]
    return f"| {' | '.join(cells)} |"


def top1(runs: Iterable[Run]) -> float:
    """Return the mean of the last epoch's accuracy."""
    return statistics.mean(run.history()[-1].metrics["top1"] for run in runs)


def is_twin(run: Run) -> bool:
    """Return whether a run's network has no spikes."""
    return run.config.model.backbone.activation == "relu"


def structure(run: Run) -> tuple[str, ...]:
    """Return the options that twin and spiking network have in common."""
    values = flatten(run.config)
    return tuple(str(values[key]) for key in STRUCTURE)


def describe(config: Recipe, base: Recipe) -> str:
    """Return what differs from the base, "base" where nothing does."""
    values, before = flatten(config), flatten(base)
    changes = [
        "a teacher, the twin" if key == "distillation.teacher" else f"`{key} {value}`"
        for key, value in values.items()
        if value != before.get(key) and key not in ASIDE
    ]
    return ", ".join(changes) or "base"


if __name__ == "__main__":
    run_verb(main)
