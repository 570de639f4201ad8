#!/usr/bin/env python3
"""Writes results/README.md, the tables of all runs under results/, from their logs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detection.checkpoint import Run
from detection.cli import run_tool

HEADER = """# Real runs

Made from the logs by `python tools/results.py`. Metrics are those of the last epoch's weights, not of the best epoch;
activity is the share of spiking neurons that fire per image on the evaluation images. Where several runs of one recipe
stand in a folder, its README compares them.
"""
COLUMNS = {
    "detection": ("AP", "AP50"),
    "classification": ("top1", "top5"),
}


def table_row(root: Path, run: Run) -> str:
    """One run as a row of its table."""
    history, info, model = run.history(), run.info(), run.config.model
    last = history[-1]
    minutes = sum(line["seconds"] + line.get("eval_seconds", 0.0) for line in history) / 60
    machine = info["machine"]["gpu"] or f"{info['machine']['threads']} of {info['machine']['cores']} CPU cores"
    name = run.folder.relative_to(root).as_posix()
    network = f"{model.backbone.name} x{model.backbone.width:g}"
    cells = [
        f"[{name}]({name}/)",
        f"{model.detector}, {network}" if run.config.task == "detection" else network,
        model.backbone.activation,
        str(last["epoch"]),
        *(f"{last[key]:.4f}" for key in COLUMNS[run.config.task]),
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
    runs = []
    for path in sorted(options.folder.rglob("config.yaml")):
        run = Run.open(path.parent)
        if "sha256" in run.info():
            runs.append(run)
        else:
            print(f"{run.folder}: not finished, left out", file=sys.stderr)
    if not runs:
        raise FileNotFoundError(f"{options.folder}: no finished run in it")
    text = HEADER
    for task, metrics in COLUMNS.items():
        rows = [table_row(options.folder, run) for run in runs if run.config.task == task]
        if rows:
            columns = ["run", "network", "activation", "epochs", *metrics, "spike activity", "minutes", "machine"]
            columns += ["SHA-256 of the weights"]
            text += f"\n## {task.capitalize()}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n" + "".join(rows)
    (options.folder / "README.md").write_text(text, encoding="utf-8")
    print(f"{options.folder / 'README.md'}: {len(runs)} runs")


if __name__ == "__main__":
    run_tool(main)
