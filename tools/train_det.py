#!/usr/bin/env python3
"""Trains a detector by a recipe and leaves a run folder: config, log, weights, curves, pictures."""

from __future__ import annotations

import sys
from pathlib import Path

from detection.checkpoint import command_line
from detection.cli import parse_recipe, run_tool
from detection.tasks import train_detector


def main() -> None:
    config, options = parse_recipe(__doc__, sys.argv[1:])
    folder = Path(options.out) if options.out else Path("runs") / Path(options.config).stem
    line = train_detector(config, folder, command_line())
    numbers = [f"{key} {line[key]:.4f}" for key in ("AP", "AP50", "activity") if key in line]
    print(f"{'  '.join(numbers)}  run folder: {folder}")


if __name__ == "__main__":
    run_tool(main)
