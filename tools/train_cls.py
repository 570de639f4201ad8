#!/usr/bin/env python3
"""Trains a classifier by a recipe, such as to pretrain a detector's backbone, and leaves a run folder."""

from __future__ import annotations

import sys
from pathlib import Path

from detection.checkpoint import command_line
from detection.classification import train_classifier
from detection.cli import parse_recipe, recipe_parser, run_tool
from detection.config import ClassificationConfig


def main() -> None:
    parser = recipe_parser(__doc__)
    parser.add_argument("--out", help="folder of the new run (default: runs/NAME of the recipe)")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR into data.root first, if missing")
    config, options = parse_recipe(parser, sys.argv[1:], ClassificationConfig)
    folder = Path(options.out) if options.out else Path("runs") / Path(options.config).stem
    line = train_classifier(config, folder, command_line(), download=options.download)
    numbers = [f"{key} {line[key]:.4f}" for key in ("top1", "top5", "activity") if key in line]
    print(f"{'  '.join(numbers)}  run folder: {folder}")
    print(f"pictures: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")


if __name__ == "__main__":
    run_tool(main)
