"""Prophesee's files, as of the GEN1 and 1 Megapixel sets: events (.dat), read in slices of time, and boxes (.npy).

A .dat file, little-endian (docs.prophesee.ai, "DAT File Format"):

- header: lines that begin with "% ", such as "% Version 2", "% Width 304", "% Height 240"; older files lack the size;
- a byte with the type of the events, 0 (Event2D) or 12 (EventCD), and one with their size, 8;
- 8 bytes per event: uint32 microseconds since the start, then a uint32 with x in bits 0 to 13, y in bits 14 to 27 and
  the polarity in the 4 bits above: 1 where it became brighter, 0 where darker.

A box file is a structured array with a row per box: t microseconds, x and y of the upper left corner, w and h in
pixels, class_id from 0, track_id, class_confidence. GEN1 spells two of them as in `OLD_NAMES`.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

EVENT = np.dtype([("t", "<i8"), ("x", "<u2"), ("y", "<u2"), ("p", "u1")])
BOX = np.dtype(
    [
        *[("t", "<i8"), ("x", "<f4"), ("y", "<f4"), ("w", "<f4"), ("h", "<f4")],
        *[("class_id", "<u4"), ("track_id", "<u4"), ("class_confidence", "<f4")],
    ]
)
OLD_NAMES = {"t": "ts", "class_confidence": "confidence"}
CHUNK = 1 << 20  # events of a pass over a whole recording

_STORED = np.dtype([("t", "<u4"), ("xyp", "<u4")])
_TYPES = (0, 12)
_MOST = 1 << 14  # bytes of a header


class Recording:
    """The events of a .dat file. Nothing is kept of them: memory holds what one call returns.

    Attributes:
        path: the file.
        width, height: of the sensor in pixels; None where the header does not say.
        num_events: in the file.
        start, end: microseconds of the first and of the last event.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, no .dat file, cut off, has no events, or ends before it starts.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with self.path.open("rb", buffering=0) as file:
            self.width, self.height = self._read_header(file)
            self._offset = file.tell()
            self.num_events, rest = divmod(file.seek(0, os.SEEK_END) - self._offset, _STORED.itemsize)
            if rest:
                raise ValueError(
                    f"{self.path}: cut off in the middle of an event, {rest} bytes behind {self.num_events} whole ones"
                )
            if not self.num_events:
                raise ValueError(f"{self.path}: a header without events")
            self.start, self.end = self._time(file, 0), self._time(file, self.num_events - 1)
        if self.end < self.start:
            raise ValueError(self._jump(self.start, self.end))

    def between(self, start: int, end: int) -> np.ndarray:
        """Return the events with start <= t < end, microseconds, found by bisection.

        Shape: (M,) of `EVENT`.

        Raises:
            ValueError: the clock jumps backwards among them, or one lies outside of the sensor.
        """
        with self.path.open("rb", buffering=0) as file:
            places = range(self.num_events)
            first, behind = (bisect_left(places, t, key=lambda index: self._time(file, index)) for t in (start, end))
            return self._read(file, first, behind - first)

    def chunks(self, number: int = CHUNK) -> Iterator[np.ndarray]:
        """Yield all events in order, so many at a time; see `between`."""
        before = self.start
        with self.path.open("rb", buffering=0) as file:
            for first in range(0, self.num_events, number):
                events = self._read(file, first, min(number, self.num_events - first))
                if events["t"][0] < before:
                    raise ValueError(self._jump(before, events["t"][0]))
                before = events["t"][-1]
                yield events

    def _read_header(self, file: BinaryIO) -> tuple[int | None, int | None]:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError(f"{self.path}: an empty file, 0 bytes")
        size: dict[str, int] = {}
        lines = _header_lines(file)
        for line in lines:
            words = line.split()
            if len(words) > 2 and words[1] in ("Width", "Height") and words[2].isdecimal():
                size[words[1]] = int(words[2])
        kind = file.read(2)
        if not lines or len(kind) < 2 or kind[0] not in _TYPES or kind[1] != _STORED.itemsize:
            raise ValueError(
                f"{self.path}: no .dat file of events; expected lines that begin with '% ', then the type 0 or 12 and "
                f"the size {_STORED.itemsize} of the events"
            )
        return size.get("Width"), size.get("Height")

    def _time(self, file: BinaryIO, index: int) -> int:
        file.seek(self._offset + index * _STORED.itemsize)
        return int.from_bytes(file.read(4), "little")

    def _read(self, file: BinaryIO, first: int, number: int) -> np.ndarray:
        file.seek(self._offset + first * _STORED.itemsize)
        stored = np.fromfile(file, _STORED, max(0, number))
        events = np.empty(len(stored), EVENT)
        events["t"] = stored["t"]
        events["x"], events["y"] = stored["xyp"] & 0x3FFF, stored["xyp"] >> 14 & 0x3FFF
        events["p"] = stored["xyp"] >> 28 & 1
        backwards = np.flatnonzero(stored["t"][1:] < stored["t"][:-1])
        if len(backwards):
            raise ValueError(self._jump(*stored["t"][backwards[0] :][:2]))
        if self.width is not None and self.height is not None and len(events):
            x, y = events["x"].max(), events["y"].max()
            if x >= self.width or y >= self.height:
                raise ValueError(f"{self.path}: events up to x {x}, y {y} of a sensor of {self.width}x{self.height}")
        return events

    def _jump(self, before: int, after: int) -> str:
        return f"{self.path}: the clock jumps backwards, from {before} to {after} microseconds"


