#!/usr/bin/env python3
"""Trains a detector by a recipe and leaves a run folder: config, log, weights, curves, pictures."""

from __future__ import annotations

import sys

from detection.cli import parse_recipe, run_tool, run_training, training_parser
from detection.tasks import train_detector


def main() -> None:
    parser = training_parser(__doc__)
    parser.add_argument("--download", action="store_true", help="fetch VOC or COCO into data.root first, if missing")
    config, options = parse_recipe(parser, sys.argv[1:])
    run_training(train_detector, config, options, ("AP", "AP50", "activity"))


if __name__ == "__main__":
    run_tool(main)
