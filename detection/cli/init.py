"""Write a recipe for a folder of images and boxes, and say why each value is what it is.

The format is recognised as `check-data FOLDER` does. Options --data.KEY VALUE, such as --data.val_fraction 0.1 or
--data.group_by PATTERN, are taken over as they are.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from detection.cli.check_data import add_format, recipe_of_folder
from detection.cli.common import Parser
from detection.config import read_recipe
from detection.config.yaml_files import flow_yaml
from detection.text import plural, say


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Write the recipe that a command line asks for."""
    parser = Parser(__doc__, prog, usage="%(prog)s FOLDER [options] [--data.KEY VALUE ...]")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with images and annotations, as downloaded")
    parser.add_argument("--out", type=Path, default=Path("recipe.yaml"), metavar="FILE", help="default: recipe.yaml")
    add_format(parser)
    options, overrides = parser.parse_known_args(arguments)
    if options.out.exists():
        raise FileExistsError(f"{options.out} exists already; name another file with --out, or remove it first")
    config, layout = recipe_of_folder(options.folder, options.format, overrides)

    from detection.files import write_whole
    from detection.tasks import task_of
    from detection.tasks.proposal import as_yaml, propose

    task = task_of(config)
    train = task.read("train")
    val = task.with_classes(train.classes).read("val")
    plain, values = config.data.model_dump(mode="json"), {}
    for key in layout.values:
        section, _, inner = key.partition(".")
        if inner:
            values.setdefault(section, {})[inner] = plain[section][inner]
        elif key != "classes":
            values[key] = plain[key]
    choices = propose(values, train.annotations, "; ".join(layout.saw))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, as_yaml(choices, options.out, options.folder).encode())
    print(f"{len(train)} training and {len(val)} validation images, {plural(len(train.classes), 'class', 'classes')}")
    for key, value, why in choices:
        say(f"{key}: {flow_yaml(value)}" + (f": {why}" if why else ""))
    for sentence in task_of(read_recipe(options.out)).warnings(train):
        say(f"warning: {sentence}")
    dropped = len(train.dropped) + len(val.dropped)
    if dropped:
        say(f"left out or mended: {dropped}; hoyer-det check-data {shlex.quote(str(options.out))} names them")
    say(f"written: {options.out}; next: hoyer-det train {shlex.quote(str(options.out))}")
