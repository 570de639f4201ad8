"""Signals that end a training in good order, and the clock of its checkpoints."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

PARENT = "HOYER_DET_PARENT"  # variable: a pipe that is closed when the process that started this one ends


def end_with_parent() -> None:
    """Stop this process, as SIGTERM does, as soon as the one that started it has ended, if that left a pipe for it."""
    descriptor = os.environ.pop(PARENT, None)
    if descriptor is not None:

        def wait() -> None:
            os.read(int(descriptor), 1)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=wait, daemon=True).start()


class Interrupted(Exception):
    """The training was told to stop, and has saved its state; of several processes, one has a message.

    Attributes:
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class CallbackError(RuntimeError):
    """Error for a callback that failed; the state of the training is saved."""


class Screen(Console):
    """A console whose lost reader, such as `head`, is an error as for `print`; rich would end with status 1."""

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that is being handled."""
        raise


class StopSignals:
    """Notes SIGTERM and Ctrl-C, so that the step under way can be finished; a second Ctrl-C ends it at once.

    Attributes:
        received: number of the signal, 0 before there is one.
    """

    def __init__(self) -> None:
        self.received = 0
        self._impatient = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note signals while the context is open; in the main thread only, as Python allows no others."""
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
        """A part that loses nothing if it is broken off, such as an evaluation: a signal raises KeyboardInterrupt."""
        self._impatient = allowed
        try:
            if allowed and self.received:
                raise KeyboardInterrupt
            yield
        finally:
            self._impatient = False

    def wait(self, seconds: float = 1.0) -> int:
        """Return `received`, after a moment if need be: who stops several processes tells one after the other."""
        end = time.monotonic() + seconds
        while not self.received and time.monotonic() < end:
            time.sleep(0.01)
        return self.received

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received and number == signal.SIGINT
        self.received = number
        if again or self._impatient:
            raise KeyboardInterrupt


class SaveClock:
    """The clock of the next state.

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
