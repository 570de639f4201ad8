"""Loaders: batches of images that differ in size, read by processes of their own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.queues import Queue
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from detection.data.batches import SeededItems, TrainingBatches, evaluation_batches

# What torch says when a process of a loader has died, or /dev/shm is full.
LOST_PROCESS = ("DataLoader worker", "DataLoader timed out", "shared memory", "No space left", "mmap", "Bus error")
SENDING = "while a batch was sent from a loader process"
PATIENCE = 600  # seconds that a batch may take


class LoaderError(OSError):
    """A loader process ended."""


def _collate(items: list[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


def build_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    workers: int,
    shuffle: bool,
    seed: int = 0,
    aspect_groups: int = 0,
    share: tuple[int, int] = (0, 1),
    mixed_epochs: int = 0,
    collate: Callable[[list[Any]], Any] | None = _collate,
) -> Loader:
    """This process's batches (images, targets), both lists, since images differ in size and in number of objects.

    Shuffled, it is a `TrainingLoader`: `set_epoch` says which epoch the next pass is. Not shuffled, see
    `evaluation_batches`.

    Args:
        seed: of the order and the augmentation, whatever the number of loader processes.
        aspect_groups: shuffled batches hold images of similar shape, see `AspectRatioBatches`; 0: any images. A
            `DetectionDataset` is needed for it.
        share: (index of this process, number of processes).
        mixed_epochs: the first epochs, whose items have other images mixed in; a `DetectionDataset` is needed for it.
        collate: makes a batch of items; None: torch's own, of tensors of one size.
    """
    if not shuffle:
        batches = evaluation_batches(len(dataset), batch_size, share)
        return Loader(dataset, batch_sampler=batches, collate_fn=collate, **loader_options(workers))
    ratios = [record.width / record.height for record in dataset.annotations.records] if aspect_groups else None
    options = {"seed": seed, "share": share, "mixed_epochs": mixed_epochs}
    sampler = TrainingBatches(len(dataset), batch_size, ratios=ratios, num_groups=aspect_groups, **options)
    return TrainingLoader(SeededItems(dataset), batch_sampler=sampler, collate_fn=collate, **loader_options(workers))


class _Deaths:
    """The loader processes that ended unasked: an error where their images are waited for, and nowhere else.

    torch raises it wherever the main process happens to be, in the middle of a step or of saving too.
    """

    def __init__(self) -> None:
        self.error: RuntimeError | None = None
        self.waiting = False
        self._notice: Any = None  # torch's handler

    def watch(self) -> None:
        """Stand in front of the handler that torch has set."""
        handler = signal.getsignal(signal.SIGCHLD)
        if threading.current_thread() is threading.main_thread() and callable(handler) and handler != self._note:
            self._notice = handler
            signal.signal(signal.SIGCHLD, self._note)

    def wait(self, get: Callable[[], Any]) -> Any:
        """Return what a loader gets from its processes."""
        self.waiting = True
        try:
            if self.error is not None:
                error, self.error = self.error, None
                raise error
            return get()
        finally:
            self.waiting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        try:
            self._notice(number, frame)
        except RuntimeError as error:
            if self.waiting:
                raise
            self.error = error


_deaths = _Deaths()


class Loader(DataLoader):
    """A DataLoader whose processes may fail: then it ends with a sentence that has the remedy."""

    def __iter__(self) -> Iterator[Any]:
        try:
            if self._iterator is None:  # its processes are new
                _deaths.error = None
            batches = _deaths.wait(super().__iter__)  # processes that are there already answer
            if self.num_workers and hasattr(signal, "SIGCHLD"):
                _deaths.watch()
            while True:
                try:
                    batch = _deaths.wait(partial(next, batches))
                except StopIteration:
                    return
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            if not self._is_lost(error):
                raise
            reason = (str(error).strip().splitlines() or ["no answer"])[-1]
            raise LoaderError(
                f"a loader process ended or found no shared memory ({reason}); with data.workers 0 the main "
                "process reads, and needs neither; a container may have more with --shm-size"
            ) from error

    def _is_lost(self, error: Exception) -> bool:
        """Whether a process was lost; an error of the data comes from it with its traceback."""
        if isinstance(error, LoaderError) or ("Original Traceback" in str(error) and SENDING not in str(error)):
            return False
        if isinstance(error, RuntimeError):
            return any(sign in str(error) for sign in LOST_PROCESS)
        return self.num_workers > 0  # the connection to one that has ended


class TrainingLoader(Loader):
    """A loader over `TrainingBatches` whose epoch can be set: the loop's contract."""

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """See `TrainingBatches.set_epoch`."""
        self.batch_sampler.set_epoch(epoch, first)


def loader_options(workers: int) -> dict[str, Any]:
    """Return the options that all loaders have in common."""
    return {
        "num_workers": workers,
        "timeout": PATIENCE if workers else 0,
        "generator": torch.Generator(),  # for the workers' seeds, on which nothing depends, in place of the global one
        "worker_init_fn": start_worker,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }


def start_worker(worker: int) -> None:
    """Prepare a loader process: one thread, and a process group of its own."""
    # With a pool of threads in each, a few workers would fight for the cores. OpenCV has none, see transforms.py.
    torch.set_num_threads(1)
    # Ctrl-C and a stop of the main process's group are its affair: it needs its workers for the step under way.
    os.setpgid(0, 0)
    # A batch that does not go into /dev/shm would be lost with a traceback, and waited for.
    Queue._on_queue_feeder_error = _send_error


def _send_error(queue: Queue, error: Exception, item: tuple[int, Any]) -> None:
    """Send the error that kept a batch, the number and the content, from being sent in its place."""
    queue.put((item[0], ExceptionWrapper(where=SENDING)))
