#!/usr/bin/env python3
"""`hoyer-det report`."""

from detection.cli.common import run_verb
from detection.cli.report import main

if __name__ == "__main__":
    run_verb(main)
