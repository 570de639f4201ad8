#!/usr/bin/env python3
"""Reads the whole data set of a recipe, every image included, and reports what it has and what is wrong with it.

Exit status: 0 if training can go on with the rest, 1 if it cannot.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from detection.cli import parse_recipe, recipe_parser, run_tool
from detection.data import build_datasets
from detection.data.report import DataReport, report, shared_images


def show(name: str, split: DataReport, console: Console) -> None:
    """One split as a table and lines; problems are not wrapped, so that each stays one line."""
    table = Table("class", "objects", "ignored", "images", title=f"{name}: {split.num_images} images")
    for entry in split.classes:
        table.add_row(entry.name, str(entry.num_objects), str(entry.num_ignored), str(entry.num_images))
    console.print(table)
    print(f"{name}: images without objects: {split.num_empty}")
    for what, (least, median, most) in (("width", split.widths), ("height", split.heights)):
        print(f"{name}: image {what}: {least:g} to {most:g} pixels, median {median:g}")
    least, median, most = split.sizes
    print(f"{name}: object size (root of the area): {least:.1f} to {most:.1f} pixels, median {median:.1f}")
    print(f"{name}: objects: {split.num_small} small, {split.num_medium} medium, {split.num_large} large (32^2, 96^2)")
    print(f"{name}: left out or mended: {len(split.problems)}")
    for problem in split.problems:
        print(f"{name}: {problem}")


def main() -> None:
    config, _ = parse_recipe(recipe_parser(__doc__), sys.argv[1:])
    try:
        train, val = build_datasets(config.data.model_copy(update={"verify": "full"}))
    except (ValueError, OSError) as error:
        print(f"training cannot go on: {error}")
        sys.exit(1)
    console = Console()
    for name, dataset in (("train", train), ("val", val)):
        show(name, report(dataset.annotations), console)
    shared = shared_images(train.annotations, val.annotations)
    if shared:
        print(f"in both train and val: {len(shared)} images, the first: {shared[0]}")
    print("training can go on")


if __name__ == "__main__":
    run_tool(main)
