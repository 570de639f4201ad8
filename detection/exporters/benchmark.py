"""The speed of an exported file on this machine's CPU, and its accuracy."""

from __future__ import annotations

import statistics
import timeit
from dataclasses import dataclass, field
from pathlib import Path

import torch

from backbones import zoo
from detection.exporters.inference import open_file
from detection.text import plural

WARM_UP = 5  # calls before those that count


@dataclass(frozen=True)
class Benchmark:
    """The findings of `benchmark_file`.

    Attributes:
        path: the file.
        size: height and width of the image in pixels.
        threads: of ONNX Runtime or the event-driven engine, and torch.
        seconds: of each call of the file alone, of one image.
        whole_seconds: likewise from the image to its boxes or logits: resizing, padding and decoding by torch, too,
            where the file leaves them to others.
        metrics: of the task, on the evaluation images; empty where no data were named.
    """

    path: Path
    size: tuple[int, int]
    threads: int
    seconds: tuple[float, ...] = field(repr=False)
    whole_seconds: tuple[float, ...] = field(repr=False)
    metrics: dict[str, float]

    @property
    def median(self) -> float:
        """Median seconds of the file alone."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        height, width = self.size
        threads = plural(self.threads, "thread")
        return f"{self.path}: {spread_of(self.seconds)} for an image of {width}x{height} pixels, {threads}"


def benchmark_file(
    path: str | Path, *, threads: int = 1, repeats: int = 50, data_root: str | Path | None = None
) -> Benchmark:
    """Measure how fast an exported ONNX, .pt2 or .events file is, one image at a time, and how accurate.

    Args:
        path: a file of `export_run`.
        threads: of ONNX Runtime, and of torch for what is not in the file.
        repeats: calls that count; five more come before them.
        data_root: where the data of its run lie, on whose evaluation images the accuracy is measured; None: it is not.

    Raises:
        FileNotFoundError: no such file or data.
        ImportError: the package onnxruntime is not installed.
        ValueError: the file is damaged or none of this project's, or a number is below 1.
    """
    for name, number in (("threads", threads), ("repeats", repeats)):
        if number < 1:
            raise ValueError(f"--{name} {number}: at least 1")
    file, before = open_file(path, threads=threads), torch.get_num_threads()
    _, channels, *sides = file.shape
    default = file.task.input_size
    height, width = (side if isinstance(side, int) else other for side, other in zip(sides, default, strict=True))
    image = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(threads)
    try:
        alone, whole = (
            timeit.repeat(call, number=1, repeat=WARM_UP + repeats)[WARM_UP:]
            for call in (lambda: file.run(image), lambda: file(image))
        )
    finally:
        torch.set_num_threads(before)
    metrics = {} if data_root is None else file.evaluate(data_root)
    return Benchmark(zoo.locate(path), (height, width), threads, tuple(alone), tuple(whole), metrics)


def spread_of(seconds: tuple[float, ...]) -> str:
    """Return the median and the middle half of some times, such as "1.20 ms (1.15 to 1.31)"."""
    ordered = sorted(1e3 * value for value in seconds)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return f"{statistics.median(ordered):.2f} ms ({low:.2f} to {high:.2f})"
