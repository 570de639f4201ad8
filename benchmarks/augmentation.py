#!/usr/bin/env python3
"""Images of 32x32 per second: whole batches augmented on the training device against torchvision's transforms, image by
image in loader processes. Both crop with padding 4, flip and normalise; rounds alternate, the medians count.

    python benchmarks/augmentation.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from common import add_log_option, write_log
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from backbones import Normalise
from detection.config.schema import ImageAugment
from detection.data import start_worker
from detection.data.image_batches import MemoryBatches
from detection.data.images import Images

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Items(Dataset):
    """As torchvision's CIFAR10: an array per image, made a PIL image and transformed."""

    def __init__(self, images: Images) -> None:
        self.pixels, self.labels = images.pixels.permute(0, 2, 3, 1).numpy(), images.labels.tolist()
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class Ours:
    """Whole batches on the device, normalised there, as a network does with them."""

    def __init__(self, images: Images, device: torch.device, batch_size: int) -> None:
        self.batches = MemoryBatches(images, device, batch_size=batch_size, augment=ImageAugment())
        self.normalise = Normalise(MEAN, STD).to(device)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((self.normalise(images), labels) for images, labels in self.batches)


def images_per_second(batches: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> float:
    """Of one pass, every batch being brought to the device."""
    started, number = time.perf_counter(), 0
    for images, _ in batches:
        number += len(images.to(device, non_blocking=True))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return number / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="images per pass (default: 20000)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2, help="loader processes of torchvision's way (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each, in turn (default: 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_log_option(parser, "augmentation", picture=False)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    device = torch.device(options.device)
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (options.images, 3, 32, 32), dtype=np.uint8))
    images = Images(pixels, torch.zeros(options.images, dtype=torch.long), ("any",))
    ways = {
        "batches on the device": Ours(images, device, options.batch_size),
        f"torchvision, {options.workers} workers": DataLoader(
            Items(images),
            batch_size=options.batch_size,
            shuffle=True,
            num_workers=options.workers,
            worker_init_fn=start_worker,
            persistent_workers=options.workers > 0,
            pin_memory=device.type == "cuda",
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for current in range(options.rounds + 1):
        for name, batches in ways.items():
            speed = images_per_second(batches, device)
            if current:  # the first round starts the processes
                speeds[name].append(speed)
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    for name, median in medians.items():
        print(f"{name}: {median:,.0f} images/s")
    ours, theirs = medians.values()
    print(f"ratio {ours / theirs:.2f}")
    result = {"device": str(device), "images_per_second": speeds, "median": medians, "ratio": ours / theirs}
    write_log(options.log, result)


if __name__ == "__main__":
    main()
