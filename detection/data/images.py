"""Labelled images for classification: readers, and batches that are augmented on the training device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from detection.config import ImageAugment, ImageData
from detection.data.batches import TrainingBatches, derive_seed, evaluation_batches, take_share
from detection.data.records import NUM_THREADS, Verify, check_classes, image_problem, load_image, require_folder
from detection.data.synthetic import CATEGORIES, SCALE, draw_scene


@dataclass(frozen=True)
class Images:
    """A split in memory.

    Shape:
        pixels: (N, 3, size, size) uint8 RGB.
        labels: (N,) int64 in 0..K-1; label k is classes[k].

    `dropped` has one sentence for each file that was left out.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageFiles:
    """A split on disk: path and label of every image, sorted by class and name; what was left out, a sentence each."""

    files: tuple[tuple[Path, int], ...]
    classes: tuple[str, ...]
    dropped: tuple[str, ...] = ()


def read_images(data: ImageData, split: Literal["train", "val"], *, download: bool = False) -> Images:
    """A split in memory, its classes those of `data.classes` or, if that is empty, all that the split has.

    Images of a folder are cut to a square in their middle and resized to the side `data.size`. Files that do not
    decode are left out and named.

    Args:
        download: fetch CIFAR if it is missing.

    Raises:
        FileNotFoundError: no such folder, or CIFAR is missing and may not be fetched.
        ValueError: the layout is not root/SPLIT/CLASS/*, a class has no image, a wanted class is not in the data, or
            the data's image size is not `data.size`.
    """
    match data.format:
        case "folder":
            return _decode(read_folder(data.root / getattr(data, split), data.classes), data.size)
        case "synthetic":
            return _draw(data, 0, data.num_train) if split == "train" else _draw(data, 1, data.num_val)
        case _:
            return _cifar(data, split == "train", download)


def read_folder(folder: Path, classes: Sequence[str] = ()) -> ImageFiles:
    """The image files of folder/CLASS/*.

    Args:
        folder: of one split.
        classes: class names in label order, other sub-folders are left out; empty: all sub-folders, sorted.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class folders in it, a class without images, or a wanted class that has no folder.
    """
    require_folder(folder, "one folder of images per class, such as train/cat and train/dog")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise ValueError(f"{folder}: no class folders in it; expected {folder.name}/CLASS/*.jpg, one folder per class")
    check_classes(classes, found, source=str(folder))
    names = tuple(classes) or tuple(found)
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(names):
        paths = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not paths:
            raise ValueError(f"{folder / name}: no images in it (allowed: {', '.join(IMG_EXTENSIONS)})")
        files += [(path, label) for path in paths]
    others = [f"{folder / name}: not among the classes; left out" for name in found if name not in names]
    return ImageFiles(tuple(files), names, tuple(others))


def check_files(files: ImageFiles, verify: Verify) -> ImageFiles:
    """Without the files that do not pass `image_problem`.

    Raises:
        ValueError: a class has no usable image.
    """
    with ThreadPool(NUM_THREADS) as pool:
        problems = pool.map(lambda file: image_problem(file[0], verify=verify), files.files, chunksize=64)
    return _without(files, problems)


def _without(files: ImageFiles, problems: Sequence[str | None]) -> ImageFiles:
    """The files that have no problem, a sentence for each other one; refuses if a class has none left."""
    pairs = list(zip(files.files, problems, strict=True))
    kept = tuple(file for file, problem in pairs if problem is None)
    dropped = tuple(f"{path}: {problem}; left out" for (path, _), problem in pairs if problem is not None)
    left = {label for _, label in kept}
    for label, name in enumerate(files.classes):
        if label not in left:
            raise ValueError(f"class {name!r} has no usable image; {len(dropped)} left out, the first: {dropped[0]}")
    return ImageFiles(kept, files.classes, files.dropped + dropped)


