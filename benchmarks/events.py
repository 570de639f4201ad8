"""Read a recording of many events in slices of time, as training does, and say how much memory that took.

The file, 8 bytes per event, is written first, into a temporary folder and by a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import add_log_option, print_table, run_benchmark, write_log

from detection.data.events import EVENT, Recording, events_to_frames, write_events

WIDTH, HEIGHT = 304, 240  # of GEN1's sensor
SECONDS = 60
STEPS = 4


def draw(number: int) -> Iterator[np.ndarray]:
    """Yield so many events at random places, a second at a time."""
    rng = np.random.default_rng(0)
    for second in range(SECONDS):
        events = np.empty(number // SECONDS, EVENT)
        events["t"] = 1_000_000 * second + np.arange(len(events)) * 1_000_000 // len(events)
        events["x"], events["y"] = rng.integers(WIDTH, size=len(events)), rng.integers(HEIGHT, size=len(events))
        events["p"] = rng.integers(2, size=len(events))
        yield events


def write(path: Path, number: int) -> None:
    """Write the recording."""
    write_events(path, draw(number), width=WIDTH, height=HEIGHT)


def peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=200_000_000, help="(default: 200000000)")
    parser.add_argument("--window", type=float, default=0.05, help="seconds of a slice (default: 0.05)")
    add_log_option(parser, "events", picture=False)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long_td.dat"
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(path, options.events))
        writer.start()
        writer.join()
        recording, window = Recording(path), round(1e6 * options.window)
        before, started, total = peak(), time.perf_counter(), 0
        for start in range(0, 1_000_000 * SECONDS, window):
            events = recording.between(start, start + window)
            frames = events_to_frames(events, (HEIGHT, WIDTH), STEPS, window=(start, start + window))
            total += int(frames.double().sum())
        seconds = time.perf_counter() - started
        assert total == recording.num_events
    row = {"events": total, "window": options.window, "seconds": seconds, "peak_bytes": peak(), "before_bytes": before}
    print_table(
        f"A recording of {total:,} events in slices of {options.window:g} s",
        ("seconds", "events a second", "peak memory, MiB", "before the first slice, MiB"),
        [
            (
                f"{seconds:.1f}",
                f"{total / seconds:,.0f}",
                *(f"{row[key] / 2**20:.0f}" for key in ("peak_bytes", "before_bytes")),
            )
        ],
    )
    write_log(options.log, {"rows": [row]})


if __name__ == "__main__":
    run_benchmark(main)
