"""Recordings of one object each, in the files that their publishers ship: the only file that knows tonic.

| set | file | layout |
|---|---|---|
| N-CARS | .dat | `n-cars_train/cars/*.dat` |
| N-MNIST | .bin | `Train/0/*.bin` |
| N-Caltech101 | .bin | `Caltech101/accordion/*.bin`, no split |
| DVS-CIFAR10 | .aedat | `airplane/*.aedat`, no split |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from detection.config.schema import Events
from detection.data.events.frames import Size, events_to_frames, frames_to_pixels
from detection.data.events.prophesee import EVENT, Recording
from detection.data.records import NUM_THREADS, check_classes, class_folders, require_folder
from detection.files import EVENT_SUFFIXES as SUFFIXES
from detection.text import plural, printable

DVS128 = (128, 128)  # the sensor of DVS-CIFAR10: its files do not say


def read_events(path: Path) -> tuple[np.ndarray, Size]:
    """Return all events of a recording, and height and width of its sensor: where no file says, of what has events.

    Shape: (M,) of `EVENT`.

    Raises:
        OSError: the file cannot be read.
        ModuleNotFoundError: tonic, which reads .bin and .aedat files, is not installed.
        ValueError: the file is empty, cut off, of another format, without events, or its clock jumps backwards.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: no file of events (allowed: {', '.join(SUFFIXES)})")
    length = path.stat().st_size
    if length == 0:
        raise ValueError(f"{path}: an empty file, 0 bytes")
    size: Size | None = None
    if suffix == ".dat":
        recording = Recording(path)
        events = np.concatenate(list(recording.chunks()))
        if recording.height is not None and recording.width is not None:
            size = recording.height, recording.width
    elif suffix == ".bin":
        if length % 5:
            raise ValueError(f"{path}: cut off, or no .bin file: {length} bytes are no multiple of the 5 of an event")
        tonic = _import_tonic(path)
        found = tonic.read_mnist_file(str(path), dtype=tonic.events_struct)  # it fills the fields by their order
        events = np.empty(len(found), EVENT)
        for name in EVENT.names:
            events[name] = found[name]
    else:
        events, size = _read_dvs128(path, length), DVS128
    if not len(events):
        raise ValueError(f"{path}: no events")
    backwards = np.flatnonzero(np.diff(events["t"]) < 0)
    if len(backwards):
        before, after = events["t"][backwards[0] :][:2]
        raise ValueError(f"{path}: the clock jumps backwards, from {before} to {after} microseconds")
    return events, size or (int(events["y"].max()) + 1, int(events["x"].max()) + 1)


def read_recording(path: Path, size: int, settings: Events) -> Tensor:
    """Return the image of a whole recording.

    Shape: (2 steps, size, size) uint8.

    Raises:
        OSError, ModuleNotFoundError, ValueError: see `read_events`, or an event lies outside of the sensor.
    """
    with named(path):
        events, sensor = read_events(path)
        frames = events_to_frames(events, settings.sensor or sensor, settings.steps, settings.by)
    return frames_to_pixels(frames, (size, size), settings.full)