class MemoryBatches:
    """Batches (images, labels) of a split that lies on the training device, augmented there, a whole batch at a time.

    An image is padded with black, a window of its own size is cut out at a random place, flipped, and a square of it
    blackened, as `augment` says; then the images are normalised. Without `augment` they come in order, as they are.

    Args:
        data: the split; its pixels are moved to `device`.
        device: where the batches lie.
        batch_size: images per batch and process; the last one may have fewer.
        mean, std: RGB, of images in [0, 1].
        augment: None in evaluation.
        seed: of order and augmentation, which differ from epoch to epoch.
        share: (index, number) of the processes that share the split, see `TrainingBatches` and `evaluation_batches`.

    Shape: images (B, 3, size, size) float32, labels (B,) int64.
    """

    def __init__(
        self,
        data: Images,
        device: torch.device,
        *,
        batch_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        augment: ImageAugment | None = None,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.pixels, self.labels = data.pixels.to(device), data.labels.to(device)
        self.augment, self.seed, self.share = augment, seed, share
        self.mean = 255 * torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(3, 1, 1)
        self.order = TrainingBatches(len(self.labels), batch_size, seed=seed, share=share, drop_single=True)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """The next pass is that of `epoch`, counted from 1, without its first `first` batches."""
        self.order.set_epoch(epoch, first)

    def __len__(self) -> int:
        if self.augment is None:
            return len(evaluation_batches(len(self.labels), self.order.batch_size, self.share))
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.augment is None:
            for batch in evaluation_batches(len(self.labels), self.order.batch_size, self.share):
                yield self._load(torch.tensor(batch))
            return
        epoch, batches = self.order.draw()
        for position, batch in batches:
            # On the CPU, so the same on every device, and for the whole batch, so the same for every process.
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, position))
            drawn = draw_augmentation(len(batch), self.pixels.shape[-1], self.augment, generator)
            chosen = take_share(range(len(batch)), self.share)
            yield self._load(torch.tensor(batch)[chosen], {name: values[chosen] for name, values in drawn.items()})

    def _load(self, indices: Tensor, drawn: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        device = self.pixels.device
        indices = indices.to(device)
        images = self.pixels[indices]
        if drawn is not None:
            images = augment_batch(images, self.augment, {name: values.to(device) for name, values in drawn.items()})
        return (images - self.mean) / self.std, self.labels[indices]


def draw_augmentation(number: int, size: int, augment: ImageAugment, generator: torch.Generator) -> dict[str, Tensor]:
    """What `augment_batch` does to each image: "top" and "left" of its window, "flip", "y" and "x" of its square.

    Shape: each (number,).
    """
    drawn: dict[str, Tensor] = {}
    if augment.padding:
        for name in ("top", "left"):
            drawn[name] = torch.randint(2 * augment.padding + 1, (number,), generator=generator)
    if augment.hflip:
        drawn["flip"] = torch.rand(number, generator=generator) < augment.hflip
    if augment.cutout:
        for name in ("y", "x"):  # the square's middle: near the border a part of it falls outside
            drawn[name] = torch.randint(size, (number,), generator=generator)
    return drawn


def augment_batch(images: Tensor, augment: ImageAugment, drawn: Mapping[str, Tensor]) -> Tensor:
    """Square images (B, C, S, S) cut, flipped and blackened in part, each by draws of its own; dtype kept.

    Args:
        drawn: from `draw_augmentation`, on the images' device.
    """
    device, size = images.device, images.shape[-1]
    if "top" in drawn:
        rows = drawn["top"][:, None] + torch.arange(size, device=device)
        columns = drawn["left"][:, None] + torch.arange(size, device=device)
        padded = F.pad(images, [augment.padding] * 4)
        each = torch.arange(len(images), device=device)[:, None, None]
        # Indices on both sides of the channels put these last: (B, S, S, C).
        images = padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if "flip" in drawn:
        images = torch.where(drawn["flip"][:, None, None, None], images.flip(-1), images)
    if "y" in drawn:
        near_rows, near_columns = (
            (torch.arange(size, device=device) - drawn[name][:, None] + augment.cutout // 2) // augment.cutout == 0
            for name in ("y", "x")
        )
        images = images.masked_fill((near_rows[:, :, None] & near_columns[:, None, :])[:, None], 0)
    return images


class FolderImages(Dataset):
    """Items (image (3, size, size) float32 normalised, label) read from disk one by one.

    Training cuts a random part of the image and resizes it; evaluation resizes the short side to 256/224 of `size` and
    cuts out the centre, as is usual for ImageNet.

    Args:
        files: path and label of every image.
        data: size, augmentation, mean and standard deviation.
        train: with augmentation or without.
    """

    def __init__(self, files: ImageFiles, data: ImageData, *, train: bool) -> None:
        self.files = files
        if train:
            shape = [
                v2.RandomResizedCrop(data.size, scale=(data.augment.min_area, 1.0), antialias=True),
                v2.RandomHorizontalFlip(data.augment.hflip),
            ]
        else:
            shape = [v2.Resize(round(data.size * 256 / 224), antialias=True), v2.CenterCrop(data.size)]
        self.transform = v2.Compose([*shape, v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)])

    def __len__(self) -> int:
        return len(self.files.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files.files[index]
        pixels = torch.from_numpy(load_image(path).transpose(2, 0, 1).copy())
        return self.transform(pixels), label


def _decode(files: ImageFiles, size: int) -> Images:
    def decode(path: Path) -> np.ndarray | str:
        try:
            image = Image.fromarray(load_image(path))
        except ValueError as error:
            return f"the image does not decode: {error.__cause__}"
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))

    with ThreadPool(NUM_THREADS) as pool:
        found = pool.map(decode, [path for path, _ in files.files], chunksize=64)
    usable = _without(files, [result if isinstance(result, str) else None for result in found])
    labels = torch.tensor([label for _, label in usable.files], dtype=torch.long)
    pixels = torch.from_numpy(np.stack([result for result in found if not isinstance(result, str)]))
    return Images(pixels.permute(0, 3, 1, 2).contiguous(), labels, files.classes, usable.dropped)


