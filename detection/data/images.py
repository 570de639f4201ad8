"""Labelled images for classification: readers, and the registry of their formats."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from detection.config.registry import add_to, find_reader
from detection.config.schema import ImageData
from detection.data.events.files import list_recordings, read_classified
from detection.data.events.made import draw_classified
from detection.data.image_files import EXTENSIONS, Look, decode_image, examine_image, is_image, visible_files
from detection.data.records import NUM_THREADS, check_classes, class_folders, few, require_folder
from detection.data.synthetic import CATEGORIES, SCALE, draw_scene
from detection.text import plural, printable

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Images:
    """A split in memory.

    Shape:
        pixels: (N, 3, size, size) uint8 RGB, or of `data.channels`.
        labels: (N,) int64 in 0..K-1; label k is classes[k].

    `dropped` has one sentence for each file that was left out.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Return a SHA-256 of pixels, labels and classes."""
        digest = hashlib.sha256(repr(self.classes).encode())
        digest.update(self.labels.numpy())
        digest.update(self.pixels.numpy())
        return digest.hexdigest()

    def choose(self, indices: Sequence[int]) -> Images:
        """Return these images alone."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class ImageFiles:
    """A split on disk: path and label of every image, sorted by class and name.

    `dropped` has a sentence for each thing that was left out, and for images of which only a part is used.
    """

    files: tuple[tuple[Path, int], ...]
    classes: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> Tensor:
        """Labels of the files, (N,) int64 in 0..K-1."""
        return torch.tensor([label for _, label in self.files])

    def fingerprint(self) -> str:
        """Return a SHA-256 of the files' names, sizes and labels, and of the classes."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for path, label in self.files:
            digest.update(repr((path.name, path.stat().st_size, label)).encode())
        return digest.hexdigest()

    def choose(self, indices: Sequence[int]) -> ImageFiles:
        """Return these files alone."""
        return replace(self, files=tuple(self.files[index] for index in indices))


Reader = Callable[[ImageData, Split, bool], Images | ImageFiles]
READERS: dict[str, Reader] = {}


def register_image_format(name: str) -> Callable[[Reader], Reader]:
    """Decorate a function (data, split, download) -> `Images`, which reads files for `data.format: NAME`.

    Raises:
        ValueError: the name is taken by another function.
    """
    return lambda reader: add_to(READERS, name, reader, "data.format")


def read_image_split(data: ImageData, split: Split, *, download: bool = False) -> Images | ImageFiles:
    """Return a split: its pixels, or the files of large images in folders (`data.in_memory` False).

    The classes are those of `data.classes` or, if that is empty, all that the split has. Images of a folder that are
    kept in memory are cut to a square in their middle and resized to the side `data.size`. Files that do not decode are
    left out and named.

    Args:
        data: where it is.
        split: "train" or "val".
        download: fetch CIFAR if it is missing.

    Raises:
        FileNotFoundError: no such folder, or CIFAR is missing and may not be fetched.
        ValueError: no such format, the layout is not root/SPLIT/CLASS/*, a class has no image, a wanted class is not
            in the data, or the data's image size is not `data.size`.
    """
    for key in ("cutout", "erase", "randaugment"):
        if not data.in_memory and split == "train" and getattr(data.augment, key):
            raise ValueError(f"data.augment.{key}: of images that are kept in memory alone (data.in_memory True)")
    found = find_reader(READERS, data)(data, split, download)
    if not data.in_memory and isinstance(found, Images):
        raise ValueError(f"data.in_memory False: data.format {data.format!r} keeps all images in memory")
    return found


@register_image_format("folder")
def _folder(data: ImageData, split: Split, download: bool) -> Images | ImageFiles:
    files = read_folder(data.root / getattr(data, split), data.classes)

    def look(file: tuple[Path, int]) -> tuple[Look, np.ndarray | None]:
        found = examine_image(file[0], verify=data.verify)
        if found.problem is not None or not data.in_memory:
            return found, None
        try:
            pixels = decode_image(file[0], upright=True)  # as it will be shown, and predicted on
        except ValueError as error:
            return Look(f"the image does not decode: {error}"), None
        if pixels.shape[:2] == (data.size, data.size):
            return found, pixels
        return found, np.asarray(
            ImageOps.fit(Image.fromarray(pixels), (data.size, data.size), Image.Resampling.BILINEAR)
        )

    with ThreadPool(NUM_THREADS) as pool:
        looks, pixels = zip(*pool.map(look, files.files, chunksize=64), strict=True)
    usable = _usable(files, looks)
    if not data.in_memory:
        return usable
    labels = torch.tensor([label for _, label in usable.files], dtype=torch.long)
    stacked = torch.from_numpy(np.stack([each for each in pixels if each is not None]))
    return Images(stacked.permute(0, 3, 1, 2).contiguous(), labels, usable.classes, usable.dropped)


@register_image_format("synthetic")
def _synthetic(data: ImageData, split: Split, download: bool) -> Images:
    """A light shape on a dark ground per image, somewhere and of some size; the same settings, the same images."""
    _require_classes(data, CATEGORIES)
    number, part = (data.num_train, 0) if split == "train" else (data.num_val, 1)
    pixels = np.empty((number, data.size, data.size, 3), dtype=np.uint8)
    labels = torch.empty(number, dtype=torch.long)
    for index in range(number):
        rng = np.random.default_rng((part, index))
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


@register_image_format("events")
def _events(data: ImageData, split: Split, download: bool) -> Images:
    return _recordings(data, split, getattr(data, split))


@register_image_format("synthetic_events")
def _synthetic_events(data: ImageData, split: Split, download: bool) -> Images:
    draw_classified(data.root, num_train=data.num_train, num_val=data.num_val, size=data.size, seed=0)
    return _recordings(data, split, split)


def _recordings(data: ImageData, split: Split, folder: str) -> Images:
    if data.augment.randaugment:
        raise ValueError(f"data.augment.randaugment {data.augment.randaugment}: it takes pictures, not events")
    share = data.events.train_share
    files, classes = list_recordings(data.root, folder, train=split == "train", classes=data.classes, train_share=share)
    *images, dropped = read_classified(files, classes, data.size, data.events)
    return Images(*images, (*map(printable, _other_classes(data.root / folder, classes)), *dropped))


def read_folder(folder: Path, classes: Sequence[str] = ()) -> ImageFiles:
    """Return the image files of folder/CLASS/*.

    Args:
        folder: of one split.
        classes: class names in label order, other sub-folders are left out; empty: all sub-folders, sorted.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class folders in it, a class without images, or a wanted class that has no folder.
    """
    require_folder(folder, "one folder of images per class, such as train/cat and train/dog")
    found = class_folders(folder)
    if not found:
        raise ValueError(f"{folder}: no class folders in it; expected {folder.name}/CLASS/*.jpg, one folder per class")
    check_classes(classes, found, source=str(folder))
    names = tuple(classes) or tuple(found)
    files: list[tuple[Path, int]] = []
    dropped = _other_classes(folder, names)
    for label, name in enumerate(names):
        inside = list(visible_files(folder / name))
        paths = sorted(filter(is_image, inside))
        others = Counter(path.suffix.lower() or path.name for path in inside if not is_image(path))
        if not paths:
            raise ValueError(f"{folder / name}: no images in it (allowed: {', '.join(EXTENSIONS)})")
        if others:
            number = plural(others.total(), "file")
            dropped.append(f"{folder / name}: {number} without the name of an image ({few(sorted(others))}); left out")
        files += [(path, label) for path in paths]
    return ImageFiles(tuple(files), names, tuple(map(printable, dropped)))


def _other_classes(folder: Path, kept: Sequence[str]) -> list[str]:
    others = [name for name in class_folders(folder) if name not in kept]
    return [f"{folder / name}: not among the classes; left out" for name in others]


def _usable(files: ImageFiles, looks: Sequence[Look]) -> ImageFiles:
    """The files without a problem, a sentence for each other one; refuses if a class has none left."""
    pairs = list(zip(files.files, looks, strict=True))
    kept = tuple(file for file, look in pairs if look.problem is None)
    left_out = [f"{path}: {look.problem}; left out" for (path, _), look in pairs if look.problem is not None]
    notes = [f"{path}: {note}" for (path, _), look in pairs if look.problem is None for note in look.notes]
    left = {label for _, label in kept}
    for label, name in enumerate(files.classes):
        if label not in left:
            first = next(f"{path}: {look.problem}" for (path, other), look in pairs if other == label)
            raise ValueError(f"class {name!r} has no usable image; {len(left_out)} left out, the first: {first}")
    return ImageFiles(kept, files.classes, (*files.dropped, *map(printable, left_out + notes)))


@register_image_format("cifar10")
@register_image_format("cifar100")
def _cifar(data: ImageData, split: Split, download: bool) -> Images:
    if data.size != 32:
        raise ValueError(f"data.size {data.size}: the images of {data.format} have 32 pixels a side")
    kind = CIFAR10 if data.format == "cifar10" else CIFAR100
    try:
        found = kind(str(data.root), train=split == "train", download=download)
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
