"""Train every recipe for about a hundred steps, a quarter as wide, on drawn images or recordings made of them: fails
where one does not learn.

    make recipes
    python benchmarks/recipes.py [RECIPE ...]

A recipe keeps its network, regulariser, optimiser, losses, precision and augmentation. It gets narrow channels, small
images and batches, no compilation, no averaged weights, and, since it makes so few steps, a short warm-up and a
learning rate of Adam, AdamW and Muon of at least LEAST_LR (the authors' 1e-4 is meant for 600 epochs). It has learnt if
the losses of the last epoch, without the regulariser, are at most LEARNT of those of the first, and if the training
warns of nothing: no spike layer silent, almost silent or firing everywhere, no classifier at chance.

Of the classes next to nothing is left at first behind two dozen layers of bits without a residual stream, as in
MobileNetV1, least of all on a last map of 2x2 cells. So whatever has not learnt is tried once more, by the same
measure: twice as long, a classifier on images of 128 pixels.
"""

from __future__ import annotations

import argparse
import colorsys
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from detection.cli.common import run_verb
from detection.config import Recipe, find_recipe, read_recipe, recipe_names, set_values
from detection.records import EpochLog
from detection.runs import Run
from detection.tasks.run import train_run

WIDTH, EPOCHS = 0.25, 8
LEARNT = 0.9
LEAST_LR = 3e-3
CLASSES = 4  # of drawn images, 48 in training and 24 in validation each


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train the recipes that a command line names, or all; end with status 1 where one does not learn."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", metavar="RECIPE", nargs="*", help="default: all")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="an override")
    options = parser.parse_args(arguments)
    table = Table("recipe", "loss", "score", "activity", "seconds", "result")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        draw_stripes(Path(folder) / "stripes")
        for name in options.recipes or recipe_names():
            started = time.perf_counter()
            for attempt in (1, 2):
                recipe = shorten(read_recipe(find_recipe(name)), Path(folder), attempt)
                recipe = set_values(recipe, dict(options.set))
                history, problem = train(recipe, Path(folder) / "runs" / f"{Path(name).stem}_{attempt}")
                if not problem:
                    break
            failed += [name] * bool(problem)
            seconds = f"{time.perf_counter() - started:.0f}"
            table.add_row(name, *describe(history), seconds, problem or ("learns", "learns, second try")[attempt - 1])
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if failed:
        print(f"do not learn: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def shorten(recipe: Recipe, folder: Path, attempt: int) -> Recipe:
    """Return a recipe made small: see the module's text.

    Args:
        recipe: any, of a detector or a classifier.
        folder: where the drawn images are, or go.
        attempt: 1 or 2.
    """
    values: dict[str, Any] = {
        "model.backbone.width": WIDTH,
        "model.backbone.weights": None,
        "data.workers": 0,
        "data.classes": [],
        "optimizer.warmup_steps": min(recipe.optimizer.warmup_steps, 6),
        "optimizer.lr": recipe.optimizer.lr if recipe.optimizer.name == "sgd" else max(recipe.optimizer.lr, LEAST_LR),
        "hoyer.warmup_epochs": min(recipe.hoyer.warmup_epochs, 1.0),
        "train.epochs": EPOCHS * attempt,
        "train.batch_size": 12,
        "train.accumulate": 1,
        "train.eval_every": EPOCHS * attempt,
        "train.compile": False,
        "train.ema_decay": 0.0,
        "train.tensorboard": False,
    }
    events = recipe.data.are_events
    if hasattr(recipe.data, "scenes"):
        values |= {
            "data.format": "synthetic_events" if events else "synthetic",
            "data.root": folder / ("event_scenes" if events else "scenes"),
            "data.scenes.num_train": 72,
            "data.scenes.num_val": 24,
            "model.min_size": [160],  # an SSD's coarsest map then has more than one cell
            "model.max_size": 160,
            "model.neck.out_channels": 64,
            "model.head.representation_size": 64,
            "model.head.num_regions": 64,
        }
        if events:  # ten images of each
            values |= {"data.scenes.num_train": 8, "data.scenes.num_val": 3, "data.events.sensor": None}
    elif events:
        size = min(recipe.data.size, 64) if attempt == 1 else 128
        values |= {"data.format": "synthetic_events", "data.root": folder / f"event_shapes{size}", "data.size": size}
        values |= {"data.num_train": 48 * CLASSES, "data.num_val": 24 * CLASSES}
    else:
        values |= {
            "data.format": "folder",
            "data.root": folder / "stripes",
            "data.train": "train",
            "data.val": "val",
            "data.size": min(recipe.data.size, 64) if attempt == 1 else 128,
            "data.in_memory": True,
        }
    return set_values(recipe, values)


def draw_stripes(folder: Path) -> None:
    """Write class folders of images of 64x64 pixels with stripes, whose direction and colour are the class."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :64] / 64
    for split, number in (("train", 48), ("val", 24)):
        for label in range(CLASSES):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            angle = math.pi * label / CLASSES
            for index in range(number):
                wave = np.sin(
                    2
                    * math.pi
                    * (rng.uniform(4, 8) * (rows * math.sin(angle) + columns * math.cos(angle)) + rng.random())
                )
                hue = np.array(colorsys.hsv_to_rgb((label + rng.uniform(-0.2, 0.2)) / CLASSES, 0.8, 1.0))
                colours = 255 * hue, rng.uniform(0, 64, 3)
                share = (wave[..., None] + 1) / 2
                pixels = share * colours[0] + (1 - share) * colours[1] + rng.normal(0, 16, (64, 64, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{index}.png")


def train(recipe: Recipe, folder: Path) -> tuple[list[EpochLog], str | None]:
    """Train a recipe into a folder and return its log, and why it has not learnt."""
    try:
        train_run(recipe, folder, ["benchmarks/recipes.py"])
    except FloatingPointError as error:
        return [], str(error)
    history = Run.open(folder).history()
    return history, problem_of(history)


def describe(history: Sequence[EpochLog]) -> tuple[str, str, str]:
    """Return the losses of the epochs, the first metric and the spike activity of the last, for the table."""
    if not history:
        return "", "", ""
    evaluation = history[-1].evaluation
    key, value = next(iter(evaluation.metrics.items()))
    activity = "" if evaluation.activity is None else f"{evaluation.activity:.3f}"
    return " ".join(f"{loss_of(line):.2f}" for line in history), f"{key} {value:.3f}", activity


def loss_of(line: EpochLog) -> float:
    """Return the loss of an epoch without the regulariser."""
    return sum(value for name, value in line.losses.items() if name != "hoyer")


def problem_of(history: Sequence[EpochLog]) -> str | None:
    """Return why a training has not learnt, or None."""
    first, last = loss_of(history[0]), loss_of(history[-1])
    if not last <= LEARNT * first:
        return f"loss {last:.3f} after {first:.3f}"
    for line in history:
        if line.warnings:
            return "; ".join(line.warnings.values())
    if history[-1].silent:
        return f"silent: {', '.join(history[-1].silent)}"
    return None


if __name__ == "__main__":
    run_verb(main)
