"""The images of a batch: order, similar shapes, shares of several processes, seeds of the augmentation.

Order and augmentation are functions of the recipe's seed and the epoch alone. A training can therefore go on from any
step of any epoch, and neither the number of loader processes nor that of training processes changes what is drawn.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import BatchSampler, Dataset, Sampler


class Batches(Protocol):
    """Training batches of this process, as many in every epoch and in every process; a batch begins with its images."""

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Make the next pass that of `epoch`, from 1, without its first `first` batches."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


def derive_seed(*numbers: int) -> int:
    """A seed below 2^63 for one purpose, such as (recipe's seed, epoch, image); zeros at the end change nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def take_share(batch: Sequence[int], share: tuple[int, int]) -> list[int]:
    """A process's part of a batch of all processes: parts in a row, of sizes that differ by one at the most.

    Where there are fewer images than processes some come twice, so that every process has one.

    Args:
        batch: indices.
        share: (index of the process, number of processes).
    """
    index, number = share
    whole = list(batch) * (-(-number // len(batch)) if len(batch) < number else 1)
    whole = whole[: max(len(batch), number)]
    return whole[index * len(whole) // number : (index + 1) * len(whole) // number]


def evaluation_batches(number: int, batch_size: int, share: tuple[int, int]) -> list[list[int]]:
    """Indices of this process's batches: every batch of the whole goes to exactly one process, and stays as it is.

    An image then meets the same neighbours, and the same padding, whatever the number of processes.
    """
    index, processes = share
    starts = range(index * batch_size, number, processes * batch_size)
    return [list(range(start, min(start + batch_size, number))) for start in starts]


class AspectRatioBatches(BatchSampler):
    """Batches of indices whose images fall into the same bin of width / height.

    Indices come in the sampler's order; a batch leaves as soon as its bin has enough. What is left in the bins at the
    end leaves in the order of aspect ratio, so every index comes once and the number of batches is always the same.
    Images of one shape give the batches of an ordinary `BatchSampler`.

    Args:
        sampler: order of the indices.
        batch_size: indices per batch; the last one may have fewer.
        ratios: width / height by index.
        num_groups: bins on either side of a square. Their edges run from 1/2 to 2 in equal steps of the logarithm.
    """

    def __init__(self, sampler: Sequence[int], batch_size: int, ratios: Sequence[float], num_groups: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)  # which says how many batches there are
        self.edges = [2 ** (step / num_groups) for step in range(-num_groups, num_groups + 1)]
        self.ratios = ratios

    def __iter__(self) -> Iterator[list[int]]:
        waiting: dict[int, list[int]] = defaultdict(list)
        for index in self.sampler:
            batch = waiting[bisect_right(self.edges, self.ratios[index])]
            batch.append(index)
            if len(batch) == self.batch_size:
                yield list(batch)
                batch.clear()
        # The order of arrival decides between equal ratios.
        rest = sorted((index for batch in waiting.values() for index in batch), key=lambda index: self.ratios[index])
        for start in range(0, len(rest), self.batch_size):
            yield rest[start : start + self.batch_size]


class TrainingBatches(Sampler[list[tuple[int, ...]]]):
    """This process's part of every batch of an epoch, as pairs (index, seed of its augmentation).

    The batches of all processes together are those that one process would have with all of their images. The first pass
    is epoch 1, and each further one the next epoch, unless `set_epoch` says otherwise. A last batch in which a process
    would have a single image, of which BatchNorm cannot learn once a map is down to one cell, is left out: which images
    these are changes from epoch to epoch.

    Args:
        number: of images.
        batch_size: images per process; the last batch of an epoch may have fewer.
        seed: of order and augmentation.
        share: (index of the process, number of processes).
        ratios: width / height by index, for batches of images of similar shape (`AspectRatioBatches`); None: any.
        num_groups: bins on either side of a square.
        mixed_epochs: the first epochs, in which a third entry True asks for a mixed item, see `SeededItems`.
    """

    def __init__(
        self,
        number: int,
        batch_size: int,
        *,
        seed: int,
        share: tuple[int, int] = (0, 1),
        ratios: Sequence[float] | None = None,
        num_groups: int = 0,
        mixed_epochs: int = 0,
    ) -> None:
        self.number, self.batch_size, self.seed, self.share = number, batch_size, seed, share
        self.ratios, self.num_groups, self.mixed_epochs = ratios, num_groups, mixed_epochs
        self.epoch, self.first = 1, 0
        rest = number % (batch_size * share[1])
        single = 0 < rest < 2 * share[1] and rest < number and batch_size > 1
        self.used = number - rest if single else number

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """The next pass is that of `epoch`, counted from 1, without its first `first` batches."""
        self.epoch, self.first = epoch, first

    def draw(self) -> tuple[int, Iterator[tuple[int, list[int]]]]:
        """The epoch of a new pass, and (position in the epoch, indices) of its batches of all processes together."""
        epoch, first = self.epoch, self.first
        self.set_epoch(epoch + 1)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self.number, generator=generator).tolist()[: self.used]
        batch_size = self.batch_size * self.share[1]
        if self.ratios is not None and self.num_groups:
            batches = AspectRatioBatches(order, batch_size, self.ratios, self.num_groups)
        else:
            batches = BatchSampler(order, batch_size, drop_last=False)
        return epoch, itertools.islice(enumerate(batches), first, None)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        epoch, batches = self.draw()
        mixed = (True,) if epoch <= self.mixed_epochs else ()
        for _, batch in batches:
            yield [(index, derive_seed(self.seed, epoch, index), *mixed) for index in take_share(batch, self.share)]

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return -(-self.used // (self.batch_size * self.share[1]))


class SeededItems(Dataset):
    """The items of a data set under pairs (index, seed): what is drawn at random for an item depends on its seed alone.

    With a third entry True it is the item that `mixed` of the data set gives. The process's own generator is left as it
    was.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, ...]) -> Any:
        index, seed, *mixed = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.dataset.mixed(index) if mixed else self.dataset[index]
