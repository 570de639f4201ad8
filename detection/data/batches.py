"""Batches of images of similar shape: less padding, so less memory and time per batch."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from torch.utils.data import BatchSampler, Sampler


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

    def __init__(self, sampler: Sampler[int], batch_size: int, ratios: Sequence[float], num_groups: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        edges = [2 ** (step / num_groups) for step in range(-num_groups, num_groups + 1)]
        self.ratios = ratios
        self.bins = [bisect_right(edges, ratio) for ratio in ratios]

    def __iter__(self) -> Iterator[list[int]]:
        waiting: dict[int, list[int]] = defaultdict(list)
        for index in self.sampler:
            batch = waiting[self.bins[index]]
            batch.append(index)
            if len(batch) == self.batch_size:
                yield batch
                waiting[self.bins[index]] = []
        # The order of arrival decides between equal ratios.
        rest = sorted((index for batch in waiting.values() for index in batch), key=lambda index: self.ratios[index])
        for start in range(0, len(rest), self.batch_size):
            yield rest[start : start + self.batch_size]

    def __len__(self) -> int:
        sizes = Counter(self.bins).values()
        rest = sum(size % self.batch_size for size in sizes)
        return sum(size // self.batch_size for size in sizes) - (-rest // self.batch_size)
