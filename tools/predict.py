#!/usr/bin/env python3
"""`hoyer-det predict`."""

from detection.cli.common import run_verb
from detection.cli.predict import main

if __name__ == "__main__":
    run_verb(main)
