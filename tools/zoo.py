#!/usr/bin/env python3
"""Lists the networks of the zoo, or adds a trained run to it: as "zoo:NAME" it then comes with the package.

`add` stores the weights of convolutions and linear layers in 16 bits and everything else as it is, evaluates what it
has stored, and logs these numbers. The entry is there whole or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from backbones import tensors_to_bytes, zoo
from detection.checkpoint import Run, Weights, describe_environment
from detection.classification import evaluate_classification_run
from detection.cli import add_saved_run_options, run_tool, table_console
from detection.config import Config, Recipe, save_config
from detection.engine import spike_layers
from detection.files import require_writable, write_whole
from detection.models import load_model
from detection.predict import read_category_ids
from detection.tasks import evaluate_run, logged_line

MAX_BYTES = 10_000_000  # an entry lies in the repository and in every installation
LEFT_OUT = ("ema", "seconds", "images_per_second", "eval_seconds")  # of one epoch, they would pass for the training's
SHOWN = {"detection": ("AP", "AP50"), "classification": ("top1", "top5")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", metavar="{list,add}")
    actions.add_parser("list", help="a table of all entries (also without any argument)")
    adding = actions.add_parser("add", help="makes an entry of a run")
    adding.add_argument("run", help="folder of a finished run")
    adding.add_argument("name", help="of the new entry: a to z, 0 to 9 and _")
    add_saved_run_options(adding)
    adding.add_argument(
        "--trained-in",
        type=Path,
        metavar="FOLDER",
        help="folder of the repository that keeps the training's log; its run.json must have these weights' SHA-256",
    )
    options = parser.parse_args()
    if options.action == "add":
        add(options.run, options.name, options.weights, options.data_root, options.trained_in)
    else:
        table_console().print(table())


def table() -> Table:
    """A row per entry."""
    columns = ("name", "task", "network", "data", "metric", "activity", "MB", "SHA-256")
    listed = Table(*columns, title="zoo")
    for name in zoo.names():
        run = Run.open(f"{zoo.PREFIX}{name}")
        (line,), model = run.history(), run.config.model
        network = f"{model.backbone.name} x{model.backbone.width:g}"
        network = f"{model.detector}, {network}" if isinstance(run.config, Config) else network
        metrics = ", ".join(f"{key} {line[key]:.4f}" for key in SHOWN[run.config.task])
        activity = f"{line['activity']:.4f}" if "activity" in line else "none"
        size = (run.folder / "last.safetensors").stat().st_size / 1e6
        digest = run.info()["sha256"]["last.safetensors"][:16]
        listed.add_row(
            name, run.config.task, network, run.config.data.root.name, metrics, activity, f"{size:.1f}", digest
        )
    return listed


def add(folder: str, name: str, which: Weights, data_root: Path | None = None, trained_in: Path | None = None) -> None:
    """Makes the entry NAME of a run and says what the shorter weights have changed.

    Raises:
        FileExistsError: the name is taken.
        FileNotFoundError: no such run, weights, log or data.
        ValueError: the name is not allowed, the run is not finished, its weights are not those that it or `trained_in`
            says, or do not fit into `MAX_BYTES` or 16 bits.
    """
    if not zoo.NAME.fullmatch(name):
        raise ValueError(f"name {name!r}: not allowed for an entry of the zoo (allowed: a to z, 0 to 9 and _)")
    entry, part = zoo.FOLDER / name, zoo.FOLDER / f".{name}.part"
    if entry.exists():
        raise FileExistsError(f"{zoo.PREFIX}{name} exists already; choose another name, or remove {entry} first")
    require_writable(zoo.FOLDER)
    run = Run.open(folder, data_root)
    origin = read_origin(run, which, trained_in)
    task = run.config.task
    before = logged_line(run, which, "AP" if task == "detection" else "top1")
    model = load_model(run, which)
    content = tensors_to_bytes(shorten(model))
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"{folder}: its weights take {len(content) / 1e6:.1f} MB in the zoo (allowed: {MAX_BYTES / 1e6:g} MB)"
        )
    info = origin | describe_environment()
    info["backbone"] = run.config.model.backbone.model_dump(exclude={"weights"})
    if task == "detection":
        info["category_ids"] = list(read_category_ids(run)[0])
    info["sha256"] = {"last.safetensors": hashlib.sha256(content).hexdigest()}
    # What the training says of that epoch, but its times; its evaluation is replaced below by that of what is stored.
    line = {key: value for key, value in before.items() if key not in LEFT_OUT} | thresholds_of(model)
    shutil.rmtree(part, ignore_errors=True)  # of a call that was killed
    try:
        part.mkdir()
        save_config(without_places(Run.open(folder).config), part / "config.yaml")
        (part / "last.safetensors").write_bytes(content)
        stored = Run(part, run.config)
        stored.write_info(info)
        stored.log(line)
        evaluate = evaluate_run if task == "detection" else evaluate_classification_run
        metrics, _ = evaluate(part, data_root=run.config.data.root)
        write_whole(part / "metrics.jsonl", (json.dumps(line | metrics) + "\n").encode())
        os.replace(part, entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    changes = Table("metric", "trained", "stored", "change", title=f"{zoo.PREFIX}{name}")
    for key in (*SHOWN[task], "activity"):
        if key in metrics and key in before:  # older logs have no activity
            changes.add_row(key, f"{before[key]:.4f}", f"{metrics[key]:.4f}", f"{metrics[key] - before[key]:+.4f}")
    table_console().print(changes)
    print(f"{zoo.PREFIX}{name}: {len(content) / 1e6:.1f} MB, {entry}")


def read_origin(run: Run, which: Weights, trained_in: Path | None) -> dict[str, Any]:
    """For run.json: how the weights were trained, and the checksum that they had then.

    Raises:
        FileNotFoundError: no such weights, or no run.json.
        ValueError: the weights are not those of a finished training, or `trained_in` is not relative.
    """
    if trained_in is not None and trained_in.is_absolute():
        raise ValueError(
            f"--trained-in {trained_in}: expected a folder relative to the repository, such as results/NAME"
        )
    file = f"{which}.safetensors"
    here = run.checksums()
    if file not in here:
        raise FileNotFoundError(f"{run.folder / file}: no such weights file")
    sources = [run] if trained_in is None else [run, Run.open(trained_in)]
    for source in sources:
        logged = source.info().get("sha256", {}).get(file)
        if logged is None:
            raise ValueError(f"{source.folder / 'run.json'}: no SHA-256 of {file}; the training has to be finished")
        if logged != here[file]:
            raise ValueError(
                f"{run.folder / file}: its SHA-256 is {here[file][:16]}..., {source.folder / 'run.json'} has "
                f"{logged[:16]}...; these are not the weights of that training"
            )
    info = sources[-1].info()
    origin = {key: info[key] for key in ("command", "resumed") if key in info}
    if trained_in is not None:
        origin["trained_in"] = trained_in.as_posix()
    return origin | {"trained_weights": file, "trained_sha256": here[file]}


def shorten(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model`, weights of convolutions and linear layers in float16.

    Thresholds, extremum and BatchNorm stay as they are: a threshold that moves flips spikes.

    Raises:
        ValueError: a weight is too large for 16 bits.
    """
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            half = module.weight.detach().half()
            if not half.isfinite().all():
                raise ValueError(f"{name}.weight: up to {module.weight.abs().max():g}, too large for 16 bits (65504)")
            state[f"{name}.weight"] = half
    return state


def thresholds_of(model: nn.Module) -> dict[str, dict[str, float]]:
    """v_th and extremum of each spike layer, as a training logs them; nothing for a network without."""
    layers = spike_layers(model)
    if not layers:
        return {}
    with torch.no_grad():
        return {
            "v_th": {name: abs(layer.v_th.item()) for name, layer in layers.items()},
            "extremum": {name: layer.extremum.mean().item() for name, layer in layers.items()},
        }


def without_places(config: Recipe) -> Recipe:
    """The recipe without the folders of one machine: data/NAME instead of /where/the/data/lie/NAME, runs/NAME."""
    config = config.model_copy(deep=True)
    if config.data.root.is_absolute():
        config.data.root = Path("data") / config.data.root.name
    if config.model.backbone.weights and Path(config.model.backbone.weights).is_absolute():
        config.model.backbone.weights = str(Path("runs") / Path(config.model.backbone.weights).name)
    if config.distillation.teacher and config.distillation.teacher.is_absolute():
        config.distillation.teacher = Path("runs") / config.distillation.teacher.name
    return config


if __name__ == "__main__":
    run_tool(main)
