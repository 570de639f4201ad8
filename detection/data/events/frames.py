"""Frames of events, and the boxes that belong to one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]  # height, width
By = Literal["time", "count"]


def events_to_frames(
    events: np.ndarray, size: Size, steps: int, by: By = "time", window: tuple[int, int] | None = None
) -> Tensor:
    """Return how many events each pixel had in each time step: channel 0 those that became darker, 1 brighter.

    Args:
        events: (M,) with the fields t, x, y, p, in the order of time.
        size: height and width of the sensor in pixels.
        steps: T.
        by: "time": steps of the same length, in `window`; "count": of the same number of events, up to one.
        window: start, and end that is no part of it, in microseconds; None: from the first event to the last.

    Shape: (T, 2, height, width) float32.

    Raises:
        ValueError: an event lies outside of the sensor or the window, or an argument is none of those allowed.
    """
    (height, width), number = size, len(events)
    if steps < 1 or by not in ("time", "count"):
        raise ValueError(f"steps {steps}, by {by!r}: expected at least one step, by 'time' or 'count'")
    if not number:
        return torch.zeros(steps, 2, height, width)
    x, y, t = (events[name].astype(np.int64) for name in ("x", "y", "t"))
    start, end = (int(t[0]), int(t[-1]) + 1) if window is None else window
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    if outside.any():
        first = np.flatnonzero(outside)[0]
        raise ValueError(f"an event at x {x[first]}, y {y[first]} lies outside of a sensor of {width}x{height}")
    if t.min() < start or t.max() >= end:
        raise ValueError(f"events from {t.min()} to {t.max()} microseconds reach out of the window {start} to {end}")
    step = (t - start) * steps // (end - start) if by == "time" else np.arange(number) * steps // number
    places = ((step * 2 + (events["p"] > 0)) * height + y) * width + x
    counts = np.bincount(places, minlength=steps * 2 * height * width)
    return torch.from_numpy(counts.astype(np.float32).reshape(steps, 2, height, width))


def frames_to_pixels(frames: Tensor, size: Size, full: float) -> Tensor:
    """Return frames as an image with a channel per step and polarity, in that order: 255 from `full` events on.

    Another size than the frames' is made by averaging over areas: `full` events are then those of a sensor's pixel.

    Shape: (T, 2, H, W) float32 -> (2 T, *size) uint8.
    """
    if tuple(frames.shape[-2:]) != tuple(size):
        frames = F.interpolate(frames, size, mode="area")
    return (255 * (frames / full).clamp(max=1)).round().byte().flatten(0, 1)


def filter_boxes(boxes: np.ndarray, skip: float = 0.5, min_diagonal: float = 30, min_side: float = 10) -> np.ndarray:
    """Return the boxes that the benchmark of GEN1 counts (Perot et al., arXiv:2009.13436).

    Those of the first `skip` seconds are left out, when a network has seen little yet, and those whose diagonal is
    below `min_diagonal` or a side below `min_side` pixels: 30 and 10 for GEN1 (304x240), 60 and 20 for the 1 Megapixel
    set. As in Prophesee's toolbox, time counts from 0, not from the first box; a box at a limit is kept, one at `skip`
    is not.
    """
    width, height = boxes["w"].astype(np.float64), boxes["h"].astype(np.float64)
    large = (width**2 + height**2 >= min_diagonal**2) & (width >= min_side) & (height >= min_side)
    return boxes[large & (boxes["t"] > 1e6 * skip)]


def label_times(boxes: np.ndarray, tolerance: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (time of a frame in microseconds, its boxes) for boxes in the order of time.

    A frame's time is that of its last box; its boxes are all up to `tolerance` microseconds after its first, the last
    one of a track alone (`track_id`).
    """
    first = 0
    while first < len(boxes):
        behind = int(np.searchsorted(boxes["t"], boxes["t"][first] + tolerance, side="right"))
        group = boxes[first:behind]
        last = {track: index for index, track in enumerate(group["track_id"].tolist())}
        tracked = group["track_id"].any() and group["t"][0] < group["t"][-1]  # files without tracks have 0 throughout
        yield int(group["t"][-1]), group[sorted(last.values())] if tracked else group
        first = behind
