#!/usr/bin/env python3
"""`hoyer-det compare`."""

from detection.cli.common import run_verb
from detection.cli.compare import main

if __name__ == "__main__":
    run_verb(main)
