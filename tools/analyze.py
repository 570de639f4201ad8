#!/usr/bin/env python3
"""`hoyer-det analyze`."""

from detection.cli.analyze import main
from detection.cli.common import run_verb

if __name__ == "__main__":
    run_verb(main)
