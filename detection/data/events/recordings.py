"""Boxes over recordings, as GEN1 and the 1 Megapixel set have them: an image per moment that has boxes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from detection.config.schema import Events
from detection.data.events.files import named
from detection.data.events.frames import Size, events_to_frames, filter_boxes, frames_to_pixels, label_times
from detection.data.events.made import CLASS_FILE
from detection.data.events.prophesee import Recording, read_boxes
from detection.data.image_files import Verify
from detection.data.records import Annotations, RawObject, Record, build_record, check_classes, require_folder
from detection.text import plural, printable

GEN1_CLASSES = ("car", "pedestrian")
EVENTS_END, BOXES_END = "_td.dat", "_bbox.npy"


@dataclass(frozen=True)
class EventRecord(Record):
    """One image made of the events before `end`; `path` is the recording.

    Attributes:
        end: microseconds, no longer part of it.
        settings: its length, steps and scale.
    """

    end: int = 0
    settings: Events = field(default_factory=Events)

    def read(self) -> np.ndarray:
        """Return the image.

        Shape: (height, width, 2 steps) uint8.
        """
        settings, size = self.settings, (self.height, self.width)
        window = (self.end - round(1e6 * settings.window), self.end)
        events = Recording(self.path).between(*window)
        with named(self.path):
            frames = events_to_frames(events, size, settings.steps, settings.by, window)
        return frames_to_pixels(frames, size, settings.full).permute(1, 2, 0).numpy()


def read_recordings(
    root: Path, folders: Sequence[str], classes: Sequence[str], settings: Events, *, verify: Verify = "header"
) -> Annotations:
    """Return the images of root/FOLDER/*_td.dat, an `EventRecord` for each moment of the *_bbox.npy beside it.

    Classes are those of root/label_map_dictionary.json, {"0": NAME, ...} as the 1 Megapixel set has it, or GEN1's.
    Boxes are chosen by `filter_boxes` and put together by `label_times`; what reaches out of the sensor is cut off.

    Args:
        root: of the data set.
        folders: of the split.
        classes: names to keep, label 1 first; empty: all.
        settings: of images and boxes.
        verify: "full" reads every event once, which finds a clock that jumps back; else that is found when an image is
            made of such events.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no recordings, none with a box to train on, an unknown class, or no class names in their file.
    """
    names = _class_names(root)
    check_classes(classes, names, source=str(root))
    kept = tuple(classes) or names
    records: list[Record] = []
    dropped: list[str] = []
    others: Counter[str] = Counter()
    stems: set[str] = set()
    for folder, number in Counter(map(os.path.normpath, folders)).items():
        if number > 1:
            dropped.append(f"{root / folder}: named {number} times; used once")
        require_folder(root / folder, f"recordings NAME{EVENTS_END} with NAME{BOXES_END} beside them")
        paths = sorted((root / folder).glob(f"[!.]*{EVENTS_END}"))
        if not paths:
            raise ValueError(f"{root / folder}: no recordings in it; expected NAME{EVENTS_END} and NAME{BOXES_END}")
        for path in paths:
            try:
                recording, size, boxes = _open(path, settings, verify)
            except (OSError, ValueError) as error:
                dropped.append(f"{error}; recording left out")
                continue
            stem = path.name.removesuffix(EVENTS_END)
            stem = f"{folder}/{stem}" if stem in stems else stem  # ids say which image is meant
            stems.add(stem)
            few = filter_boxes(boxes, settings.skip, settings.min_diagonal, settings.min_side)
            others["too early or too small (data.events.skip, min_diagonal, min_side)"] += len(boxes) - len(few)
            for end, group in label_times(few, round(1e6 * settings.tolerance)):
                if end <= recording.start or end - round(1e6 * settings.window) > recording.end:
                    others["before or behind all events"] += len(group)
                    continue
                objects = list(_objects(group, size, names, kept, others))
                if objects:
                    records.append(_record(path, f"{stem}_{end}", end, size, objects, settings, dropped))
    records = [record for record in records if len(record.labels)]
    dropped += [f"{root}: {plural(number, 'object')} {why} left out" for why, number in others.items() if number]
    dropped = [printable(sentence) for sentence in dropped]
    if not records:
        where, why = ", ".join(folders), "; ".join(dropped[-3:])
        raise ValueError(f"{root}: no recording of {where} has a box to train on; {why}")
    return Annotations(tuple(records), kept, tuple(range(1, len(kept) + 1)), tuple(dropped))


def _class_names(root: Path) -> tuple[str, ...]:
    path = root / CLASS_FILE
    if not path.is_file():
        return GEN1_CLASSES
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        names = tuple(str(found[str(number)]) for number in range(len(found)))
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path}: expected names by class_id from 0, such as {{"0": "car", "1": "bus"}}') from None
    check_classes(names, source=str(path))
    return names


def _open(path: Path, settings: Events, verify: Verify) -> tuple[Recording, Size, np.ndarray]:
    """The events, the sensor's height and width, and all boxes."""
    recording = Recording(path)
    size = settings.sensor or (recording.height, recording.width)
    if None in size:
        raise ValueError(f"{path}: its header has no size of the sensor; say it by data.events.sensor")
    recording.height, recording.width = size  # beyond which no event may lie
    beside = path.with_name(path.name.removesuffix(EVENTS_END) + BOXES_END)
    if not beside.is_file():
        raise ValueError(f"{path}: no {beside.name} beside it")
    if verify == "full":
        for _ in recording.chunks():
            pass
    return recording, size, read_boxes(beside)


def _objects(
    boxes: np.ndarray, size: Size, names: Sequence[str], kept: Sequence[str], others: Counter[str]
) -> Iterator[RawObject]:
    """The boxes of one image, cut off at its border; those of other classes are counted."""
    height, width = size
    for box in boxes:
        number = int(box["class_id"])
        name = names[number] if number < len(names) else f"class_id {number}"
        if name not in kept:
            others[f"of {name}, not among the classes,"] += 1
            continue
        x1, y1, w, h = (float(box[key]) for key in "xywh")
        left, top, right, bottom = max(x1, 0.0), max(y1, 0.0), min(x1 + w, width), min(y1 + h, height)
        inside = [left, top, right - left, bottom - top] if left < right and top < bottom else [x1, y1, w, h]
        yield RawObject(f"a {name}", inside, kept.index(name) + 1, False)


def _record(
    path: Path, image_id: str, end: int, size: Size, objects: Sequence[RawObject], settings: Events, dropped: list[str]
) -> EventRecord:
    source = path.with_name(path.name.removesuffix(EVENTS_END) + BOXES_END)
    plain = build_record(path, image_id, size[1], size[0], objects, layout="coco", source=source, dropped=dropped)
    return EventRecord(**vars(plain), end=end, settings=settings)
