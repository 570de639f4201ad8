#!/usr/bin/env python3
"""`hoyer-det robustness`."""

from detection.cli.common import run_verb
from detection.cli.robustness import main

if __name__ == "__main__":
    run_verb(main)
