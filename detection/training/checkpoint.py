"""The checkpoint: everything that changes while a network is trained, in one file."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones import read_tensors, tensors_to_bytes
from detection.files import write_whole

FILE = "state.safetensors"
VERSION = 2  # of the checkpoint's keys; 1, without a version in it, was that of 0.1


@dataclass
class Progress:
    """The place that a training has come to.

    Attributes:
        epoch: the one under way, from 1; one more than there are when all are done.
        step: optimiser steps of it that are done.
        lr: learning rate at its beginning.
        best: highest value so far of the metric that decides about the "best" weights.
        evaluated: whether there has been an evaluation.
        seconds: spent on the steps of this epoch.
        num_images: this process's images of these steps.
        sums: of each loss and, under "layers", of each spike layer's H, over these steps of this process.
    """

    epoch: int = 1
    step: int = 0
    lr: float = 0.0
    best: float = float("-inf")
    evaluated: bool = False
    seconds: float = 0.0
    num_images: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def count(self, name: str, value: Tensor) -> None:
        """Add a value of this step to a sum."""
        self.sums[name] = self.sums.get(name, 0) + value.detach()

    def next_epoch(self) -> None:
        """Go on to the beginning of the next epoch."""
        self.epoch, self.step, self.seconds, self.num_images, self.sums = self.epoch + 1, 0, 0.0, 0, {}


@dataclass
class ProcessState:
    """The part of the state that each process of a training has for itself.

    Attributes:
        random: `random_states`.
        sums: see `Progress`.
        num_images: see `Progress`.
    """

    random: dict[str, Any]
    sums: dict[str, Tensor]
    num_images: int


@dataclass
class Checkpoint:
    """The state of a training on disk.

    Attributes:
        recipe: flat, see `detection.config.flatten`.
        progress: of the main process, without `sums` and `num_images`.
        processes: of each process.
        network: its state dict.
        average: state dict of the averaged weights, None without.
        optimizer, schedule, scaler: their state dicts; no scaler but for fp16.
    """

    recipe: dict[str, Any]
    progress: dict[str, Any]
    processes: list[dict[str, Any]]
    network: dict[str, Tensor]
    average: dict[str, Any] | None
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any] | None

    def save(self, folder: Path) -> None:
        """Write the checkpoint of a run folder; the file is replaced in one step or not at all.

        Raises:
            OSError: it cannot be written; the one before is still there.
        """
        tensors: dict[str, Tensor] = {}
        content = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        tree = _pack({"version": VERSION, **content}, tensors)
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
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"{path}: not the checkpoint of a training") from None
        if version != VERSION:
            raise ValueError(
                f"{path}: a checkpoint of version {version}, this program reads version {VERSION}; finish that "
                "training with the version that began it (its run.json), or start a new one"
            )
        if content.keys() != {entry.name for entry in fields(cls)}:
            raise ValueError(f"{path}: not the checkpoint of a training; it has the keys {', '.join(content)}")
        return cls(**content)


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
