#!/usr/bin/env python3
"""Trains a classifier by a recipe, such as to pretrain a detector's backbone, and leaves a run folder."""

from __future__ import annotations

import sys

from detection.classification import train_classifier
from detection.cli import parse_recipe, run_tool, run_training, training_parser
from detection.config import ClassificationConfig


def main() -> None:
    parser = training_parser(__doc__)
    parser.add_argument("--download", action="store_true", help="fetch CIFAR into data.root first, if missing")
    config, options = parse_recipe(parser, sys.argv[1:], ClassificationConfig)
    run_training(train_classifier, config, options, ("top1", "top5", "activity"))


if __name__ == "__main__":
    run_tool(main)