def read_windows(path: Path, settings: Events, skip: int = 0) -> Iterator[Tensor]:
    """Yield the images of a recording, one for each `settings.window` seconds, in the order of time, but the first few.

    A .dat file is read window by window: memory holds one of them, however long it is.

    Shape: (2 steps, height, width) uint8 each.

    Raises:
        OSError, ModuleNotFoundError, ValueError: see `read_events`, or an event lies outside of the sensor.
    """
    length = round(1e6 * settings.window)
    if path.suffix.lower() == ".dat":
        recording = Recording(path)
        size, start, end = (recording.height, recording.width), recording.start, recording.end
        between = recording.between
    else:
        events, size = read_events(path)
        start, end = int(events["t"][0]), int(events["t"][-1])

        def between(start: int, end: int) -> np.ndarray:
            return events[slice(*np.searchsorted(events["t"], (start, end)))]

    if settings.sensor is None and None in size:
        raise ValueError(f"{path}: its header has no size of the sensor; the recipe has no data.events.sensor either")
    for first in range(start + skip * length, end + 1, length):
        window = (first, first + length)
        with named(path):
            frames = events_to_frames(between(*window), settings.sensor or size, settings.steps, settings.by, window)
        yield frames_to_pixels(frames, settings.sensor or size, settings.full)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Name the file in errors that do not."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def list_recordings(
    root: Path, split: str, *, train: bool, classes: Sequence[str] = (), train_share: float = 0.9
) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """Return path and label of every recording of root/SPLIT/CLASS/*, and the classes in the order of the labels.

    Args:
        root: of the data set.
        split: folder of the split; "" for a set without, of whose classes each gives the first `train_share` of its
            recordings, in the order of the numbers in their names, to the training split and the others to validation.
        train: which of the two.
        classes: names in label order, other folders are left out; empty: all folders, sorted.
        train_share: of recordings, in (0, 1).

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class folders, a class without recordings, in the set or in the part, or a wanted class that has
            no folder.
    """
    folder = require_folder(root / split, "one folder of recordings per class, such as train/cars")
    found = class_folders(folder)
    if not found:
        raise ValueError(f"{folder}: no class folders in it; expected {folder.name}/CLASS/*{SUFFIXES[0]}")
    check_classes(classes, found, source=str(folder))
    names = tuple(classes) or tuple(found)
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(names):
        paths = [path for path in (folder / name).glob("[!.]*") if path.suffix.lower() in SUFFIXES]
        paths.sort(key=lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)])
        if not paths:
            raise ValueError(f"{folder / name}: no recordings in it (allowed: {', '.join(SUFFIXES)})")
        if not split:
            number = len(paths)
            first = round(train_share * number)
            paths = paths[:first] if train else paths[first:]
            if not paths:
                part = "training" if train else "validation"
                raise ValueError(
                    f"{folder / name}: data.events.train_share {train_share:g} of {plural(number, 'recording')} leaves "
                    f"none for {part}"
                )
        files += [(path, label) for path in paths]
    return files, names


def read_classified(
    files: Sequence[tuple[Path, int]], classes: tuple[str, ...], size: int, settings: Events
) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]:
    """Return pixels, labels and classes of recordings, and a sentence for each that cannot be used and is left out.

    Args:
        files: path and label of each, as `list_recordings` gives them.
        classes: names in label order.
        size: side of an image in pixels, whatever the sensor's shape.
        settings: steps, scale and sensor.

    Shape: pixels (N, 2 steps, size, size) uint8, labels (N,) int64.

    Raises:
        ModuleNotFoundError: tonic, which these files need, is not installed.
        ValueError: a class has no usable recording.
    """

    def read(file: tuple[Path, int]) -> Tensor | str:
        try:
            return read_recording(file[0], size, settings)
        except (OSError, ValueError) as error:
            return printable(f"{error}; recording left out")

    with ThreadPool(NUM_THREADS) as pool:
        found = pool.map(read, files, chunksize=16)
    labels = [label for (_, label), image in zip(files, found, strict=True) if not isinstance(image, str)]
    dropped = tuple(image for image in found if isinstance(image, str))
    for label, name in enumerate(classes):
        if label not in labels:
            first = next(each for each, (_, other) in zip(found, files, strict=True) if other == label)
            raise ValueError(f"class {name!r} has no usable recording; the first: {first}")
    pixels = torch.stack([image for image in found if not isinstance(image, str)])
    return pixels, torch.tensor(labels), classes, dropped


def _read_dvs128(path: Path, length: int) -> np.ndarray:
    """Events of a jAER file, AEDAT 2.0: lines that begin with "#", then 8 bytes per event, big-endian.

    They are an address and microseconds. Bits 1 to 7 of the address, and 8 to 14, are where it was; turned so that the
    pictures of DVS-CIFAR10 stand upright. Bit 0 is 0 where it became brighter.
    """
    with path.open("rb") as file:
        if not file.readline(100).startswith(b"#!AER-DAT2"):
            raise ValueError(f"{path}: no .aedat file of version 2: it does not begin with '#!AER-DAT2'")
        start = file.tell()
        while file.readline().startswith(b"#"):
            start = file.tell()
    number, rest = divmod(length - start, 8)
    if rest:
        raise ValueError(f"{path}: cut off in the middle of an event, {rest} bytes behind {number} whole ones")
    stored = _import_tonic(path).get_aer_events_from_file(str(path), 2.0, start)
    events = np.empty(number, EVENT)
    address = stored["address"]
    events["t"], events["p"] = stored["timeStamp"], 1 - (address & 1)
    events["x"], events["y"] = 127 - (address >> 8 & 0x7F), 127 - (address >> 1 & 0x7F)
    return events


def _import_tonic(path: Path) -> ModuleType:
    try:
        import tonic.io
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: tonic, which reads {path.suffix} files, is missing ({error}); pip install hoyer-det[events]"
        ) from None
    return tonic.io
