"""Predictions of the frames of films and cameras, and of the windows of recordings."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from detection.cli.call import Call
from detection.data.pictures import read_image
from detection.files import is_recording
from detection.predict import pictures_of
from detection.sources import is_camera
from detection.tasks.base import Task
from detection.tasks.predictions import in_batches


class FilmOutput:
    """The drawn frames of one film, written as they come.

    Args:
        path: the file; it is there once this is closed, with the frames so far.
        rate: frames per second, as the source has it.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path = path
        self.rate = rate if math.isfinite(rate) and rate > 0 else 25.0  # many cameras do not say
        self._writer: cv2.VideoWriter | None = None
        self._place = tempfile.TemporaryDirectory()

    def write(self, picture: np.ndarray) -> None:
        """Append a frame (H, W, 3), RGB; all are of one size.

        Raises:
            OSError: OpenCV cannot write MPEG-4 here.
        """
        if self._writer is None:
            part = Path(plain_path(self.path.parent, self._place.name), ".film.mp4")
            writer = cv2.VideoWriter(str(part), cv2.VideoWriter_fourcc(*"mp4v"), self.rate, picture.shape[1::-1])
            if not writer.isOpened():
                raise OSError(f"{self.path}: OpenCV cannot write MPEG-4 films here; --no-images writes the boxes alone")
            self._writer = writer
        self._writer.write(np.ascontiguousarray(picture[:, :, ::-1]))

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()
            os.replace(self.path.with_name(".film.mp4"), self.path)
        self._place.cleanup()


def plain_path(path: Path, place: str) -> str:
    """Return another path to a file or folder, in plain letters.

    OpenCV and FFmpeg take "%", ":" and bytes that are no UTF-8 for something else than a part of a name.

    Args:
        path: the path.
        place: an empty folder, for a link.
    """
    link = Path(place, f"link{path.suffix if path.suffix.isascii() else ''}")
    try:
        link.symlink_to(path.absolute())
    except OSError:  # no links here
        return str(path)
    return str(link)


def open_capture(source: Path | int) -> cv2.VideoCapture:
    """Return a film, or the camera of a number, as OpenCV opens it; whether it could is its `isOpened`."""
    # OpenCV and FFmpeg write lines of their own about what is said in one sentence elsewhere.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    with tempfile.TemporaryDirectory() as place:
        return cv2.VideoCapture(source if isinstance(source, int) else plain_path(source, place))


def film(source: str, call: Call, advance: Callable[[], None]) -> str | None:
    """Take in every frame of a film or camera, drawn as a film; return a sentence, None if nothing was read.

    The frames of a recording of events are the pictures of its windows.

    Args:
        source: file, or number of a camera.
        call: makes the predictions; its `failures` get a sentence about what could not be read.
        advance: called after each frame.
    """
    if is_recording(source):
        task = call.predictor.task
        windows = read_windows(task, Path(source), call.failures)
        return take_in(windows, source, call, advance, 1 / task.config.data.events.window)
    camera = is_camera(source)
    name = f"camera {source}" if camera else source
    if getattr(call.predictor.task.config.data, "are_events", False):
        call.failures.append(f"{name}: a film, and the network takes recordings of events")
        return None
    capture = open_capture(int(source) if camera else Path(source))
    if not capture.isOpened():
        reason = "no such camera, or it cannot be opened" if camera else "no readable video"
        call.failures.append(f"{name}: {reason}")
        return None
    # As the header has it; negative or 0 if it does not, as for a camera.
    expected = 0 if camera else int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    try:
        return take_in(read_frames(capture), source, call, advance, capture.get(cv2.CAP_PROP_FPS), expected)
    finally:
        capture.release()


def take_in(
    pictures: Iterator[Tensor], source: str, call: Call, advance: Callable[[], None], rate: float, expected: int = 0
) -> str | None:
    """Take in all pictures of a source; see `film`.

    Args:
        pictures: in the order of time.
        source, call, advance: of `film`.
        rate: pictures per second, as the source has it.
        expected: pictures that the source says it has.
    """
    camera = is_camera(source)
    name = f"camera {source}" if camera else source
    output, names, failed = call.output, [], len(call.failures)
    stem, found = f"camera{source}" if camera else Path(source).stem, output.num_found
    number, drawn, more = 0, None, {}
    try:
        # The pictures of a camera are drawn at once, whatever the batch size.
        size = 1 if camera else call.options["batch_size"]
        for frames in in_batches(pictures, size, lambda frame: frame[0].numel()):
            predictions = call.predict(frames, [f"{name}: frame {number + step}" for step in range(len(frames))])
            for picture, prediction in zip(frames, predictions, strict=True):
                if prediction is not None:
                    if call.draw:
                        if drawn is None:
                            drawn = FilmOutput(output.free_name(stem, ".mp4"), rate)
                            more, names = {"drawn": drawn.path.name}, [drawn.path.name]
                        drawn.write(np.asarray(prediction.draw()))
                    if number == 0 and call.spikes:
                        names.append(call.save_spikes(prediction, picture, stem, f"{Path(name).name}, first frame"))
                    output.add(prediction, source, frame=number, **more)
                number += 1
                advance()
    except KeyboardInterrupt:
        if not camera:  # which has no other end
            raise
    finally:
        if drawn is not None:
            drawn.close()
    if not number and len(call.failures) > failed:  # which say why
        return None
    if not number:
        call.failures.append(f"{name}: not one frame could be read")
        return None
    if number < expected - 1:  # where the header has no count, OpenCV's estimate may be one too many
        call.failures.append(f"{name}: cut off or damaged, {number} of {expected} frames could be read; these are kept")
    output.finish(source, names)
    total = output.num_found
    return f"{name}: {number} frames" + ("" if total is None else f", {total - (found or 0)} detections")


def read_windows(task: Task, path: Path, failures: list[str]) -> Iterator[Tensor]:
    """Yield the pictures of a recording of events, up to its end or where it is damaged, which `failures` gets."""
    try:
        yield from pictures_of(task, path)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        failures.append(str(error))


def read_frames(capture: cv2.VideoCapture) -> Iterator[Tensor]:
    """Yield the frames of a film, RGB (3, H, W) uint8, up to its end or the first one that cannot be read."""
    while True:
        try:
            found, frame = capture.read()
        except cv2.error:  # of damage
            return
        if not found:
            return
        yield read_image(frame[:, :, ::-1])
