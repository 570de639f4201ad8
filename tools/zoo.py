#!/usr/bin/env python3
"""`hoyer-det zoo`."""

from detection.cli.common import run_verb
from detection.cli.zoo import main

if __name__ == "__main__":
    run_verb(main)
