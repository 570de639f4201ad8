"""Pictures that visitors give, and examples that the page offers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from detection.cli.film import open_capture, read_frames
from detection.data.events import draw_recordings
from detection.data.image_files import open_image
from detection.data.pictures import pixels_of
from detection.data.synthetic import draw_scene
from detection.files import EVENT_SUFFIXES, is_recording
from detection.predict import Predictor, pictures_of, read_picture
from detection.sources import VIDEO_EXTENSIONS
from detection.tasks.base import Task
from detection.tasks.run import make_accelerator, read_evaluation_data

EXAMPLES = 4


class Source(NamedTuple):
    """A file that was given: an image, a film or a recording of events.

    Attributes:
        path: the file.
        name: as its owner calls it.
        most_pixels: of an image or frame.
    """

    path: Path
    name: str
    most_pixels: int

    @property
    def is_film(self) -> bool:
        """Whether it is a film, by its name."""
        return self.path.suffix.lower() in VIDEO_EXTENSIONS

    def is_long(self, task: Task) -> bool:
        """Return whether it is many pictures to a network of the task."""
        return self.is_film or (is_recording(self.path) and task.windows)

    def pictures(self, task: Task, skip: int = 0) -> Iterator[Tensor]:
        """Yield the pictures as a network of the task takes them, from number `skip` on.

        Raises:
            ModuleNotFoundError, OSError, ValueError: it cannot be read, is too large, or not what the network takes.
        """
        if is_recording(self.path):
            yield from pictures_of(task, self.path, skip)
        elif self.is_film:
            with self._capture(task) as capture:
                capture.set(cv2.CAP_PROP_POS_FRAMES, skip)
                yield from read_frames(capture)
        else:
            with open_image(self.path) as image:  # its header, before a pixel is decoded
                self._require_size(*image.size)
            yield from islice([read_picture(task, self.path)], skip, None)

    def length(self, task: Task) -> int:
        """Return about how many pictures it is to a network of the task; 0: the file does not say."""
        if self.is_film:
            with self._capture(task) as capture:
                return max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        return sum(1 for _ in self.pictures(task)) if self.is_long(task) else 1

    def seconds(self, task: Task) -> float:
        """Return the time between two pictures; 0: the file does not say."""
        if self.is_film:
            with self._capture(task) as capture:
                rate = capture.get(cv2.CAP_PROP_FPS)
            return 1 / rate if rate > 0 else 0.0
        return task.config.data.events.window if self.is_long(task) else 0.0

    @contextmanager
    def _capture(self, task: Task) -> Iterator[cv2.VideoCapture]:
        if getattr(task.config.data, "are_events", False):
            raise ValueError("a film, and the network takes recordings of events")
        capture = open_capture(self.path)
        try:
            if not capture.isOpened():
                raise ValueError("no readable video")
            self._require_size(
                *(int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
            )
            yield capture
        finally:
            capture.release()

    def _require_size(self, width: int, height: int) -> None:
        if width * height > self.most_pixels:
            raise ValueError(f"{width}x{height} pixels; at most {self.most_pixels:,} pixels are taken here")


def examples_of(predictor: Predictor, folder: Path) -> list[Path]:
    """Return files of what the network knows: evaluation images of its run, or drawn scenes, written into `folder`.

    A network of events has recordings: those of its evaluation data, or drawn ones.
    """
    folder.mkdir(parents=True)
    data = predictor.run.config.data
    if getattr(data, "are_events", False):
        found = [
            path
            for split in ([data.val] if isinstance(data.val, str) else data.val)  # a classifier has one
            for path in sorted((data.root / split).rglob("*"))
            if path.suffix.lower() in EVENT_SUFFIXES
        ]
        if not found:
            draw_recordings(folder / "drawn", num_train=1, num_val=EXAMPLES, size=128, seed=0)
            found = sorted((folder / "drawn" / "val").glob("*.dat"))
        return found[:EXAMPLES]
    images = _evaluation_images(predictor)
    if not images:
        images = [draw_scene(256, 4, np.random.default_rng(seed)).image for seed in range(EXAMPLES)]
    paths = [folder / f"{number}.png" for number in range(1, len(images) + 1)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def _evaluation_images(predictor: Predictor) -> list[np.ndarray]:
    """Return images spread over the evaluation data, (H, W, 3) uint8; none where the data are not at hand."""
    with suppress(OSError, ValueError, ImportError):
        chosen, predictor.task.config.data.workers = read_evaluation_data(predictor.run, EXAMPLES), 0
        accelerator = make_accelerator(predictor.run.config)
        batches = predictor.task.evaluation_batches(chosen, accelerator)
        return [pixels_of(image.cpu()) for images, _ in batches for image in images]
    return []
