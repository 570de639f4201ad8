"""Read the whole data set of a recipe or a folder, every image, and report what it has and what is wrong with it.

The format of a folder is recognised by what lies in it: yolo, coco, voc or csv.

Exit status: 0 if training can go on with the rest, 1 if it cannot.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detection.cli.common import Parser, parse_recipe, recipe_parser, show_table
from detection.config import Recipe, set_values
from detection.config import parse_recipe as recipe_of
from detection.config.io import read_overrides
from detection.text import plural, say

if TYPE_CHECKING:
    from detection.data.layouts import Layout
    from detection.data.report import DataReport


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the data of a command line's recipe and print what was found."""
    parser = recipe_parser(__doc__, prog, "RECIPE_OR_FOLDER")
    add_format(parser)
    options, overrides = parser.parse_known_args(arguments)
    layout = None
    if options.config and Path(options.config).is_dir():
        config, layout = recipe_of_folder(Path(options.config), options.format, overrides)
    else:
        config, options = parse_recipe(parser, arguments)
        if options.format is not None:
            parser.error(f"--format {options.format}: for a folder; a recipe has data.format")

    from detection.tasks import task_of

    task = task_of(set_values(config, {"data.verify": "full"}))
    try:
        train = task.read("train")
        task = task.with_classes(train.classes)
        splits = {"train": train, "val": task.read("val")}
        unseen = 0
        if config.data.verify != "full" and any(dataset.dropped for dataset in splits.values()):
            known = task_of(set_values(task.config, {"data.verify": config.data.verify}))
            unseen = sum(len(known.read(split)) - len(dataset) for split, dataset in splits.items())
    except (ValueError, OSError) as error:
        say(f"training cannot go on: {error}")
        sys.exit(1)
    if layout is not None and layout.test:
        values = {"data.val": list(layout.test), "data.val_images": layout.test_images}
        try:
            splits["test"] = task_of(set_values(task.config, values)).read("val")
        except (ValueError, OSError) as error:
            say(f"test, which training does not read: {error}")
    for name, dataset in splits.items():
        report = task.data_report(dataset)
        if report is None:
            print(f"{name}: {len(dataset)} images of {plural(len(dataset.classes), 'class', 'classes')}")
            counts = Counter(dataset.classes[label] for label in getattr(dataset, "labels", ()))
            show_table(name, ("class", "images"), [(each, str(counts[each])) for each in dataset.classes])
        else:
            show(name, report)
        print(f"{name}: left out or mended: {len(dataset.dropped)}")
        for problem in dataset.dropped:  # not wrapped: each stays one line
            say(f"{name}: {problem}")
    for name in list(splits)[1:]:
        shared = task.shared_images(train, splits[name])
        if shared:
            say(f"in both train and {name}: {len(shared)} images, the first: {shared[0]}")
    for sentence in task.warnings(train, data_alone=layout is not None):
        say(f"warning: {sentence}")
    if unseen:
        number = f"{plural(unseen, 'image')} of those left out"
        why = f"it stops at {number}, which data.verify header does not find"
        say(f"training cannot go on: {why}; set data.verify full, or remove them")
        sys.exit(1)
    print("training can go on")


def add_format(parser: Parser) -> None:
    """Add `--format NAME`, the only format to look for in a folder."""
    parser.add_argument("--format", metavar="NAME", help="of a folder: take it for this format (default: recognise it)")


def recipe_of_folder(folder: Path, format: str | None, overrides: Sequence[str]) -> tuple[Recipe, Layout]:
    """Return a recipe that reads a folder, all else by default, and its layout; say which format it has, and why.

    Args:
        folder: with images and annotations.
        format: the only one to look for; None: all.
        overrides: `--data.key VALUE` of a command line.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: its format is not recognised, or an override is none of the section data.
    """
    from detection.data.layouts import recognise

    layout, *others = recognise(folder, format)
    say(f"format: {layout.format}, {layout.share:.0%} sure: {'; '.join(layout.saw)}")
    for other in others:
        say(f"could be {other.format} as well: {'; '.join(other.saw)}; --format {other.format} takes it for that")
    config = recipe_of({"data": layout.values}, str(folder))
    values = read_overrides(type(config), overrides)
    other = next((key for key in values if not key.startswith("data.")), None)
    if other is not None:
        raise ValueError(f"--{other}: of a recipe; a folder takes keys of the section data")
    known = layout.values.keys() & {"val", "val_fraction"} or "data.val" in values
    if values.get("data.val_fraction") and not known:  # as data.yaml may name one
        raise ValueError(f"--data.val_fraction: {folder} has a validation set of its own; drop one")
    keys = {**layout.values, "verify": "full", **{key.removeprefix("data."): value for key, value in values.items()}}
    if values.get("data.val") and "data.val_fraction" not in values:  # in place of a part of the training images
        keys.pop("val_fraction", None)
    config = set_values(
        recipe_of({"data": {"format": keys["format"], "root": keys["root"]}}, str(folder)),
        {f"data.{key}": value for key, value in keys.items()},
    )
    return config, layout._replace(values=keys)


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
