#!/usr/bin/env python3
"""Trains a detector by a recipe and leaves a run folder: config, log, weights, curves, pictures."""

from __future__ import annotations

import sys
from pathlib import Path

from detection.checkpoint import command_line
from detection.cli import parse_recipe, recipe_parser, run_tool
from detection.tasks import train_detector


def main() -> None:
    parser = recipe_parser(__doc__)
    parser.add_argument("--out", help="folder of the new run (default: runs/NAME of the recipe)")
    parser.add_argument("--download", action="store_true", help="fetch VOC or COCO into data.root first, if missing")
    config, options = parse_recipe(parser, sys.argv[1:])
    folder = Path(options.out) if options.out else Path("runs") / Path(options.config).stem
    line = train_detector(config, folder, command_line(), download=options.download)
    numbers = [f"{key} {line[key]:.4f}" for key in ("AP", "AP50", "activity") if key in line]
    print(f"{'  '.join(numbers)}  run folder: {folder}")
    print(f"pictures: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")


if __name__ == "__main__":
    run_tool(main)
