#!/usr/bin/env python3
"""`hoyer-det check-data`."""

from detection.cli.check_data import main
from detection.cli.common import run_verb

if __name__ == "__main__":
    run_verb(main)
