"""Loaders: batches of images that differ in size, read by processes of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detection.data.batches import SeededItems, TrainingBatches, evaluation_batches

# What torch says when a process of a loader has died, or /dev/shm is full.
LOST_PROCESS = ("DataLoader worker", "shared memory", "No space left on device", "unable to mmap", "Bus error")
PATIENCE = 600  # seconds that a batch may take


class LoaderError(OSError):
    """A loader process ended."""


def build_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    workers: int,
    shuffle: bool,
    seed: int = 0,
    aspect_groups: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Loader[tuple[list[Tensor], list[dict[str, Any]]]]:
    """This process's batches (images, targets), both lists, since images differ in size and in number of objects.

    Shuffled, it is a `TrainingLoader`: `set_epoch` says which epoch the next pass is. Not shuffled, see
    `evaluation_batches`.

    Args:
        seed: of the order and the augmentation, whatever the number of loader processes.
        aspect_groups: shuffled batches hold images of similar shape, see `AspectRatioBatches`; 0: any images. A
            `DetectionDataset` is needed for it.
        share: (index of this process, number of processes).
    """
    if not shuffle:
        batches = evaluation_batches(len(dataset), batch_size, share)
        return Loader(dataset, batch_sampler=batches, collate_fn=_collate, **loader_options(workers))
    ratios = [record.width / record.height for record in dataset.annotations.records] if aspect_groups else None
    sampler = TrainingBatches(
        len(dataset), batch_size, seed=seed, share=share, ratios=ratios, num_groups=aspect_groups, drop_single=True
    )
    return TrainingLoader(SeededItems(dataset), batch_sampler=sampler, collate_fn=_collate, **loader_options(workers))


class Loader(DataLoader):
    """A DataLoader whose processes may fail: then it ends with a sentence that has the remedy."""

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if not any(sign in str(error) for sign in LOST_PROCESS):
                raise
            raise LoaderError(
                f"a loader process ended or found no shared memory ({str(error).strip().splitlines()[-1]}); with "
                "data.workers 0 the main process reads, and needs neither; a container may have more with --shm-size"
            ) from error


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


def _collate(items: list[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


def start_worker(worker: int) -> None:
    """Prepare a loader process: one thread, and a process group of its own."""
    # With a pool of threads in each, a few workers would fight for the cores. OpenCV has none, see transforms.py.
    torch.set_num_threads(1)
    # Ctrl-C and a stop of the main process's group are its affair: it needs its workers for the step under way.
    os.setpgid(0, 0)
