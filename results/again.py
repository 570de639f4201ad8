#!/usr/bin/env python3
"""Train rows of results/README.md again, by the recipes beside their logs, and compare the logs digit by digit.

    python results/again.py results/compare_cifar10/hoyer_seed0 --keep

A row that begins with the weights of another, or learns from it, has that one trained first, if it is not where the
recipe says. With --keep the weights of a run whose log is equal come into its folder, where `hoyer-det evaluate`
measures them. Logs of another processor, number of threads or version may differ in the last digits, and by a point in
the end. The status is 1 if one does.
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
from detection.config import Recipe, flatten, set_values
from detection.records import CLOCK
from detection.runs import Run

HERE = Path(__file__).resolve().parent
TINY, NETTE, VOC = "c6_tinyimagenet_resnet18", "c7_imagenette_resnet18", "c6_voc_retinanet_resnet18"
# Rows by the names that their folders had when they were trained; tiny_relu was another one on each of two machines.
STARTS = {
    "runs/bccd_relu": "c4_fast/bccd_relu",
    "runs/bccd_norm_relu": "c4_fast/bccd_norm_relu",
    "runs/res_relu": "c4_fast/resnet18_relu",
    "runs/c2_relu": "c4_fast/vgg11_relu",
    "runs/gpu/vgg16_hoyer": "c5_cifar10_vgg16/hoyer",
    "runs/gpu/vgg16_relu": "c5_cifar10_vgg16/relu",
    "runs/gpu/vgg16_teacher": "c5_cifar10_vgg16/relu",
    "runs/tiny_hoyer": f"{TINY}/hoyer",
    "runs/gpu/tiny_hoyer": f"{TINY}/hoyer",
    "runs/gpu/tiny_relu": f"{TINY}/relu",
    "runs/tiny_relu": f"{TINY}/relu_again",
    "runs/tiny_one": f"{TINY}/widened/continued",
    "runs/tiny_t3": f"{TINY}/widened/thresholds3",
    "runs/tiny_relu_more": f"{TINY}/widened/relu",
    "runs/imagenette_relu": f"{NETTE}/relu_again",
    "runs/imagenette_one": f"{NETTE}/widened/continued",
    "runs/imagenette_t3": f"{NETTE}/widened/thresholds3",
    "runs/voc_relu": f"{VOC}/relu",
    "runs/gpu/voc_relu": f"{VOC}/relu",
    "runs/gpu/voc_all": f"{VOC}/spiking",
    "runs/trials/res_real_relu_s0": "controlled_cifar10/res_real_relu_s0",
    "runs/trials/vgg_pooled_relu_s0": "controlled_cifar10/vgg_pooled_relu_s0",
}


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


def starts_of(config: Recipe) -> dict[str, tuple[str, str]]:
    """Return what a recipe begins with or learns from that is not here, by its key: the row of it, and the file."""
    found = {}
    for key in ("model.weights", "model.backbone.weights", "distillation.teacher"):
        path = Path(str(flatten(config).get(key)))
        folder = path.parent if path.suffix else path
        if folder.as_posix() in STARTS and not path.exists():
            found[key] = STARTS[folder.as_posix()], path.name if path.suffix else ""
    return found


def train_again(row: Path, out: Path) -> Path:
    """Train a row into a folder of `out`, before it the rows of which it has its weights or its teacher."""
    before = Run.open(row)
    inside = row.resolve().is_relative_to(HERE)
    folder = out / "_".join(row.resolve().relative_to(HERE).parts if inside else row.parts[-2:])
    begun = (folder / "config.yaml").is_file()
    starts = {} if begun else starts_of(before.config)
    values = {key: str(train_again(HERE / source, out) / file) for key, (source, file) in starts.items()}
    if (machine := before.info().machine) is not None:
        torch.set_num_threads(machine.threads or 1)  # which those before it may have set otherwise
    if not begun:
        detection.train(set_values(before.config, values), folder)
    elif not Run.open(folder).finished:
        detection.train(resume=folder)
    return folder


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train the rows of a command line again, and say whether their logs are equal."""
    parser = Parser(__doc__, prog)
    parser.add_argument("rows", nargs="+", type=Path, metavar="ROW", help="folder under results/ that has a log")
    parser.add_argument("--out", type=Path, default=Path("runs/again"), help="for the new runs (default: runs/again)")
    parser.add_argument("--keep", action="store_true", help="put the weights of an equal run into the row's folder")
    options, different = parser.parse_args(arguments), False
    for row in options.rows:
        out = train_again(row, options.out)
        found = sorted(differences(lines(row), lines(out)))
        told = f"{found[0]} and {len(found) - 1} more differ" if found else "equal in every digit"
        print(f"{row}: {told}", flush=True)
        different |= bool(found)
        if options.keep and not found:
            shutil.copy(out / "last.safetensors", row)
    sys.exit(int(different))


if __name__ == "__main__":
    run_verb(main)