def write_events(path: Path, chunks: Iterable[np.ndarray], *, width: int, height: int) -> None:
    """Write a .dat file of the events of all chunks, each (M,) of `EVENT`.

    Raises:
        ValueError: events are not in the order of time, their time does not go into 32 bits, or they lie outside of the
            sensor, whose sides have at most 2^14 pixels.
    """
    before = 0
    with Path(path).open("wb") as file:
        # No date: the same events give the same bytes.
        file.write(
            f"% Data file containing Event2D events.\n% Version 2\n% Height {height}\n% Width {width}\n".encode()
        )
        file.write(bytes((0, _STORED.itemsize)))
        for events in chunks:
            times = np.concatenate([[before], events["t"]])
            if (np.diff(times) < 0).any() or times[-1] >= 1 << 32:
                raise ValueError(f"{path}: times must not fall, and end before 2^32 microseconds")
            for axis, side in (("x", width), ("y", height)):
                if not 0 < side <= 1 << 14 or events[axis].max(initial=0) >= side:
                    raise ValueError(f"{path}: {axis} must lie in 0 to {side - 1}, and {side} in 1 to {1 << 14}")
            stored = np.empty(len(events), _STORED)
            stored["t"] = events["t"]
            x, y, p = (events[name].astype(np.uint32) for name in ("x", "y", "p"))
            stored["xyp"] = x | y << 14 | (p > 0).astype(np.uint32) << 28
            stored.tofile(file)
            before = times[-1]


def read_boxes(path: Path) -> np.ndarray:
    """Return the boxes of an .npy file in the order of time, fields that it lacks but t, x, y, w, h, class_id as 0.

    Shape: (M,) of `BOX`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, cut off, no .npy file, or no structured array with these fields.
    """
    if Path(path).stat().st_size == 0:
        raise ValueError(f"{path}: an empty file, 0 bytes")
    try:
        stored = np.load(path)  # which unpickles nothing
    except OSError:
        raise
    except Exception as error:  # a damaged header may fail in any way
        raise ValueError(f"{path}: no whole .npy file of boxes ({error})") from None
    found = getattr(stored, "dtype", np.dtype(float)).names or ()
    sources = {name: name if name in found else OLD_NAMES.get(name, name) for name in BOX.names}
    missing = [name for name in ("t", "x", "y", "w", "h", "class_id") if sources[name] not in found]
    if missing or stored.ndim != 1:
        why = f"missing fields: {', '.join(missing)} (found: {', '.join(found)})"
        raise ValueError(f"{path}: no rows of boxes; {why if missing else f'its shape is {stored.shape}'}")
    boxes = np.zeros(len(stored), BOX)
    for name, source in sources.items():
        if source in found:
            if not np.issubdtype(stored.dtype[source], np.number):
                raise ValueError(f"{path}: no rows of boxes; the field {source} is {stored.dtype[source]}, no number")
            if not np.isfinite(stored[source]).all():
                raise ValueError(f"{path}: the field {source} has numbers that are not finite")
            boxes[name] = stored[source]
    return boxes[np.argsort(boxes["t"], kind="stable")]


def write_boxes(path: Path, boxes: np.ndarray) -> None:
    """Write boxes, (M,) of `BOX`, as an .npy file."""
    with Path(path).open("wb") as file:
        np.save(file, boxes.astype(BOX))


def _header_lines(file: BinaryIO) -> list[str]:
    """The lines of a .dat file's header; the file is left at the byte behind them."""
    head, lines, behind = file.read(_MOST), [], 0
    while head.startswith(b"% ", behind) and (end := head.find(b"\n", behind)) >= 0:
        lines.append(head[behind:end].decode("latin-1"))
        behind = end + 1
    file.seek(behind)
    return lines
