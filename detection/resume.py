"""A training that can be stopped at any moment: its state in one file, and signals that end it in good order."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones import read_tensors, tensors_to_bytes
from detection.checkpoint import Run, write_whole


@dataclass
class Progress:
    """How far a training is.

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
        """Adds a value of this step to a sum."""
        self.sums[name] = self.sums.get(name, 0) + value.detach()

    def next_epoch(self) -> None:
        """Goes on to the beginning of the next epoch."""
        self.epoch, self.step, self.seconds, self.num_images, self.sums = self.epoch + 1, 0, 0.0, 0, {}


class Interrupted(Exception):
    """The training was told to stop, and has saved its state; of several processes, one has a message.

    Attributes:
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class StopSignals:
    """Notes SIGTERM and Ctrl-C, so that the step under way can be finished; a second Ctrl-C ends it at once.

    Attributes:
        received: number of the signal, 0 before there is one.
        impatient: inside of `interruptible` the signal raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.received = 0
        self._impatient = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Signals are noted while the context is open; in the main thread only, as Python allows no others."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interruptible(self, allowed: bool) -> Iterator[None]:
        """A part that nothing is lost of if it is broken off, such as an evaluation."""
        self._impatient = allowed
        try:
            if allowed and self.received:
                raise KeyboardInterrupt
            yield
        finally:
            self._impatient = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received and number == signal.SIGINT
        self.received = number
        if again or self._impatient:
            raise KeyboardInterrupt


class SaveClock:
    """When the next state is due.

    Args:
        minutes: between saves; 0: never by time.
        steps: optimiser steps between saves; 0: never by steps.
    """

    def __init__(self, minutes: float, steps: int) -> None:
        self.minutes, self.steps = minutes, steps
        self.restart()

    def restart(self) -> None:
        """A state has just been saved."""
        self.saved_at, self.num_steps = time.monotonic(), 0

    def due(self) -> bool:
        """Whether a state is due in this process."""
        by_time = self.minutes and time.monotonic() - self.saved_at >= 60 * self.minutes
        return bool(by_time or (self.steps and self.num_steps >= self.steps))


def state_path(run: Run) -> Path:
    """Where a run keeps its state."""
    return run.folder / "state.safetensors"


def save_state(run: Run, state: Mapping[str, Any]) -> None:
    """Writes a tree of dicts, lists, tensors and plain values; the file is replaced in one step or not at all.

    Raises:
        OSError: it cannot be written; the one before is still there.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, tensors)
    write_whole(state_path(run), tensors_to_bytes(tensors, json.dumps(tree)))


def load_state(run: Run) -> dict[str, Any] | None:
    """What `save_state` wrote; None if there is nothing yet.

    Raises:
        ValueError: the file is damaged, or was not written by `save_state`.
    """
    path = state_path(run)
    if not path.is_file():
        return None
    tensors, tree = read_tensors(path)
    if not tree:
        raise ValueError(f"{path}: not the state of a training; expected one that train_det.py or train_cls.py wrote")
    return _unpack(json.loads(tree), tensors)


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
    """Sets what `random_states` gave."""
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
