#!/usr/bin/env python3
"""`hoyer-det export`."""

from detection.cli.common import run_verb
from detection.cli.export import main

if __name__ == "__main__":
    run_verb(main)
