"""The checkpoint: everything that changes while a network is trained, in one file; saving into it and going on."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from backbones import read_tensors, tensors_to_bytes
from detection.config import flatten, require_same
from detection.files import write_whole
from detection.text import say

if TYPE_CHECKING:
    from detection.training.trainer import Trainer

FILE = "state.safetensors"
VERSION = 2  # of the checkpoint's keys; 1, without a version in it, was that of 0.1
CHECKED = ConfigDict(arbitrary_types_allowed=True)  # types are checked where one of these is made, as from a file
# What torch raises for a state that is not its own.
MISFITS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError)


@dataclass(config=CHECKED)
class Progress:
    """The place that a training has come to.

    Attributes:
        epoch: the one under way, from 1; one more than there are when all are done.
        step: optimiser steps of it that are done.
        lr: learning rate at its beginning.
        best: highest value so far of the metric that decides about the "best" weights.
        waited: evaluations since that value.
        evaluated: whether there has been an evaluation.
        seconds: spent on the steps of this epoch.
        num_images: this process's images of these steps.
        left_out: those of the steps that had no batch to learn from.
        sums: of each loss and, under "layers", of each spike layer's H, over these steps of this process.
        shares: `backbones.record_gradient_shares` of the epoch's last step.
    """

    epoch: int = Field(1, ge=1)
    step: int = Field(0, ge=0)
    lr: float = 0.0
    best: float = float("-inf")
    waited: int = Field(0, ge=0)
    evaluated: bool = False
    seconds: float = 0.0
    num_images: int = 0
    left_out: int = Field(0, ge=0)
    sums: dict[str, Tensor] = Field(default_factory=dict)
    shares: dict[str, dict[str, float]] = Field(default_factory=dict)

    def count(self, name: str, value: Tensor) -> None:
        """Add a value of this step to a sum."""
        self.sums[name] = self.sums.get(name, 0) + value.detach()

    def next_epoch(self) -> None:
        """Go on to the beginning of the next epoch."""
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.num_images, self.left_out, self.sums, self.shares = 0, 0, {}, {}


@dataclass(config=CHECKED)
class Checkpoint:
    """The state of a training on disk.

    Attributes:
        recipe: flat, see `detection.config.flatten`.
        progress: of the main process, without `sums` and `num_images`.
        processes: `random_states`, and `sums` and `num_images` so far, of each process.
        network: its state dict.
        average: state dict of the averaged weights, None without.
        optimizer, schedule, scaler: their state dicts; no scaler but for fp16.
    """

    recipe: dict[str, Any]
    progress: dict[str, Any]
    processes: list[dict[str, Any]]
    network: dict[str, Tensor]
    average: dict[str, Any] | None
    optimizer: dict[Any, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any] | None

    def save(self, folder: Path) -> None:
        """Write the checkpoint of a run folder; the file is replaced in one step or not at all.

        Raises:
            OSError: it cannot be written; the one before is still there.
        """
        tensors: dict[str, Tensor] = {}
        tree = _pack({"version": VERSION, **vars(self)}, tensors)
        write_whole(folder / FILE, tensors_to_bytes(tensors, json.dumps(tree)))

    @classmethod
    def load(cls, folder: Path) -> Checkpoint | None:
        """Return the checkpoint of a run folder; None if there is none yet.

        Raises:
            ValueError: the file is damaged, is no checkpoint, or one of another version.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        tensors, tree = read_tensors(path)
        try:
            content = _unpack(json.loads(tree), tensors)
            version = content.pop("version", 1)
        except (*MISFITS, RecursionError):
            raise ValueError(f"{path}: not the checkpoint of a training") from None
        if version != VERSION:
            raise ValueError(
                f"{path}: a checkpoint of version {version!r}, this program reads version {VERSION}; finish that "
                "training with the version that began it (its run.json), or start a new one"
            )
        try:
            return cls(**content)
        except (ValueError, TypeError):
            keys = ", ".join(map(str, content))[:200]
            raise ValueError(f"{path}: not the checkpoint of a training; it has the keys {keys}") from None


