"""Made event sets: the drawn scenes moved past a simulated sensor, in the files of real sets, without a download."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from detection.data.events.prophesee import BOX, EVENT, write_boxes, write_events
from detection.data.synthetic import CATEGORIES, MAX_OBJECTS, MIN_VISIBLE, SCALE, Scene, draw_scene, write_once

CLASS_FILE = "label_map_dictionary.json"  # names by class_id, as in the 1 Megapixel set
SETTINGS_FILE = "settings.json"
SIMULATION = 1  # part of the settings, so that recordings of an older simulation are not taken for these

THRESHOLD = 0.25  # change of the log-intensity that is an event
MISMATCH = 0.03  # standard deviation of the pixels' own thresholds, as a share
DARK = 8.0  # added to intensities, which are 0..255, before their logarithm, as by a sensor's dark current
MOTION = 0.5  # pixels that the scene moves between two looks at it, at most
MARGIN = 0.5  # a scene of boxes is larger than the sensor by so many of its sides
SECONDS, CLASS_SECONDS = 1.0, 0.1  # of a recording with boxes, and of one of a class
LABELS_PER_SECOND = 10


def draw_recordings(root: Path, *, num_train: int, num_val: int, size: int, seed: int) -> None:
    """Write root/{train,val}/NNNNNN_td.dat and NNNNNN_bbox.npy as GEN1 has them; the same seed, the same bytes.

    The sensor looks for a second at a drawn scene, which moves from one place to a second and on to a third. Boxes come
    every 0.1 s, cut off at the border, of the objects of whose box at least `MIN_VISIBLE` is seen. All files appear
    together or, after an interruption, not at all; returns at once when root holds recordings of the same settings.

    Args:
        root: folder to create.
        num_train, num_val: number of recordings.
        size: side of the sensor in pixels.
        seed: of the drawing.

    Raises:
        ValueError: root holds recordings of other settings, or something else.
    """
    settings = {"boxes": True, "num_train": num_train, "num_val": num_val, "size": size, "seed": seed}

    def write(folder: Path) -> None:
        for split, index, rng in _recordings(folder, settings):
            scene = draw_scene(round((1 + MARGIN) * size), int(rng.integers(1, MAX_OBJECTS + 1)), rng)
            path = rng.uniform(0, round(MARGIN * size), (3, 2))
            events = simulate(light_of(scene), path, size, round(1e6 * SECONDS), rng)
            write_events(split / f"{index + 1:06d}_td.dat", [events], width=size, height=size)
            write_boxes(split / f"{index + 1:06d}_bbox.npy", boxes_along(path, scene, size))
        (folder / CLASS_FILE).write_text(json.dumps(dict(enumerate(CATEGORIES))), encoding="utf-8")

    _write_recordings(root, settings, write)


def draw_classified(root: Path, *, num_train: int, num_val: int, size: int, seed: int) -> None:
    """Write root/{train,val}/CLASS/NNNNNN.dat as N-CARS has them, with one shape each; see `draw_recordings`.

    The sensor looks at it for 0.1 s, while it moves along a triangle, as by three saccades: that shows every edge.
    """
    settings = {"boxes": False, "num_train": num_train, "num_val": num_val, "size": size, "seed": seed}

    def write(folder: Path) -> None:
        for split, index, rng in _recordings(folder, settings):
            scene = draw_scene(2 * size, 1, rng)
            while scene.labels[0] - 1 != index % len(CATEGORIES):
                scene = draw_scene(2 * size, 1, rng)
            turns = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(4) / 3
            around = (scene.boxes[0].reshape(2, 2).sum(axis=0) - size) / 2  # the shape in the middle
            around = around.clip(size / 8, size - size / 8)
            path = around + size / 8 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
            target = split / CATEGORIES[index % len(CATEGORIES)]
            target.mkdir(exist_ok=True)
            events = simulate(light_of(scene), path, size, round(1e6 * CLASS_SECONDS), rng)
            write_events(target / f"{index + 1:06d}.dat", [events], width=size, height=size)

    _write_recordings(root, settings, write)


def simulate(light: np.ndarray, path: np.ndarray, size: int, duration: int, rng: np.random.Generator) -> np.ndarray:
    """Return the events of a sensor that moves over a scene.

    A pixel remembers a log-intensity. When what it sees is its threshold away from that, it sends an event and
    remembers the value one threshold nearer; between two looks the log-intensity changes evenly, hence the times.

    Args:
        light: (H, W) intensities, 0..255.
        path: (K, 2) x and y of the sensor's upper left corner, passed after equal times, in 0 to W - size and H - size.
        size: side of the sensor, less than H and W.
        duration: microseconds.
        rng: draws the pixels' thresholds, `THRESHOLD` with a share of `MISMATCH`.

    Shape: (M,) of `EVENT`, in the order of time.
    """
    threshold = THRESHOLD * (1 + MISMATCH * rng.standard_normal((size, size))).clip(0.5)
    before, parts = 0.0, []
    seen = remembered = np.log(_look(light, path[0], size) + DARK)
    for number, (start, end) in enumerate(pairwise(path)):
        looks = max(1, int(np.ceil(np.abs(end - start).max() / MOTION)))
        for look in range(1, looks + 1):
            now = duration * (number + look / looks) / (len(path) - 1)
            light_now = np.log(_look(light, start + (end - start) * look / looks, size) + DARK)
            change = light_now - seen
            crossings = np.trunc((light_now - remembered) / threshold).astype(np.int64) * (change != 0)
            y, x = np.nonzero(crossings)
            repeats = np.abs(crossings[y, x])
            y, x = np.repeat(y, repeats), np.repeat(x, repeats)
            sign = np.sign(crossings[y, x])
            order = np.arange(len(y)) - np.repeat(repeats.cumsum() - repeats, repeats) + 1
            level = remembered[y, x] + sign * order * threshold[y, x]
            events = np.empty(len(y), EVENT)
            events["t"] = before + (now - before) * ((level - seen[y, x]) / change[y, x]).clip(0, 1)
            events["x"], events["y"], events["p"] = x, y, sign > 0
            parts.append(events)
            before, seen, remembered = now, light_now, remembered + crossings * threshold
    events = np.concatenate(parts)
    events["t"] = events["t"].clip(0, duration - 1)
    return events[np.argsort(events["t"], kind="stable")]


def light_of(scene: Scene) -> np.ndarray:
    """Return intensities (H, W) of a scene; shapes are lighter than the ground by a constant, whatever colours."""
    height, width = scene.image.shape[:2]
    covered = scene.masks.any(axis=0).reshape(height, SCALE, width, SCALE).mean(axis=(1, 3))
    return scene.image.mean(axis=2) / 4 + 160 * covered


def boxes_along(path: np.ndarray, scene: Scene, size: int) -> np.ndarray:
    """Return the boxes of a recording with `SECONDS`, (M,) of `BOX`; see `simulate` for the path."""
    rows = []
    for label in range(1, round(SECONDS * LABELS_PER_SECOND) + 1):
        place = label / (SECONDS * LABELS_PER_SECOND) * (len(path) - 1)
        corner = [np.interp(place, range(len(path)), axis) for axis in path.T]
        for track, (box, kind) in enumerate(zip(scene.boxes - np.tile(corner, 2), scene.labels, strict=True)):
            x1, y1, x2, y2 = box.clip(0, size)
            if (x2 - x1) * (y2 - y1) >= MIN_VISIBLE * (box[2] - box[0]) * (box[3] - box[1]):
                t = round(1e6 * label / LABELS_PER_SECOND)
                rows.append((t, x1, y1, x2 - x1, y2 - y1, kind - 1, track + 1, 1))
    return np.array(rows, dtype=BOX)


def _look(light: np.ndarray, corner: np.ndarray, size: int) -> np.ndarray:
    """The part of a scene at a place between pixels, interpolated."""
    x, y = (min(int(at), side - size - 1) for at, side in zip(corner, light.shape[::-1], strict=True))
    right, below = corner - (x, y)
    rows = light[y : y + size + 1, x : x + size + 1]
    rows = rows[:-1] + below * (rows[1:] - rows[:-1])
    return rows[:, :-1] + right * (rows[:, 1:] - rows[:, :-1])


def _recordings(folder: Path, settings: dict[str, Any]) -> Iterator[tuple[Path, int, np.random.Generator]]:
    """The folder of the split, index and generator of each recording to be made."""
    for split, name in enumerate(("train", "val")):
        (folder / name).mkdir()
        for index in range(settings[f"num_{name}"]):
            yield folder / name, index, np.random.default_rng((settings["seed"], split, index))


def _write_recordings(root: Path, settings: dict[str, Any], write: Callable[[Path], None]) -> None:
    settings = settings | {"simulation": SIMULATION}

    def write_all(folder: Path) -> None:
        write(folder)
        (folder / SETTINGS_FILE).write_text(json.dumps(settings), encoding="utf-8")

    def read_settings(folder: Path) -> Any:
        return json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))

    write_once(root, settings, write_all, read_settings, "made recordings", "recordings made")
