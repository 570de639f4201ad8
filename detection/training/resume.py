"""Saving a training into its checkpoint, and going on from one."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from detection.config import flatten, require_same
from detection.training import checkpoint
from detection.training.checkpoint import Checkpoint, ProcessState, set_random_states

if TYPE_CHECKING:
    from detection.training.trainer import Trainer


def save(trainer: Trainer, randoms: dict[str, Any]) -> None:
    """Write the state of all processes; all of them call it, with their `random_states`."""
    progress = dataclasses.asdict(trainer.progress)
    own = ProcessState(randoms, progress.pop("sums"), progress.pop("num_images"))
    processes = gather_object([vars(own)])
    if trainer.is_main:
        scaler = trainer.accelerator.scaler
        Checkpoint(
            recipe=flatten(trainer.config),
            progress=progress,
            processes=processes,
            network=trainer.network.state_dict(),
            average=trainer.average and trainer.average.state_dict(),
            optimizer=trainer.optimizer.state_dict(),
            schedule=trainer.schedule.state_dict(),
            scaler=scaler and scaler.state_dict(),
        ).save(trainer.run.folder)


def resume(trainer: Trainer) -> None:
    """Take over the run's checkpoint, or start from the beginning if it has none.

    Raises:
        ValueError: it belongs to another network, recipe or number of processes, or it is missing where there
            should be one.
    """
    state = Checkpoint.load(trainer.run.folder)
    if state is None:
        _require_beginning(trainer)
        return
    path = trainer.run.folder / checkpoint.FILE
    require_same(state.recipe, trainer.config, str(path))
    if len(state.processes) != trainer.accelerator.num_processes:
        raise ValueError(
            f"{path}: saved by {len(state.processes)} processes, started with {trainer.accelerator.num_processes}; an "
            "exact continuation needs as many"
        )
    _load_networks(trainer, state)
    trainer.schedule.load_state_dict(state.schedule)
    if trainer.accelerator.scaler:
        trainer.accelerator.scaler.load_state_dict(state.scaler)
    own = ProcessState(**state.processes[trainer.accelerator.process_index])
    sums = {name: value.to(trainer.accelerator.device) for name, value in own.sums.items()}
    trainer.progress = checkpoint.Progress(**state.progress, sums=sums, num_images=own.num_images)
    set_random_states(own.random)


def _load_networks(trainer: Trainer, state: Checkpoint) -> None:
    """Take over weights, their average, and what the optimiser knows of them."""
    try:
        trainer.network.load_state_dict(state.network)
        if trainer.average:
            trainer.average.load_state_dict(state.average)
        trainer.optimizer.load_state_dict(state.optimizer)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        path, recipe = trainer.run.folder / checkpoint.FILE, trainer.run.folder / "config.yaml"
        raise ValueError(f"{path} does not fit the network of {recipe}: {' '.join(str(error).split())}") from None
    # As when they were made: in the memory order of their weights, or else sums would round otherwise.
    for parameter, values in trainer.optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)


def _require_beginning(trainer: Trainer) -> None:
    """Say that a run without a checkpoint starts anew.

    Raises:
        ValueError: its log has more than the epoch that this may cost.
    """
    folder = trainer.run.folder
    number = len(trainer.run.history()) if (folder / "metrics.jsonl").is_file() else 0
    if number > 1:
        raise ValueError(
            f"{folder}: {number} epochs in its log but no {checkpoint.FILE} to go on from: it has finished, or "
            "lost its state; name another folder for a new run"
        )
    print(f"{folder}: no state saved yet, starts from its beginning", file=sys.stderr)
