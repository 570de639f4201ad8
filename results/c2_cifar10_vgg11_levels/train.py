#!/usr/bin/env python3
"""A controlled run: spikes of several levels in place of 0/1, all else as in the method, surrogate gradient included.

    s = 1/n * number of i in 1..n with z >= 2 E i / (n + 1)

is the method's spike for n = 1, and approaches the ramp clip(z / 2E, 0, 1) for large n. It is the neuron `graded` of
n + 1 levels:

    python results/c2_cifar10_vgg11_levels/train.py configs/cifar10_vgg11.yaml --levels 3 --out runs/levels3
"""

from __future__ import annotations

from collections.abc import Sequence

from detection.cli.common import parse_recipe, recipe_parser, run_verb
from detection.config import set_values
from detection.runs import command_line
from detection.tasks.run import train_run


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train with spikes of so many steps."""
    parser = recipe_parser(__doc__, prog)
    parser.add_argument("--levels", type=int, required=True, help="n")
    parser.add_argument("--out", required=True, help="folder of the new run")
    config, options = parse_recipe(parser, arguments)
    graded = {"model.backbone.activation": "graded", "model.backbone.levels": options.levels + 1}
    train_run(set_values(config, graded), options.out, command_line())


if __name__ == "__main__":
    run_verb(main)
