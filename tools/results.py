#!/usr/bin/env python3
"""Writes results/README.md, the table of all runs under results/, from their logs."""

from __future__ import annotations

import argparse
from pathlib import Path

from detection.checkpoint import Run
from detection.cli import run_tool

HEADER = """# Real runs

Made from the logs by `python tools/results.py`. AP and AP50 are those of the last epoch's weights, not of the best
epoch; activity is the share of spiking neurons that fire per image on the evaluation images.

| run | network | activation | epochs | AP | AP50 | spike activity | minutes | machine | SHA-256 of the weights |
|---|---|---|---|---|---|---|---|---|---|
"""


def table_row(folder: Path) -> str:
    """One run as a row of the table."""
    run = Run.open(folder)
    history, info, model = run.history(), run.info(), run.config.model
    last = history[-1]
    minutes = sum(line["seconds"] + line.get("eval_seconds", 0.0) for line in history) / 60
    machine = info["machine"]["gpu"] or f"{info['machine']['cores']} CPU cores"
    cells = [
        f"[{folder.name}]({folder.name}/)",
        f"{model.detector}, {model.backbone.name} x{model.backbone.width:g}",
        model.backbone.activation,
        str(last["epoch"]),
        f"{last['AP']:.4f}",
        f"{last['AP50']:.4f}",
        f"{last['activity']:.4f}" if "activity" in last else "none",
        f"{minutes:.0f}",
        machine,
        f"`{info['sha256']['last.safetensors'][:16]}`",
    ]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="folder of run folders")
    options = parser.parse_args()
    folders = sorted(path.parent for path in options.folder.glob("*/config.yaml"))
    if not folders:
        raise FileNotFoundError(f"{options.folder}: no run folder in it")
    rows = [table_row(folder) for folder in folders]
    (options.folder / "README.md").write_text(HEADER + "".join(rows), encoding="utf-8")
    print(f"{options.folder / 'README.md'}: {len(rows)} runs")


if __name__ == "__main__":
    run_tool(main)
