"""Evaluation images with boxes and spike maps."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from detection.data import Record, load_image
from detection.report.matching import Match
from detection.spikemaps import spike_maps

PICTURE_WIDTH = 340  # units of a picture, about its pixels on a page


PICTURE_PIXELS = 640  # longest side that is kept


LABEL_HEIGHT, LETTER = 14, 6.4  # a label's height and the width of one of its letters, in the same units


MAX_LABELS = 12  # on a picture with more boxes only the wrong ones have a label


@dataclass(frozen=True)
class Box:
    """A rectangle on a picture, and its label if it shows one; all lengths in units of the picture."""

    kind: str  # "right", "wrong", "ignored" (detections), "found", "missed" (true boxes)
    x: float
    y: float
    width: float
    height: float
    title: str
    label: str = ""
    label_x: float = 0.0
    label_y: float = 0.0
    label_width: float = 0.0


@dataclass(frozen=True)
class Picture:
    """An evaluation image, its boxes and its spike maps."""

    name: str
    image: str  # data URI
    height: float
    boxes: list[Box]
    summary: str
    f1: float
    maps: list[dict[str, Any]]


def draw_picture(
    model: nn.Module, record: Record, image: Tensor, matched: Match, class_names: Sequence[str]
) -> Picture:
    """An evaluation image with true boxes, detections, and where the network fires.

    Args:
        model: the detector, in evaluation mode.
        record: the image and its boxes.
        image: (3, H, W), values in [0, 1].
        matched: its detections.
        class_names: names of the labels 1..K.
    """
    pixels = Image.fromarray(load_image(record.path))
    pixels.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    scale = PICTURE_WIDTH / record.width
    height = record.height * scale
    boxes = []
    for box, label, found, ignore in zip(record.boxes, record.labels, matched.found, matched.ignore, strict=True):
        name = class_names[label - 1] + (", difficult" if ignore else "")
        boxes.append(_box("found" if found or ignore else "missed", box, scale, f"true: {name}"))
    taken: list[tuple[float, float, float]] = []
    for row, right in zip(matched.detections, matched.right, strict=True):
        kind = {True: "right", False: "wrong", None: "ignored"}[right]
        label = f"{class_names[int(row[5]) - 1]} {row[4]:.2f}"
        box = _box(kind, row[:4], scale, f"{kind}: {label}")
        if len(matched.detections) <= MAX_LABELS or kind == "wrong":
            box = _with_label(box, label, height, taken)
        boxes.append(box)
    counts = {"right": matched.num_right, "wrong": matched.num_wrong, "missed": matched.num_missed}
    summary = ", ".join(f"{number}\N{NO-BREAK SPACE}{word}" for word, number in counts.items())
    return Picture(
        name=record.path.name,
        image=_data_uri(pixels, "JPEG", quality=85),
        height=height,
        boxes=boxes,
        summary=summary,
        f1=matched.f1,
        maps=_draw_maps(model, image),
    )


def _box(kind: str, corners: Sequence[float], scale: float, title: str) -> Box:
    x1, y1, x2, y2 = (float(value) * scale for value in corners)
    return Box(kind, x1, y1, x2 - x1, y2 - y1, title)


def _with_label(box: Box, label: str, height: float, taken: list[tuple[float, float, float]]) -> Box:
    """`box` with a label at one of its corners, inside the picture and if it can be off the labels in `taken`."""
    width = min(PICTURE_WIDTH, LETTER * len(label) + 6)
    places = []
    for y in (box.y - LABEL_HEIGHT, box.y, box.y + box.height - LABEL_HEIGHT, box.y + box.height):
        for x in (box.x, box.x + box.width - width):
            places.append((max(0.0, min(x, PICTURE_WIDTH - width)), max(0.0, min(y, height - LABEL_HEIGHT))))

    def num_overlaps(place: tuple[float, float]) -> int:
        return sum(place[0] < x + w and x < place[0] + width and abs(place[1] - y) < LABEL_HEIGHT for x, y, w in taken)

    x, y = min(places, key=num_overlaps)  # the first of the best
    taken.append((x, y, width))
    return Box(box.kind, box.x, box.y, box.width, box.height, box.title, label, x, y, width)


def _draw_maps(model: nn.Module, image: Tensor) -> list[dict[str, Any]]:
    """Spike maps as grey pictures, brighter where more channels fire, all maps of an image on one scale."""
    maps = spike_maps(model, image)
    brightest = max((float(np.quantile(entry.rate, 0.99)) for entry in maps), default=0.0) or 1.0
    return [
        {
            "name": entry.name,
            "activity": entry.activity,
            "size": f"{entry.rate.shape[1]}\N{MULTIPLICATION SIGN}{entry.rate.shape[0]}",
            "image": _data_uri(Image.fromarray((255 * np.clip(entry.rate / brightest, 0, 1)).astype(np.uint8)), "PNG"),
            "ratio": entry.rate.shape[1] / entry.rate.shape[0],
        }
        for entry in maps
    ]


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
