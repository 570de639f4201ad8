"""Predictions of the frames of videos and cameras."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from detection.cli.pictures import Output, Session, in_batches
from detection.data.pictures import read_image
from detection.tasks.predictions import AnyPrediction


class VideoOutput:
    """The drawn frames of one video, written as they come.

    Args:
        output: the files of the call.
        stem: of the file's name.
        rate: frames per second, as the source has it.

    Attributes:
        entry: what images.json says of the file, once there is one.
    """

    def __init__(self, output: Output, stem: str, rate: float) -> None:
        self.output, self.stem = output, stem
        self.rate = rate if math.isfinite(rate) and rate > 0 else 25.0  # many cameras do not say
        self.entry: dict[str, str] = {}
        self._writer: cv2.VideoWriter | None = None

    def write(self, picture: np.ndarray) -> None:
        """Append a frame (H, W, 3), RGB; all are of one size.

        Raises:
            OSError: OpenCV cannot write MPEG-4 here.
        """
        if self._writer is None:
            path, code = self.output.free_name(self.stem, ".mp4"), cv2.VideoWriter_fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(path), code, self.rate, picture.shape[1::-1])
            if not self._writer.isOpened():
                raise OSError(f"{path}: OpenCV cannot write MPEG-4 videos here; --no-images writes the boxes alone")
            self.entry = {"drawn": path.name}
        self._writer.write(np.ascontiguousarray(picture[:, :, ::-1]))

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()


def film(source: str, session: Session, advance: Callable[[], None]) -> str | None:
    """Take in every frame of a video or camera, drawn as a video; return a sentence, None if nothing was read.

    Args:
        source: file, or number of a camera.
        session: makes the predictions; its `failures` get a sentence about what could not be read.
        advance: called after each frame.
    """
    camera = source.isdecimal() and not Path(source).exists()
    name = f"camera {source}" if camera else source
    # OpenCV and FFmpeg write lines of their own about what is said in one sentence here.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    capture = cv2.VideoCapture(int(source) if camera else source)
    if not capture.isOpened():
        session.failures.append(
            f"{name}: {'no such camera, or it cannot be opened' if camera else 'no readable video'}"
        )
        return None
    # As the header has it; negative or 0 if it does not, as for a camera.
    expected = 0 if camera else int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    stem, found = f"camera{source}" if camera else Path(source).stem, session.output.num_found
    video = VideoOutput(session.output, stem, capture.get(cv2.CAP_PROP_FPS))
    number = 0
    try:
        # The pictures of a camera are drawn at once, whatever the batch size.
        for frames in in_batches(read_frames(capture), 1 if camera else session.asked["batch_size"]):
            for prediction in session.predict(frames):
                add_frame(prediction, number, source, Path(name).name, video)
                number += 1
                advance()
    except KeyboardInterrupt:
        if not camera:  # which has no other end
            raise
    finally:
        capture.release()
        video.close()
    if not number:
        session.failures.append(f"{name}: not one frame could be read")
        return None
    if number < expected - 1:  # where the header has no count, OpenCV's estimate may be one too many
        session.failures.append(
            f"{name}: cut off or damaged, {number} of {expected} frames could be read; these are kept"
        )
    total = session.output.num_found
    return f"{name}: {number} frames" + ("" if total is None else f", {total - (found or 0)} detections")


def add_frame(prediction: AnyPrediction, number: int, source: str, title: str, video: VideoOutput) -> None:
    """Take in one frame; the first one with its spike maps, where they were asked for."""
    output = video.output
    if output.draw:
        video.write(np.asarray(prediction.draw()))
    if output.spikes and number == 0:
        output.save_spikes(prediction, video.stem, f"{title}, first frame")
    output.add(prediction, source, frame=number, **video.entry)


def read_frames(capture: cv2.VideoCapture) -> Iterator[Tensor]:
    """Yield the frames of a video, RGB (3, H, W) uint8, up to its end or the first one that cannot be read."""
    while True:
        found, frame = capture.read()
        if not found:
            return
        yield read_image(frame[:, :, ::-1])
