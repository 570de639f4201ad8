#!/usr/bin/env python3
"""A controlled run: spikes of several levels in place of 0/1, all else as in the method, surrogate gradient included.

    s = 1/n * number of i in 1..n with z >= 2 E i / (n + 1)

is the method's spike for n = 1, and approaches the ramp clip(z / 2E, 0, 1) for large n.

    python results/c2_cifar10_vgg11_levels/train.py configs/cifar10_vgg11.yaml --levels 3 --out runs/levels3
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import backbones.hoyer
from detection.checkpoint import command_line
from detection.classification import train_classifier
from detection.cli import parse_recipe, recipe_parser, run_tool
from detection.config import ClassificationConfig


def staircase(num_levels: int):
    """`backbones.hoyer.spike` with `num_levels` steps."""

    def spike(z: Tensor, threshold: Tensor | float = 1.0) -> Tensor:
        steps = [(z >= threshold * (2 * i / (num_levels + 1))).to(z.dtype) for i in range(1, num_levels + 1)]
        hard = sum(steps) / num_levels
        if not (torch.is_grad_enabled() and z.requires_grad):
            return hard
        g = 0.5 * F.hardtanh(z, 0.0, 2.0)
        return hard + (g - g.detach())

    return spike


def main() -> None:
    parser = recipe_parser(__doc__)
    parser.add_argument("--levels", type=int, required=True, help="n")
    parser.add_argument("--out", required=True, help="folder of the new run")
    config, options = parse_recipe(parser, sys.argv[1:], ClassificationConfig)
    backbones.hoyer.spike = staircase(options.levels)
    train_classifier(config, options.out, command_line())


if __name__ == "__main__":
    run_tool(main)
