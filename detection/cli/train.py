"""Train by a recipe and leave a run folder: config, log, weights, curves, pictures.

The recipe says what is trained: a detector, or a classifier, such as to pretrain a detector's backbone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from detection.cli.common import parse_recipe, recipe_parser
from detection.text import say


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train as a command line says, print the last epoch's metrics and the files of the run folder."""
    parser = recipe_parser(__doc__, prog)
    parser.usage = "%(prog)s RECIPE [options] [--section.key VALUE ...]\n       %(prog)s --resume RUN [options]"
    parser.add_argument("--out", help="folder of the new run (default: runs/NAME of the recipe)")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was interrupted, as if it had not been")
    help = "with --resume: so many epochs behind the end, a further cycle of the schedule with a new optimiser"
    parser.add_argument("--extend", type=int, metavar="EPOCHS", help=help)
    help = "learning rates of that cycle, in those of the recipe (default: 0.5)"
    parser.add_argument("--extend-lr", type=float, metavar="FACTOR", help=help)
    parser.add_argument("--download", action="store_true", help="fetch VOC, COCO or CIFAR first, if missing")
    config, options = parse_recipe(parser, arguments)
    if options.extend is not None and not options.resume:
        parser.error(f"--extend {options.extend} goes on with a run: --resume RUN --extend EPOCHS")
    if options.extend_lr is not None and options.extend is None:
        parser.error(f"--extend-lr {options.extend_lr}: of the cycle of --resume RUN --extend EPOCHS")
    for option, value in {"--extend": options.extend, "--extend-lr": options.extend_lr}.items():
        if value is not None and not 0 < value < math.inf:
            parser.error(f"{option} {value}: expected a number above 0")
    folder = Path(options.resume or options.out or Path("runs") / options.config.stem)

    from accelerate import PartialState

    from detection.config import flatten, require_same
    from detection.runs import Run, command_line
    from detection.tasks import task_of
    from detection.tasks.run import train_run
    from detection.training.signals import end_with_parent

    end_with_parent()
    extend = {"extend": options.extend, "lr_factor": options.extend_lr}
    extend = {key: value for key, value in extend.items() if value is not None}
    if options.resume and Run.open(folder).finished and not options.extend:
        require_same(flatten(Run.open(folder).config), config, f"{folder} has finished")
        say(f"{folder}: finished already, nothing to go on with")
        return
    task = task_of(config)
    task.check_names(options.config)
    line = train_run(config, folder, command_line(), download=options.download, resume=bool(options.resume), **extend)
    if not PartialState().is_main_process:  # of several, one tells
        return
    numbers = [f"{key} {line.metrics[key]:.4f}" for key in (*task.shown, "activity") if key in line.metrics]
    say(f"{'  '.join(numbers)}  run folder: {folder}")
    say(f"pictures: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
