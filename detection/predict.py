"""Predictions of a saved run on any image."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detection.data.events.files import read_recording, read_windows
from detection.data.pictures import Channels, ImageLike, read_image
from detection.files import is_recording, kind_of
from detection.runs import Run, Weights
from detection.sources import files_of
from detection.spikemaps import SpikeMap, spike_maps
from detection.tasks import task_of
from detection.tasks.base import Task
from detection.tasks.predictions import AnyPrediction, in_batches
from detection.tasks.run import load_model
from detection.text import require_whole
from detection.training.precision import autocast


class Predictor:
    """A saved network, ready to be asked.

    Args:
        run: the run.
        weights: "last", "best" or "ema".
        device: such as "cpu" or "cuda:0"; None: the first GPU, if there is one.

    Attributes:
        task: of the run's recipe.
        model: a torchvision detector or a `backbones.Classifier`, in evaluation mode.
        class_names: of all classes; label 1 of a detector is class_names[0], as label 0 of a classifier is.

    Raises:
        FileNotFoundError: no such run or weights.
        ValueError: the weights are damaged or do not fit, or there is no such device.
    """

    def __init__(self, run: Run, weights: Weights = "last", device: str | torch.device | None = None) -> None:
        self.run, self.task = run, task_of(run.config)
        self.device = choose_device(device)
        self.model = load_model(run, weights).to(self.device)
        self.task.attach(run)
        self.class_names = tuple(run.config.data.classes)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options of `predict` that the task has, such as "score_threshold"."""
        return options_of(self.task)

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        batch_size: int = 8,
        channels: Channels = "rgb",
        **options: Any,
    ) -> AnyPrediction | list[AnyPrediction]:
        """Return what the network makes of an image, or a list of that for several; see `predict_images`.

        Args:
            images: path, array, PIL image or tensor, a list of these, a folder or a glob.
            batch_size: images at a time.
            channels: order of the colours in arrays and tensors; "bgr" is OpenCV's.
            options: a detector's: score_threshold=0.3, nms_threshold (the recipe's).
        """
        precision = autocast(self.run.config.train.precision, self.device)
        options |= {"batch_size": batch_size, "channels": channels, "precision": precision}
        return predict_images(self.task, self.model, images, **options)

    def __repr__(self) -> str:
        return f"Predictor({self.run.address!r}: {self.task.describe()}, on {self.device})"

    def spike_maps(self, image: ImageLike) -> list[SpikeMap]:
        """Return where the network fires on what it sees of an image; empty for a network without spike layers."""
        with autocast(self.run.config.train.precision, self.device):
            return spike_maps(self.model, self.task.prepare(self.model, read_picture(self.task, image)))


def options_of(task: Task) -> tuple[str, ...]:
    """Return the names of the options of a task's `predict` that a caller may choose."""
    given = ("model", "pictures", "batch_size", "precision")
    return tuple(name for name in inspect.signature(task.predict).parameters if name not in given)


def predict_images(
    task: Task,
    model: nn.Module,
    images: ImageLike | Sequence[ImageLike],
    *,
    batch_size: int = 8,
    channels: Channels = "rgb",
    precision: AbstractContextManager = contextlib.nullcontext(),  # noqa: B008, it has no state
    **options: Any,
) -> AnyPrediction | list[AnyPrediction]:
    """Return what a network makes of an image, or a list of that for a list, a folder or a glob.

    A detector gives `Prediction`s, a classifier `ClassPrediction`s.

    Args:
        task: of the network.
        model: the network, in evaluation mode.
        images: one image or a list of them: path, array, PIL image or tensor, see `read_image`; or a folder of images,
            or a glob such as "shots/*.png". All are in memory together; `hoyer-det predict` takes any number. For a
            network of events a path is that of a recording, which alone gives a detector's predictions for each of its
            windows.
        batch_size: images at a time; fewer where they are large.
        channels: "rgb", or "bgr" for arrays and tensors as OpenCV has them.
        precision: context of the passes.
        options: of the task: score_threshold and nms_threshold, a detector's; see `Task.predict`.

    Raises:
        ValueError: an image that cannot be read, an option that the task does not have or a value out of range.
    """
    require_whole("batch_size", batch_size)
    allowed = options_of(task)
    for name in options:
        if name not in allowed:
            raise ValueError(f"{name}: no option of {task.name} (allowed: {', '.join(allowed) or 'none'})")
    images = _expand(images)
    if is_recording(images) and task.windows:
        path = Path(images)
        batches = in_batches(pictures_of(task, path), batch_size, Tensor.numel)
        found = [task.predict(model, each, batch_size=batch_size, precision=precision, **options) for each in batches]
        return [dataclasses.replace(each, path=path) for each in itertools.chain(*found)]
    several = isinstance(images, (list, tuple))
    items = list(images) if several else [images]
    places = [f"image at index {index}: " if several else "" for index in range(len(items))]
    pictures = [_read(task, item, place, channels) for item, place in zip(items, places, strict=True)]
    found = task.predict(model, pictures, batch_size=batch_size, precision=precision, **options)
    paths = [Path(item) if isinstance(item, (str, Path)) else None for item in items]
    named = [dataclasses.replace(each, path=path) for each, path in zip(found, paths, strict=True)]
    return named if several else named[0]


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the device of that name; None: the first GPU, if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device).cpu()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {str(device)!r}: not usable here, {reason} (allowed: cpu, cuda, cuda:0, ...)"
        ) from None


def pictures_of(task: Task, path: Path, skip: int = 0) -> Iterator[Tensor]:
    """Yield the images that a recording of events is to a network of the task, in the order of time, from `skip` on.

    Raises:
        OSError, ModuleNotFoundError, ValueError: it cannot be read, or the network takes no events.
    """
    data = task.config.data
    if not getattr(data, "are_events", False):
        raise ValueError(f"{path}: a recording of events, and {task.name} of {data.format} data takes images")
    if task.windows:
        return read_windows(path, data.events, skip)
    return iter([read_recording(path, data.size, data.events)][skip:])


def read_picture(task: Task, image: ImageLike, channels: Channels = "rgb") -> Tensor:
    """Return an image as a network of the task takes it, before it is resized; see `read_image`.

    Raises:
        OSError, ModuleNotFoundError, ValueError: it cannot be read, or is none for this network.
    """
    if is_recording(image):
        pictures = pictures_of(task, Path(image))
        if task.windows:
            raise ValueError(f"{image}: a recording, which is many images to {task.name}; it is predicted on alone")
        return next(pictures)
    return read_image(image, channels, getattr(task.config.data, "channels", 3))


def _expand(images: ImageLike | Sequence[ImageLike]) -> ImageLike | Sequence[ImageLike]:
    """Return the files of a folder or glob in their order, anything else as it is."""
    if not isinstance(images, (str, Path)):
        return images
    kind, failures = kind_of(images), []
    if kind != "a folder" and not (kind == "no such file" and glob.has_magic(str(images))):
        return images
    files = files_of(str(images), failures)
    if failures:
        raise ValueError("; ".join(failures))
    return files


def _read(task: Task, image: ImageLike, place: str, channels: Channels) -> Tensor:
    try:
        return read_picture(task, image, channels)
    except ValueError as error:
        raise ValueError(f"{place}{error}") from error
