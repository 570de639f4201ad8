#!/usr/bin/env python3
"""Trains variants of a recipe with several seeds, and compares them in a table and a plot.

Each run goes to OUT/VARIANT_seedN. Finished runs are left as they are and an unfinished one goes on from its last saved
state, so an interrupted comparison goes on where it stopped, and more seeds can be added later. OUT/README.md and
OUT/ablation.png are made from the logs.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from detection.checkpoint import Run
from detection.cli import run_tool
from detection.config import FREE_KEYS, flatten, override, read_recipe, require_same
from detection.plots import plot_comparison

VARIANTS = {
    "hoyer": [],
    "relu": ["--model.backbone.activation", "relu"],
    "fixed": ["--model.backbone.activation", "fixed"],
    "no_regulariser": ["--hoyer.weight", "0"],
    "layer_extremum": ["--model.backbone.extremum", "layer"],
    "channel_extremum": ["--model.backbone.extremum", "channel"],
    "norm_before_pool": ["--model.backbone.pool_first", "False"],
}
METRICS = {"classification": "top1", "detection": "AP50"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="recipe, a YAML file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, the table and the plot")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of every variant (default: 0)")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["hoyer", "relu", "fixed", "no_regulariser"],
        metavar="NAME",
        help=f"of {', '.join(VARIANTS)}, or NAME='OVERRIDES'; the first is what the others are compared with",
    )
    parser.epilog = (
        "Further arguments are overrides of the recipe, for all variants, whose own overrides come after them."
    )
    options, common = parser.parse_known_args()
    parsed = [parse_variant(text) for text in options.variants]
    variants = dict(parsed)
    if len(variants) < len(parsed):
        raise ValueError(f"--variants {' '.join(options.variants)}: a name stands there twice")
    recipe = read_recipe(options.config)
    tool = "train_cls.py" if recipe.task == "classification" else "train_det.py"
    for name, overrides in variants.items():  # all of them, before hours are spent on some
        override(recipe, [*common, *overrides], prog=f"{parser.prog}, {name}")
    for seed in options.seeds:
        for name, overrides in variants.items():
            train(tool, options.config, options.out / f"{name}_seed{seed}", [*common, *overrides], seed)
    compare(options.out, variants)


def parse_variant(text: str) -> tuple[str, list[str]]:
    """A variant's name and its overrides.

    Raises:
        ValueError: neither a known name nor NAME=OVERRIDES.
    """
    name, equals, overrides = text.partition("=")
    if not equals and name not in VARIANTS:
        raise ValueError(f"--variants {name}: unknown (allowed: {', '.join(VARIANTS)}, or NAME='OVERRIDES')")
    if not re.fullmatch(r"[A-Za-z0-9-]+(_[A-Za-z0-9-]+)*", name) or "_seed" in name:
        raise ValueError(
            f"--variants {text}: the name becomes part of a folder's (allowed: letters, digits, '-' and '_', not _seed)"
        )
    return name, shlex.split(overrides) if equals else VARIANTS[name]


def train(tool: str, config: str, folder: Path, overrides: list[str], seed: int) -> None:
    """One run in a process of its own, unless it is finished already.

    Raises:
        ChildProcessError: it failed; its own message stands above.
    """
    command = [sys.executable, str(Path(__file__).with_name(tool))]
    if (folder / "config.yaml").is_file():
        run = Run.open(folder)
        wanted = override(read_recipe(config), [*overrides, "--train.seed", str(seed)])
        # Classes are filled in from the data.
        require_same(flatten(run.config), wanted, str(folder), free=FREE_KEYS | {"data.classes"})
        if run.finished:
            print(f"{folder}: finished already")
            return
        command += ["--resume", str(folder), "--data.root", str(wanted.data.root)]
    else:
        command += [config, *overrides, "--train.seed", str(seed), "--out", str(folder)]
    print(f"{folder}: {shlex.join(command[1:])}", flush=True)
    if subprocess.run(command).returncode:
        raise ChildProcessError(f"{folder}: this run failed, see above; the finished ones are kept")


def compare(out: Path, variants: dict[str, list[str]]) -> None:
    """Writes the table and the plot of all finished runs of the variants in `out`."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for name in variants:
        folders = [folder for folder in out.glob(f"{name}_seed*/") if folder.name.rpartition("_seed")[2].isdecimal()]
        runs = [Run.open(folder) for folder in sorted(folders, key=lambda folder: int(folder.name.split("_seed")[1]))]
        lines[name] = [run.history()[-1] for run in runs if "sha256" in run.info()]
        metric = METRICS[runs[0].config.task]
    values = {name: [line[metric] for line in found] for name, found in lines.items()}
    first = next(iter(values))
    rows = [
        f"# Variants of one recipe\n\nMade from the logs by `{shlex.join(['python', *sys.argv])}`: {metric} and spike "
        "activity of the last epoch, mean and standard deviation over the seeds.\n",
        f"| variant | override | seeds | {metric} | minus {first} | spike activity |\n|---|---|---|---|---|---|",
    ]
    for name, found in values.items():
        activity = [line["activity"] for line in lines[name] if "activity" in line]
        override = f"`{shlex.join(variants[name])}`" if variants[name] else "none"
        gap = "" if name == first else f"{statistics.mean(found) - statistics.mean(values[first]):+.4f}"
        spikes = spread(activity) if activity else "none"
        rows.append(f"| {name} | {override} | {len(found)} | {spread(found)} | {gap} | {spikes} |")
    rows.append("\n![Variants](ablation.png)\n")
    (out / "README.md").write_text("\n".join(rows), encoding="utf-8")
    plot_comparison(values, f"{metric}, in [0, 1]", out / "ablation.png")
    print(f"{out / 'README.md'}, {out / 'ablation.png'}")


def spread(values: list[float]) -> str:
    """The mean, and the standard deviation where there are several."""
    text = f"{statistics.mean(values):.4f}"
    return f"{text} ± {statistics.stdev(values):.4f}" if len(values) > 1 else text


if __name__ == "__main__":
    run_tool(main)
