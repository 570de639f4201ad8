#!/usr/bin/env python3
"""`hoyer-det train`."""

from detection.cli.common import run_verb
from detection.cli.train import main

if __name__ == "__main__":
    run_verb(main)
