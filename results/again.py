#!/usr/bin/env python3
"""Train rows of results/README.md again, by the recipes beside their logs, and compare the logs digit by digit.

    python results/again.py results/compare_cifar10/hoyer_seed0 --keep

With --keep the weights of a run whose log is equal come into its folder, where `hoyer-det evaluate` measures them. Logs
of another processor, number of threads or version may differ in the last digits, and by a point in the end. The
status is 1 if one does.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import detection
from detection.cli.common import Parser, run_verb
from detection.records import CLOCK
from detection.runs import Run


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log without its clock."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    found = map(json.loads, filter(None, text.splitlines()))
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in found]


def differences(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[str]:
    """Return epoch and key of every number of a log that another has otherwise; what one alone has is left out."""
    found = [] if len(before) == len(now) else [f"{len(before)} epochs before, {len(now)} now"]
    for old, new in zip(before, now, strict=False):
        found += [f"epoch {old['epoch']}: {key}" for key in old.keys() & new.keys() if old[key] != new[key]]
    return found


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train the rows of a command line again, and say whether their logs are equal."""
    parser = Parser(__doc__, prog)
    parser.add_argument("rows", nargs="+", type=Path, metavar="ROW", help="folder under results/ that has a log")
    parser.add_argument("--out", type=Path, default=Path("runs/again"), help="for the new runs (default: runs/again)")
    parser.add_argument("--keep", action="store_true", help="put the weights of an equal run into the row's folder")
    options, different = parser.parse_args(arguments), False
    for row in options.rows:
        before, out = Run.open(row), options.out / "_".join(row.parts[-2:])
        if (machine := before.info().machine) is not None:
            torch.set_num_threads(machine.threads or 1)
        if not (out / "config.yaml").is_file():
            detection.train(before.config, out)
        elif not Run.open(out).finished:
            detection.train(resume=out)
        found = sorted(differences(lines(row), lines(out)))
        told = f"{found[0]} and {len(found) - 1} more differ" if found else "equal in every digit"
        print(f"{row}: {told}", flush=True)
        different |= bool(found)
        if options.keep and not found:
            shutil.copy(out / "last.safetensors", row)
    sys.exit(int(different))


if __name__ == "__main__":
    run_verb(main)
