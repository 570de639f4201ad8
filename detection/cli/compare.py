"""Train variants of a recipe with several seeds, and compare them in a table and a plot.

Each run goes to OUT/VARIANT_seedN. Finished runs are left as they are and an unfinished one goes on from its last saved
state, so an interrupted comparison goes on where it stopped, and more seeds can be added later. Then the energy of each
run is measured, once. OUT/README.md, comparison.json, comparison.csv, ablation.png (the metric) and energy.png (the
metric over the energy) are made from logs and analyses.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from detection.cli.common import Parser
from detection.config import FREE_KEYS, find_recipe, flatten, override, read_recipe, require_same
from detection.text import say
from detection.training.signals import PARENT

VARIANTS = {
    "hoyer": [],
    "relu": ["--model.backbone.activation", "relu"],
    "fixed": ["--model.backbone.activation", "fixed"],
    "no_regulariser": ["--hoyer.weight", "0"],
    "layer_extremum": ["--model.backbone.extremum", "layer"],
    "channel_extremum": ["--model.backbone.extremum", "channel"],
    "norm_before_pool": ["--model.backbone.pool_first", "False"],
    "graded2": ["--model.backbone.activation", "graded", "--model.backbone.levels", "2"],
    "graded4": ["--model.backbone.activation", "graded", "--model.backbone.levels", "4"],
    "thresholds3": ["--model.backbone.thresholds", "3"],
    "steps2": ["--model.backbone.time_steps", "2"],
    "steps4": ["--model.backbone.time_steps", "4"],
    "binary": ["--model.backbone.arithmetic", "binary"],
    # Its layers scale their own steps of SGD, as its authors train; AdamW leaves it at chance for long.
    "adder": shlex.split(
        "--model.backbone.arithmetic adder --optimizer.name sgd --optimizer.lr 0.1 --optimizer.weight_decay 5e-4"
    ),
}


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train the runs that a command line names, and compare them."""
    parser = build_parser(prog)
    options, common = parser.parse_known_args(arguments)
    if options.images < 1:
        raise ValueError(f"--images {options.images}: at least one image is needed")
    parsed = [parse_variant(text) for text in options.variants]
    if min(options.seeds) < 0:
        raise ValueError(f"--seeds {min(options.seeds)}: expected 0 or more")
    variants = dict(parsed)
    if len(variants) < len(parsed):
        raise ValueError(f"--variants {' '.join(options.variants)}: a name stands there twice")
    if (options.out / "config.yaml").exists():
        raise FileExistsError(f"--out {options.out}: a run folder; name another for the comparison")
    path = find_recipe(options.config)
    recipe = read_recipe(path)
    recipes = {}
    for name, overrides in variants.items():  # all of them, before hours are spent on some
        if any(each.partition("=")[0].removeprefix("--") == "train.seed" for each in [*common, *overrides]):
            raise ValueError(f"--variants {name}: --train.seed: the seeds of all variants are those of --seeds")
        try:
            recipes[name] = override(recipe, [*common, *overrides])
        except ValueError as error:
            raise ValueError(f"--variants {name}: {error}") from None

    from detection.comparison import FILES, compare_runs, require_same_data, runs_of
    from detection.models import check_origin
    from detection.runs import command_line
    from detection.tasks import task_of

    for name, each in recipes.items():
        task_of(each).check_names(f"--variants {name}")
        try:
            check_origin(each.model.backbone)
        except ValueError as error:
            raise ValueError(f"--variants {name}: {error}") from None
        for run in runs_of(options.out, name):  # all seeds are in the tables; classes are filled in from the data
            require_same(flatten(run.config), each, str(run.folder), free=FREE_KEYS | {"data.classes", "train.seed"})
    for seed in options.seeds:
        for name, overrides in variants.items():
            folder = options.out / f"{name}_seed{seed}"
            train(options.config, folder, [*common, *overrides], seed, recipes[name].data.root)
            require_same_data(options.out, recipes)
    roots = {name: each.data.root for name, each in recipes.items()}
    compare_runs(options.out, variants, command_line(), options.images, roots)
    say(f"{options.out}: {', '.join(FILES)}")


def build_parser(prog: str | None) -> Parser:
    """Return the parser of the verb."""
    parser = Parser(__doc__, prog)
    parser.add_argument("config", metavar="RECIPE", help="a YAML file, or a name of `hoyer-det recipes`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, the table and the plot")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of every variant (default: 0)")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["hoyer", "relu", "fixed", "no_regulariser"],
        metavar="NAME",
        help=f"of {', '.join(VARIANTS)}, or NAME='OVERRIDES'; the first is what the others are compared with",
    )
    help = "evaluation images over which energy is measured (default: 512, or all if there are fewer)"
    parser.add_argument("--images", type=int, default=512, metavar="N", help=help)
    parser.epilog = (
        "Further arguments are overrides of the recipe, for all variants, whose own overrides come after them."
    )
    return parser


def parse_variant(text: str) -> tuple[str, list[str]]:
    """Return a variant's name and its overrides.

    Raises:
        ValueError: neither a known name nor NAME=OVERRIDES.
    """
    name, equals, overrides = text.partition("=")
    if not equals and name not in VARIANTS:
        raise ValueError(f"--variants {name}: unknown (allowed: {', '.join(VARIANTS)}, or NAME='OVERRIDES')")
    if not re.fullmatch(r"[A-Za-z0-9-]+(_[A-Za-z0-9-]+)*", name) or "_seed" in name:
        raise ValueError(
            f"--variants {text}: the name becomes part of a folder's (allowed: letters, digits, '-' and '_', not _seed)"
        )
    try:
        return name, shlex.split(overrides) if equals else VARIANTS[name]
    except ValueError as error:
        raise ValueError(f"--variants {text}: {str(error).lower()}") from None


def train(recipe: str, folder: Path, overrides: Sequence[str], seed: int, data_root: Path) -> None:
    """Train one run, by a recipe whose data lie in `data_root`, in a process of its own, unless it is finished already.

    Raises:
        ChildProcessError: it failed; its own message stands above.
    """
    if (folder / "config.yaml").is_file():
        from detection.runs import Run

        if Run.open(folder).finished:
            say(f"{folder}: finished already")
            return
        arguments = ["--resume", str(folder), "--data.root", str(data_root)]
    else:
        arguments = [recipe, *overrides, "--train.seed", str(seed), "--out", str(folder)]
    say(f"{folder}: hoyer-det train {shlex.join(arguments)}")
    if run_child(arguments):
        raise ChildProcessError(f"{folder}: this run failed, see above; the finished ones are kept")


def run_child(arguments: Sequence[str]) -> int:
    """Return the status of a training in a process of its own, which is stopped when this one ends, however it does."""
    # The package of this process, wherever it lies.
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    watched, held = os.pipe()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places)), PARENT: str(watched)}
    try:
        command = [sys.executable, "-m", "detection", "train", *arguments]
        child = subprocess.Popen(command, env=environment, pass_fds=[watched])
        os.close(watched)
        try:
            return child.wait()
        except KeyboardInterrupt:  # which it has heard, too
            child.wait()
            raise
    finally:
        os.close(held)
