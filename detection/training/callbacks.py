"""Code of others that a training calls at its turns: `Callback`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from detection.records import EpochLog, Evaluation
from detection.runs import Run
from detection.training.signals import CallbackError


class Step(NamedTuple):
    """An optimiser step that was made.

    Attributes:
        epoch: from 1.
        number: of the step in its epoch, from 1.
        num_steps: steps of an epoch.
        loss: shape (), of this process; without a gradient.
        lr: learning rate of the first group of weights in the step after it.
    """

    epoch: int
    number: int
    num_steps: int
    loss: Tensor
    lr: float


class Callback:
    """Base of what a training calls; override what is wanted: `detection.train(recipe, callbacks=[MyCallback()])`.

    Of several processes the main one alone calls them. A run that goes on begins with `on_train_begin` again, and
    with `on_epoch_begin` of the epoch that it is in. An exception ends the run with a `CallbackError` that names
    callback and method, after the state was saved: `resume` goes on from there. Random numbers that a callback draws
    from the global generators change the training.
    """

    def on_train_begin(self, run: Run, network: nn.Module) -> None:
        """Begin; the run's folder is there."""

    def on_epoch_begin(self, run: Run, epoch: int) -> None:
        """Begin an epoch, from 1."""

    def on_step_end(self, run: Run, step: Step) -> None:
        """Follow an optimiser step."""

    def on_evaluation(self, run: Run, epoch: int, evaluation: Evaluation) -> None:
        """Follow an evaluation of the network, before the epoch is logged."""

    def on_epoch_end(self, run: Run, line: EpochLog) -> None:
        """Follow an epoch, whose line is in the log and whose weights are saved."""

    def on_train_end(self, run: Run, line: EpochLog) -> None:
        """End; `line` is the last epoch's."""


class Callbacks:
    """Callbacks of the main process, and the first of their errors, which waits until the state is saved.

    Args:
        callbacks: in the order in which they are called.
        run: that they are told of.
        active: whether this is the main process.

    Attributes:
        error: None while there is none.
    """

    def __init__(self, callbacks: Sequence[Callback], run: Run, active: bool) -> None:
        self.callbacks, self.run, self.active = tuple(callbacks), run, active
        self.error: CallbackError | None = None

    def tell(self, event: str, *arguments: Any) -> None:
        """Call a method of each callback; after an error no other is called."""
        for callback in self.callbacks if self.active and self.error is None else ():
            # Of the process: an evaluation of another run sets them as that wants them.
            kept, exact = dict(AcceleratorState._shared_state), torch.are_deterministic_algorithms_enabled()
            try:
                getattr(callback, event)(self.run, *arguments)
            except Exception as error:
                name = f"{type(callback).__name__}.{event}"
                self.error = CallbackError(f"callback {name}: {type(error).__name__}: {error}")
                self.error.__cause__ = error
                return
            finally:
                AcceleratorState._shared_state.update(kept)
                torch.use_deterministic_algorithms(exact)