def save(trainer: Trainer, randoms: dict[str, Any]) -> None:
    """Write the state of all processes; all of them call it, with their `random_states`."""
    progress = dataclasses.asdict(trainer.progress)
    own = {"random": randoms, "sums": progress.pop("sums"), "num_images": progress.pop("num_images")}
    processes = gather_object([own])
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
    folder, accelerator = trainer.run.folder, trainer.accelerator
    state = Checkpoint.load(folder)
    if state is None:
        number = len(trainer.run.history()) if trainer.run.has_log else 0
        if number > 1:  # more than starting anew may cost
            raise ValueError(
                f"{folder}: {number} epochs in its log but no {FILE} to go on from: it has finished, or "
                "lost its state; name another folder for a new run"
            )
        if trainer.is_main:
            say(f"{folder}: no state saved yet, starts from its beginning", error=True)
        return
    require_same(state.recipe, trainer.config, str(folder / FILE))
    if len(state.processes) != accelerator.num_processes:
        raise ValueError(
            f"{folder / FILE}: saved by {len(state.processes)} processes, started with {accelerator.num_processes}; an "
            "exact continuation needs as many"
        )
    try:
        _take_over(trainer, state, state.processes[accelerator.process_index])
    except MISFITS as error:
        raise ValueError(
            f"{folder / FILE} does not fit the network of {folder / 'config.yaml'}: {' '.join(str(error).split())}"
        ) from None


def extend(trainer: Trainer) -> None:
    """Begin the epochs behind those of a finished run: its last weights, a new optimiser; saved at once.

    Raises:
        FileNotFoundError: the run has no weights.
        ValueError: they are damaged or do not fit.
    """
    run, metric = trainer.run, trainer.goal.best_by
    run.load(trainer.network, "last")
    if trainer.average:
        run.load(trainer.average.module, "ema")
        trainer.average.n_averaged.fill_(1)  # or else its first update would begin a new average
    history = run.history()
    scores = [line.metrics[metric] for line in history if metric in line.metrics]
    trainer.progress = Progress(epoch=history[-1].epoch + 1, best=max(scores, default=-math.inf), evaluated=True)
    save(trainer, random_states())


def _take_over(trainer: Trainer, state: Checkpoint, own: dict[str, Any]) -> None:
    trainer.network.load_state_dict(state.network)
    if trainer.average:
        trainer.average.load_state_dict(state.average)
    trainer.optimizer.load_state_dict(state.optimizer)
    # As when they were made: in the memory order of their weights, or else sums would round otherwise.
    for parameter, values in trainer.optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)
    trainer.schedule.load_state_dict(state.schedule)
    for each in (trainer.schedule, *getattr(trainer.schedule, "_schedulers", ())):
        if hasattr(each, "milestones"):
            each.milestones = Counter(each.milestones)  # which was saved as a dict
    if trainer.accelerator.scaler:
        trainer.accelerator.scaler.load_state_dict(state.scaler)
    sums = {name: value.to(trainer.accelerator.device) for name, value in own["sums"].items()}
    trainer.progress = Progress(**state.progress, sums=sums, num_images=own["num_images"])
    set_random_states(own["random"])


def random_states() -> dict[str, Any]:
    """The states of this process's generators: python's, numpy's, torch's and the GPU's.

    The loaders need none: what they draw is a function of seed and epoch, see `detection.data.batches`.
    """
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set what `random_states` gave."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors moved to `tensors` under numbers."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().clone()  # safetensors refuses tensors that share memory
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[_pack(key, tensors), _pack(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(entry, tensors) for entry in value]}
    if isinstance(value, list):
        return [_pack(entry, tensors) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a state holds tensors, dicts, lists and plain values, not {type(value).__name__}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_unpack(entry, tensors) for entry in value["tuple"])
    return {_unpack(key, tensors): _unpack(entry, tensors) for key, entry in value["items"]}
