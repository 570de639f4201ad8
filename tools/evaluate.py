#!/usr/bin/env python3
"""`hoyer-det evaluate`."""

from detection.cli.common import run_verb
from detection.cli.evaluate import main

if __name__ == "__main__":
    run_verb(main)