def _draw(data: ImageData, split: int, number: int) -> Images:
    """A light shape on a dark ground per image, somewhere and of some size; the same settings, the same images."""
    _require_classes(data, CATEGORIES)
    pixels = np.empty((number, data.size, data.size, 3), dtype=np.uint8)
    labels = torch.empty(number, dtype=torch.long)
    for index in range(number):
        rng = np.random.default_rng((split, index))
        scene = draw_scene(2 * data.size, 1, rng)
        # Lighter by a constant: which colours meet is then no part of the task, and a small network learns it soon.
        mask = scene.masks[0].reshape(2 * data.size, SCALE, 2 * data.size, SCALE).mean(axis=(1, 3))
        image = Image.fromarray((scene.image / 2 + 127 * mask[:, :, None]).astype(np.uint8))
        # A square of one and a half to two times the shape's box, around it as far as the scene goes.
        box = scene.boxes[0].reshape(2, 2)
        side = min(rng.uniform(1.5, 2) * np.ptp(box, axis=0).max(), 2 * data.size)
        corner = (box.mean(axis=0) - side / 2).clip(0, 2 * data.size - side)
        window = image.resize((data.size, data.size), Image.Resampling.BILINEAR, box=(*corner, *(corner + side)))
        pixels[index], labels[index] = np.asarray(window), int(scene.labels[0]) - 1
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels, CATEGORIES)


def _cifar(data: ImageData, train: bool, download: bool) -> Images:
    if data.size != 32:
        raise ValueError(f"data.size {data.size}: the images of {data.format} have 32 pixels a side")
    kind = CIFAR10 if data.format == "cifar10" else CIFAR100
    try:
        found = kind(str(data.root), train=train, download=download)
    except (OSError, RuntimeError) as error:
        if download:
            raise OSError(f"{data.root}: the download of {data.format} failed ({error})") from error
        raise FileNotFoundError(
            f"{data.root}: {data.format} is not there; --download fetches it, where there is internet"
        ) from None
    _require_classes(data, found.classes)
    pixels = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(found.targets), tuple(found.classes))


def _require_classes(data: ImageData, found: Sequence[str]) -> None:
    if data.classes and list(data.classes) != list(found):
        raise ValueError(
            f"data.classes has {len(data.classes)} names ({', '.join(data.classes[:3])}, ...), {data.format} has "
            f"{len(found)} ({', '.join(found[:3])}, ...); leave data.classes out"
        )
