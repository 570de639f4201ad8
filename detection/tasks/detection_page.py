"""The sections of a page about a detector: precision per class and over recall, best and worst images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor, nn

from detection.curves import draw_precision_recall
from detection.data import DetectionDataset, Record
from detection.data.pictures import pixels_of
from detection.draw import THIN, Box, draw_boxes, draw_predictions
from detection.evaluation import PrecisionRecall, average_precision
from detection.evaluation.matching import Match, match
from detection.figures import data_uri, save_png
from detection.records import Evaluation
from detection.sections import Charts, Gallery, Key, Legend, Map, Picture, Section, Table, Words, count, score
from detection.spikemaps import SpikeMap, rows_of, spike_maps

SCORE_THRESHOLD = 0.3  # detections with a lower score are neither drawn nor counted in an image's F1
MAX_SIDE = 640  # pixels of a picture
NUM_PICTURES = 12  # of a contact sheet
MAX_LABELS = 12  # on a picture with more detections only the wrong ones have a label
# Names, colours and dashes of boxes.
RIGHT, WRONG = Key("detection, right", "#1d9bf0"), Key("detection, wrong", "#f0397b")
FOUND, MISSED = Key("true box, found", "#ffffff", dashed=True), Key("true box, missed", "#ffe14d", dashed=True)
IGNORED = Key("detection of a difficult box", "#9aa4b0")


@torch.no_grad()
def save_sheet(model: nn.Module, dataset: DetectionDataset, path: Path) -> None:
    """Save a contact sheet of the first images with predicted and true boxes."""
    samples = [dataset[index] for index in range(min(NUM_PICTURES, len(dataset)))]
    device = next(model.parameters()).device
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        found = [model([image.to(device)])[0] for image, _ in samples]
    images, targets = zip(*samples, strict=True)
    save_png(draw_predictions(images, send_to_device(found, "cpu"), targets, dataset.annotations.categories), path)


def class_sections(logged: Evaluation | None, found: Mapping[str, Sequence[Any]] | None) -> list[Section]:
    """Return the sections of a detector.

    Args:
        logged: what the log has of the weights.
        found: parts by section, of an examination; None: there was none.
    """
    per_class = logged.tables.get("per_class", {}) if logged else {}
    rows = [
        (name, score(row["AP"], bar=True), score(row["AP50"], bar=True), count(int(row["num_boxes"])))
        for name, row in sorted(per_class.items(), key=lambda item: -item[1]["AP"])  # without boxes at the end
    ]
    title = "Average precision per class"
    table = [Table(title, ("class", "AP", "AP50", "true boxes"), rows)] if rows else []
    sections = [Section("classes", "Classes", title, table, "The log has no average precision per class.")]
    for key, name, heading, why in (
        ("precision", "Precision over recall", "Precision over recall", "No class has boxes to find."),
        ("images", "Images", "Best and worst evaluation images", "No images were asked for, or none has boxes."),
    ):
        sections.append(Section(key, name, heading, [] if found is None else found[key], "" if found is None else why))
    return sections


def precision_parts(curves: Mapping[str, PrecisionRecall]) -> list[Any]:
    """Return the chart of precision over recall and its table; nothing if no class has boxes."""
    curves = {name: curve for name, curve in curves.items() if curve.num_boxes}
    if not curves:
        return []
    areas = {name: average_precision(curve, "area") for name, curve in curves.items()}
    rows = []
    for name in sorted(areas, key=lambda name: -areas[name]):
        number, recall = len(curves[name].scores), curves[name].recall
        highest = float(recall[-1]) if number else 0.0
        rows.append((name, score(areas[name]), score(highest), count(number), count(curves[name].num_boxes)))
    text = (
        "Counted by PASCAL VOC's rule at IoU 0.5 on the evaluation images. A line shows the highest precision at its "
        "recall or a higher one; the number behind a class is the area below its line."
    )
    if len(rows) > 8:
        text += f" The four best and the four worst classes have colours, the other {len(rows) - 8} are grey."
    columns = ("class", "area", "highest recall", "detections", "true boxes")
    return [text, Charts([draw_precision_recall(curves)]), Table("Precision and recall per class", columns, rows)]


def image_parts(
    model: nn.Module, dataset: DetectionDataset, results: Iterable[Mapping[str, Any]], num_images: int
) -> list[Any]:
    """Return the images with the best and with the worst detections, and where the network fires on them.

    Args:
        model: the detector, in evaluation mode.
        dataset: the evaluation images.
        results: all detections in COCO's format.
        num_images: best and worst images, so many each; an image with nothing in it and nothing found is neither.
    """
    annotations = dataset.annotations
    labels = {category: label for label, category in enumerate(annotations.category_ids, start=1)}
    detections: dict[int, list[list[float]]] = {record.image_id: [] for record in annotations.records}
    for row in results:
        if row["score"] >= SCORE_THRESHOLD:
            x, y, width, height = row["bbox"]
            found = [x, y, x + width, y + height, row["score"], labels[row["category_id"]]]
            detections[row["image_id"]].append(found)
    matches = [match(record, detections[record.image_id]) for record in annotations.records]
    order = [index for index, item in enumerate(matches) if item.num_right + item.num_wrong + item.num_missed]
    order.sort(key=lambda index: (-matches[index].f1, -matches[index].num_right))
    num_best = min(num_images, math.ceil(len(order) / 2))
    num_worst = min(num_images, len(order) - num_best)
    galleries = {
        title: [
            picture_of(model, annotations.records[index], dataset[index][0], matches[index], annotations.categories)
            for index in indices
        ]
        for title, indices in (("Best", order[:num_best]), ("Worst", order[::-1][:num_worst]))
    }
    text = (
        "Images are ranked by F1 = 2 right / (2 right + wrong + missed) of the detections with a score of at least "
        f"{SCORE_THRESHOLD:g}, at IoU 0.5."
    )
    parts: list[Any] = [text, Legend((RIGHT, WRONG, FOUND, MISSED))] if num_best else []
    for title, pictures in galleries.items():
        parts += [Words(title, "heading"), Gallery(pictures)] if pictures else []
    note = (
        "Below each image: its spike maps, brighter where more channels fire, on one scale per image, with the share "
        "of neurons that fire."
    )
    return parts + ([Words(note, "note")] if any(picture.maps for picture in galleries["Best"]) else [])


def picture_of(model: nn.Module, record: Record, image: Tensor, found: Match, class_names: Sequence[str]) -> Picture:
    """Return an evaluation image with true boxes, detections, and where the network fires.

    Args:
        model: the detector, in evaluation mode.
        record: the image and its boxes.
        image: (3, H, W), values in [0, 1].
        found: its detections.
        class_names: names of the labels 1..K.
    """
    pixels = Image.fromarray(pixels_of(image))
    pixels.thumbnail((MAX_SIDE, MAX_SIDE))
    scale = max(pixels.size) / max(record.width, record.height)
    boxes = []
    for corners, label, is_found, ignore in zip(record.boxes, record.labels, found.found, found.ignore, strict=True):
        kind = FOUND if is_found or ignore else MISSED
        title = f"{kind.name}: {class_names[label - 1]}" + (", difficult" if ignore else "")
        width = THIN if kind is FOUND else 2.4
        boxes.append(Box((corners * scale).tolist(), kind.colour, dashed=True, width=width, title=title))
    for row, right in zip(found.detections, found.right, strict=True):
        kind = {True: RIGHT, False: WRONG, None: IGNORED}[right]
        label = f"{class_names[int(row[5]) - 1]} {row[4]:.2f}"
        shown = label if len(found.detections) <= MAX_LABELS or right is False else ""
        corners = [value * scale for value in row[:4]]
        boxes.append(Box(corners, kind.colour, label=shown, title=f"{kind.name}: {label}"))
    counts = {"right": found.num_right, "wrong": found.num_wrong, "missed": found.num_missed}
    summary = ", ".join(f"{number}\N{NO-BREAK SPACE}{word}" for word, number in counts.items())
    name = record.path.name
    figure = draw_boxes(np.asarray(pixels), boxes, f"{name}: {summary}")
    return Picture(figure, f"{name}: F1 {found.f1:.2f}, {summary}", maps_of(spike_maps(model, image), name))


def maps_of(found: Sequence[SpikeMap], name: str) -> list[Map]:
    """Return the spike maps of an image as grey pictures, brighter where more channels fire, all on one scale."""
    shown = [(entry.name, entry) for entry in found]
    shown += [(f"{entry.name} step {step}", entry) for step, row in rows_of(found).items() for entry in row]
    brightest = max((float(np.quantile(entry.rate, 0.99)) for _, entry in shown), default=0.0) or 1.0
    maps = []
    for place, entry in shown:
        height, width = entry.rate.shape
        pixels = (255 * np.clip(entry.rate / brightest, 0, 1)).astype(np.uint8)
        alt = f"Spike map of {place} on {name}, {width}\N{MULTIPLICATION SIGN}{height} cells"
        caption = (place, f"{100 * entry.activity:.1f} %")
        maps.append(Map(data_uri(Image.fromarray(pixels), "PNG"), alt, caption, width / height))
    return maps
