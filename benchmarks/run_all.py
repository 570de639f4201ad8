#!/usr/bin/env python3
"""Logs and pictures of speed and memory in results/benchmarks: one benchmark after the other, each with its defaults.

On two CPU cores with nothing else running:

    python benchmarks/run_all.py
    python benchmarks/run_all.py training scaling
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("spike_layer", "predict", "inference", "scaling", "training")  # the longest last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    options = parser.parse_args()
    for name in options.names:
        if name not in NAMES:
            parser.error(f"no benchmark {name!r} (allowed: {', '.join(NAMES)})")
    failed = []
    for name in options.names or NAMES:
        started = time.monotonic()
        command = [sys.executable, f"benchmarks/{name}.py"]
        status = subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode
        if status:
            failed.append(f"{name} (status {status})")
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
