"""Read the whole data set of a recipe, every image included, and report what it has and what is wrong with it.

Exit status: 0 if training can go on with the rest, 1 if it cannot.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from detection.cli.common import parse_recipe, recipe_parser, show_table
from detection.text import say

if TYPE_CHECKING:
    from detection.data.report import DataReport


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the data of a command line's recipe and print what was found."""
    config, _ = parse_recipe(recipe_parser(__doc__, prog), arguments)

    from detection.config import set_values
    from detection.tasks import task_of

    task = task_of(set_values(config, {"data.verify": "full"}))
    try:
        train = task.read("train")
        task = task.with_classes(train.classes)
        val = task.read("val")
    except (ValueError, OSError) as error:
        say(f"training cannot go on: {error}")
        sys.exit(1)
    for name, dataset in (("train", train), ("val", val)):
        report = task.data_report(dataset)
        if report is None:
            print(f"{name}: {len(dataset)} images of {len(dataset.classes)} classes")
        else:
            show(name, report)
        print(f"{name}: left out or mended: {len(dataset.dropped)}")
        for problem in dataset.dropped:  # not wrapped: each stays one line
            say(f"{name}: {problem}")
    shared = task.shared_images(train, val)
    if shared:
        say(f"in both train and val: {len(shared)} images, the first: {shared[0]}")
    print("training can go on")


def show(name: str, report: DataReport) -> None:
    """Print the counts of one split as a table and lines."""
    columns = ("class", "objects", "ignored", "images")
    rows = [
        (entry.name, str(entry.num_objects), str(entry.num_ignored), str(entry.num_images)) for entry in report.classes
    ]
    show_table(f"{name}: {report.num_images} images", columns, rows)
    print(f"{name}: images without objects: {report.num_empty}")
    for side, (least, median, most) in (("width", report.widths), ("height", report.heights)):
        print(f"{name}: image {side}: {least:g} to {most:g} pixels, median {median:g}")
    least, median, most = report.sizes
    print(f"{name}: object size (root of the area): {least:.1f} to {most:.1f} pixels, median {median:.1f}")
    print(
        f"{name}: objects: {report.num_small} small, {report.num_medium} medium, {report.num_large} large (32^2, 96^2)"
    )
