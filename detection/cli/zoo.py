"""List the networks of the zoo, or add a trained run to it: as "zoo:NAME" it then comes with the package.

`add` stores the weights of convolutions and linear layers in 16 bits, or 8, and everything else as it is, evaluates
what it has stored, and logs these numbers. The entry is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detection.cli.common import Parser, add_saved_run_options, check_run, show_table
from detection.config import Recipe, save_config
from detection.files import require_writable
from detection.records import CLOCK, EpochLog, RunInfo, Weights
from detection.text import say

if TYPE_CHECKING:
    from torch import Tensor, nn

    from detection.runs import Run

MAX_BYTES = 26_000_000  # an entry lies in the repository and in every installation


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """List the zoo or add an entry, as a command line says."""
    parser = Parser(__doc__, prog)
    actions = parser.add_subparsers(dest="action", metavar="{list,add}")
    actions.add_parser("list", help="a table of all entries (also without any argument)")
    adding = actions.add_parser("add", help="makes an entry of a run")
    adding.add_argument("run", help="folder of a finished run")
    adding.add_argument("name", help="of the new entry: a to z, 0 to 9 and _")
    add_saved_run_options(adding)
    help = "folder of the repository that keeps the training's log; its run.json must have these weights' SHA-256"
    adding.add_argument("--trained-in", type=Path, metavar="FOLDER", help=help)
    help = "put its file for the event-driven engine beside it, measured: zoo:NAME/model.events"
    adding.add_argument("--events", action="store_true", help=help)
    help = "of a weight as it is stored: float16, or int8 with a step for each output channel (default: 16)"
    adding.add_argument("--bits", type=int, choices=[8, 16], default=16, help=help)
    options = parser.parse_args(arguments)
    if options.action == "add":
        chosen = options.weights, options.data_root, options.trained_in, options.events, options.bits
        add(options.run, options.name, *chosen)
        return

    from backbones import zoo

    columns = ("name", "task", "network", "data", "metric", "activity", "MB", "SHA-256")
    show_table("zoo", columns, map(row_of, zoo.names()))


def row_of(name: str) -> Sequence[str]:
    """Return the row of an entry."""
    from backbones import zoo
    from detection.runs import Run
    from detection.tasks import task_of

    run = Run.open(f"{zoo.PREFIX}{name}")
    (line,), model, task = run.history(), run.config.model, task_of(run.config)
    network = f"{model.backbone.name} x{model.backbone.width:g}"
    detector = getattr(model, "detector", None)
    metrics = ", ".join(f"{key} {line.metrics[key]:.4f}" for key in task.shown)
    activity = f"{line.metrics['activity']:.4f}" if "activity" in line.metrics else "none"
    size = (run.folder / "last.safetensors").stat().st_size / 1e6
    digest = run.info().sha256["last.safetensors"][:16]
    network = f"{detector}, {network}" if detector else network
    return name, task.name, network, run.config.data.root.name, metrics, activity, f"{size:.1f}", digest


def add(
    folder: str,
    name: str,
    weights: Weights,
    data_root: Path | None = None,
    trained_in: Path | None = None,
    events: bool = False,
    bits: int = 16,
) -> None:
    """Make the entry NAME of a run and say what the shorter weights have changed.

    With `events` its file for the event-driven engine, too, made of the shorter weights and measured.

    Raises:
        FileExistsError: the name is taken.
        FileNotFoundError: no such run, weights, log or data.
        ValueError: the name is not allowed, the run is not finished, its weights are not those that it or `trained_in`
            says, or do not fit into `MAX_BYTES` or 16 bits.
    """
    from backbones import logged_state, tensors_to_bytes, zoo
    from detection.runs import Run, describe_environment
    from detection.tasks import task_of
    from detection.tasks.run import load_model, read_evaluation_data

    if not zoo.NAME.fullmatch(name):
        raise ValueError(f"name {name!r}: not allowed for an entry of the zoo (allowed: a to z, 0 to 9 and _)")
    entry = zoo.FOLDER / name
    if entry.exists():
        raise FileExistsError(f"{zoo.PREFIX}{name} exists already; choose another name, or remove {entry} first")
    require_writable(zoo.FOLDER)
    check_run(folder)
    run = Run.open(folder, data_root)
    origin = read_origin(run, weights, trained_in)
    task = task_of(run.config)
    before = run.logged(weights, task.best_by)
    model = load_model(run, weights)
    content = tensors_to_bytes(shorten(model, bits))
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"{folder}: its weights take {len(content) / 1e6:.1f} MB in the zoo (allowed: {MAX_BYTES / 1e6:g} MB)"
        )
    here = describe_environment([])
    facts = {"versions": here.versions, "machine": here.machine} | {
        "sha256": {"last.safetensors": hashlib.sha256(content).hexdigest()},
        **task.facts(read_evaluation_data(run)),
    }
    # One epoch's times would pass for those of the training.
    left_out = dict.fromkeys(("ema", *CLOCK))
    line = before.model_copy(update=left_out | {"layers": before.layers | logged_state(model)})
    line = store(entry, run, content, origin.model_copy(update=facts), line)
    old, new = before.metrics, line.metrics
    keys = [key for key in (*task.shown, "activity") if key in new and key in old]  # older logs have no activity
    rows = [(key, f"{old[key]:.4f}", f"{new[key]:.4f}", f"{new[key] - old[key]:+.4f}") for key in keys]
    show_table(f"{zoo.PREFIX}{name}", ("metric", "trained", "stored", "change"), rows)
    say(f"{zoo.PREFIX}{name}: {len(content) / 1e6:.1f} MB, {entry}")
    if events:
        store_events(entry, run.config.data.root)


def store_events(entry: Path, data_root: Path) -> None:
    """Add the file for the event-driven engine to an entry; if that fails, the entry goes."""
    from detection.exporters import export_run

    try:
        path, description = export_run(entry, "events", entry / "model.events", data_root=data_root, evaluate=True)
    except BaseException:
        shutil.rmtree(entry)
        raise
    found = description["evaluation"]
    rows = [
        (key, f"{found['run'][key]:.4f}", f"{value:.4f}") for key, value in found["file"].items() if key in found["run"]
    ]
    show_table(path.name, ("metric", "run", "file"), rows)


def store(entry: Path, run: Run, content: bytes, info: RunInfo, line: EpochLog) -> EpochLog:
    """Write the files of an entry, evaluate what is stored, and return the line with that evaluation."""
    from detection.runs import Run
    from detection.tasks.evaluate import evaluate_run

    part = entry.with_name(f".{entry.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a call that was killed
    try:
        part.mkdir()
        save_config(without_places(Run.open(run.folder).config), part / "config.yaml")
        (part / "last.safetensors").write_bytes(content)
        stored = Run(part, run.config)
        stored.write_info(info)
        stored.log(line)
        evaluation, _ = evaluate_run(part, data_root=run.config.data.root)
        stored.forget_after(0)
        line = line.model_copy(update={"evaluation": evaluation})
        stored.log(line)
        os.replace(part, entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return line


def read_origin(run: Run, weights: Weights, trained_in: Path | None) -> RunInfo:
    """Return how the weights were trained and the checksum that they had then, for run.json.

    Raises:
        FileNotFoundError: no such weights, or no run.json.
        ValueError: the weights are not those of a finished training, or `trained_in` is not relative.
    """
    from detection.runs import Run

    if trained_in is not None and trained_in.is_absolute():
        raise ValueError(
            f"--trained-in {trained_in}: expected a folder relative to the repository, such as results/NAME"
        )
    file = f"{weights}.safetensors"
    here = run.checksums()
    if file not in here:
        raise FileNotFoundError(f"{run.folder / file}: no such weights file")
    sources = [run] if trained_in is None else [run, Run.open(trained_in)]
    for source in sources:
        logged = source.info().sha256.get(file)
        if logged is None:
            raise ValueError(f"{source.folder / 'run.json'}: no SHA-256 of {file}; the training has to be finished")
        if logged != here[file]:
            raise ValueError(
                f"{run.folder / file}: its SHA-256 is {here[file][:16]}..., {source.folder / 'run.json'} has "
                f"{logged[:16]}...; these are not the weights of that training"
            )
    info = sources[-1].info()
    return RunInfo(
        command=info.command,
        resumed=info.resumed,
        trained_in=None if trained_in is None else trained_in.as_posix(),
        trained_weights=file,
        trained_sha256=here[file],
    )


def shorten(model: nn.Module, bits: int = 16) -> dict[str, Tensor]:
    """Return the state of `model`, weights of convolutions and linear layers in float16, or in int8 with their steps.

    Thresholds, extremum and BatchNorm stay as they are: a threshold that moves flips spikes.

    Raises:
        ValueError: a weight is too large for 16 bits.
    """
    import torch
    from torch import nn

    from backbones.weights import STEP

    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        weight, key = module.weight.detach(), f"{name}.weight"
        if bits == 8:
            dims = tuple(range(1, weight.dim()))
            state[key + STEP] = step = weight.abs().amax(dims, keepdim=True).clamp_min(1e-30) / 127
            state[key] = (weight / step).round().to(torch.int8)
        else:
            state[key] = weight.half()
            if not state[key].isfinite().all():
                raise ValueError(f"{key}: up to {weight.abs().max():g}, too large for 16 bits (65504)")
    return state


def without_places(config: Recipe) -> Recipe:
    """Return the recipe with data/NAME and runs/NAME in the place of absolute paths, which are one machine's."""
    config = config.model_copy(deep=True)
    distillation = config.distillation
    if config.data.root.is_absolute():
        config.data.root = Path("data") / config.data.root.name
    for section in (config.model, config.model.backbone):
        weights = getattr(section, "weights", None)
        if weights and Path(weights).is_absolute():
            section.weights = str(Path("runs") / Path(weights).name)
    if distillation.teacher and distillation.teacher.is_absolute():
        distillation.teacher = Path("runs") / distillation.teacher.name
    return config
