"""One HTML page about a run, or about several side by side: what their logs say, and what an evaluation adds."""

from __future__ import annotations

import base64
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image
from pydantic import BaseModel
from torch import Tensor, nn
from torchvision.ops import box_iou

from detection.analysis import analyze_run
from detection.checkpoint import Run, Weights, write_whole
from detection.classification import validation_batches
from detection.config import Config, Recipe, flatten
from detection.data import Record, build_datasets, load_image
from detection.evaluation import PrecisionRecall, average_precision, precision_recall
from detection.models import load_model
from detection.spikemaps import spike_maps
from detection.tasks import evaluate_detector, evaluation_loader, logged_line, make_accelerator

GENERATOR = "hoyer-det report"  # stands in every page, by which a page is known that may be replaced
SCORE_THRESHOLD = 0.3  # detections with a lower score are neither drawn nor counted in an image's F1
IOU_THRESHOLD = 0.5
METRICS = {"detection": ("AP50", "AP", "AP75"), "classification": ("top1", "top5")}
SECTIONS = {
    "curves": "Curves",
    "classes": "Classes",
    "precision": "Precision over recall",
    "layers": "Layers",
    "networks": "Networks",
    "certificate": "Certificate",
    "dynamics": "Thresholds",
    "images": "Images",
    "recipe": "Recipe",
    "origin": "Reproduce",
}  # end of the id of each section of a run, and its name in the contents
DETECTION_ONLY = ("precision", "images")
UNKNOWN = ("not yet", "none", "unknown", "not checked")  # what stands in the headline where there is no number
NAMES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "retinanet": "RetinaNet",
    "fasterrcnn": "Faster R-CNN",
    "fcos": "FCOS",
    "ssd": "SSD",
    "hoyer": "spiking",
    "relu": "analogue twin",
    "fixed": "spiking, threshold without extremum",
    "spiking": "spiking",
    "spiking_int8": "spiking, 8-bit weights",
    "twin": "analogue twin",
    "twin_int8": "8-bit twin",
    "binary": "binary network",
}


def write_report(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    which: Weights = "last",
    num_images: int = 3,
    data_root: str | Path | None = None,
    log_only: bool = False,
    command: Sequence[str] = (),
) -> Path:
    """The path of a self-contained HTML page about one run, or about several and how they differ from the first.

    The log gives the headline, the recipe, the curves and the thresholds. Where weights and evaluation data are at
    hand, one evaluation adds precision-recall curves and images with boxes (a detector) or the classes taken for
    each other (a classifier), and the analysis of the run adds energy and the binarity certificate. What cannot be
    computed is left out, and the page says why.

    Args:
        folders: run folders of one task.
        out: HTML file to write; None: report.html in the run's folder, or in the current one for several runs. An
            earlier page is replaced, any other file is not.
        which: whose metrics stand in the headline, and which weights are evaluated.
        num_images: best and worst evaluation images to show, so many each; 0: none.
        data_root: where the evaluation data are; None: where the recipe says.
        log_only: leave out all that needs weights and data.
        command: how the page is made, to stand on it.

    Raises:
        FileExistsError: `out` is a file that is no report page.
        FileNotFoundError: no such run, no finished epoch, no such folder for `out`, or no data in `data_root`.
        ValueError: a log is damaged, a run is given twice, or the runs are of different tasks.
    """
    if not folders:
        raise ValueError("no run folder given; a report needs at least one")
    if num_images < 0:
        raise ValueError(f"num_images: expected 0 or more, got {num_images}")
    folders = [Path(folder) for folder in folders]
    for index, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:index]]:
            raise ValueError(f"{folder}: given twice; a run is compared with other runs")
    if out is None:
        out = (folders[0] if len(folders) == 1 else Path()) / "report.html"
    sources = [read_source(folder, which) for folder in folders]  # all of them, before any is evaluated
    tasks = list(dict.fromkeys(source.run.config.task for source in sources))
    if len(tasks) > 1:
        raise ValueError(f"runs of {' and of '.join(tasks)} have no metric in common; compare runs of one task")
    out = _check_out(Path(out))
    if not log_only:
        sources = [
            _complete(source, which, num_images, None if data_root is None else Path(data_root)) for source in sources
        ]
    write_whole(out, render(sources, command).encode())
    return out


# What a run has


@dataclass(frozen=True)
class Source:
    """All that is known about a run.

    Attributes:
        run: its folder and recipe.
        log: the lines of metrics.jsonl, at least one.
        info: run.json.
        which: the weights that the numbers belong to.
        line: the log line of these weights; None before the first evaluation.
        analysis: `Analysis.to_dict()`: energy and certificate.
        evaluation: what one more evaluation gave.
        missing: why there is no "analysis" or no "evaluation", a sentence each.
    """

    run: Run
    log: list[dict[str, Any]]
    info: dict[str, Any]
    which: Weights
    line: dict[str, Any] | None
    analysis: dict[str, Any] | None = None
    evaluation: Evaluation | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation of the saved weights adds to the log.

    Attributes:
        metrics: as in the log.
        curves: class name -> precision over recall at IoU 0.5; a detector's.
        pictures: evaluation images, the best from the best on, then the worst from the worst on; a detector's.
        num_best: how many of `pictures` are the best ones.
        confusion: (K, K) images by true class (row) and answer (column); a classifier's.
    """

    metrics: dict[str, Any]
    curves: dict[str, PrecisionRecall] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    num_best: int = 0
    confusion: Tensor | None = None


def read_source(folder: Path, which: Weights) -> Source:
    """Recipe, log and run.json of a run.

    Raises:
        FileNotFoundError: no such run, no finished epoch, or no log of such weights.
        ValueError: a file is damaged; names it, and the line of the log.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    run = Run.open(folder)
    log = run.history()
    if not log:
        raise FileNotFoundError(f"{folder / 'metrics.jsonl'}: empty; the run has not finished its first epoch")
    for number, row in enumerate(log, start=1):
        if not isinstance(row.get("epoch"), int) or "loss" not in row:
            raise ValueError(f'{folder / "metrics.jsonl"}, line {number}: damaged, it has no "epoch" and "loss"')
    metric = METRICS[run.config.task][0]
    line = logged_line(run, which, "AP" if metric == "AP50" else metric) if any(metric in row for row in log) else None
    missing = dict.fromkeys(("analysis", "evaluation"), "This page was made from the log alone.")
    return Source(run, log, run.info(), which, line, missing=missing)


def _check_out(out: Path) -> Path:
    """`out` itself; raises unless a page may be written there."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}; make it first, or name another file")
    if out.is_dir():
        raise FileExistsError(f"{out}: a folder; name an HTML file")
    if out.exists() and GENERATOR not in out.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise FileExistsError(f"{out} exists already and is no report page; name another file, or remove it first")
    return out


def _complete(source: Source, which: Weights, num_images: int, data_root: Path | None) -> Source:
    """`source` with analysis and evaluation where they can be had, and why not where they cannot.

    A `data_root` that was asked for has to have the data.
    """
    run, found, missing = source.run, {}, {}
    weights = run.folder / f"{which}.safetensors"
    stored = read_analysis(run, which)
    if stored is not None:
        found["analysis"] = stored
    if not weights.is_file():
        sentence = f"The weights, {weights.name}, are not in the run folder."
        missing = {name: sentence for name in ("analysis", "evaluation") if name not in found}
        return Source(run, source.log, source.info, which, source.line, **found, missing=missing)
    config = run.config
    if data_root is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": data_root})})
    steps = {
        "evaluation": lambda: evaluate(run, config, which, num_images),
        "analysis": lambda: stored or analyze_run(run.folder, which, data_root=data_root).to_dict(),
    }
    for name, compute in steps.items():
        AcceleratorState._reset_state()  # else it keeps the precision of the first run for the whole process
        try:
            found[name] = compute()
        except (OSError, ValueError, ImportError) as error:
            if data_root is not None:
                raise
            missing[name] = f"It could not be computed: {' '.join(str(error).split())}."
    return Source(run, source.log, source.info, which, source.line, **found, missing=missing)


def read_analysis(run: Run, which: Weights) -> dict[str, Any] | None:
    """The analysis that is stored in a run folder; None if there is none, or none of these weights as they are now.

    Raises:
        ValueError: the file is damaged.
    """
    path, weights = run.folder / "analysis" / "analysis.json", run.folder / f"{which}.safetensors"
    if not path.is_file() or (weights.is_file() and weights.stat().st_mtime > path.stat().st_mtime):
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored if stored["weights"] == which else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); remove it, and it is computed again") from None


# One more evaluation


def evaluate(run: Run, config: Recipe, which: Weights, num_images: int) -> Evaluation:
    """Evaluates saved weights on the evaluation data of `config`.

    Raises:
        FileNotFoundError: no such weights, or data.
        ValueError: the weights or the data are damaged.
    """
    accelerator = make_accelerator(config)
    model = accelerator.unwrap_model(accelerator.prepare(load_model(run, which)))
    if not isinstance(config, Config):
        confusion = _count_answers(
            model, validation_batches(config, accelerator), len(config.data.classes), accelerator
        )
        return Evaluation({"top1": int(confusion.diag().sum()) / int(confusion.sum())}, confusion=confusion)
    _, dataset = build_datasets(config.data)
    loader = evaluation_loader(dataset, config, accelerator)
    with tempfile.TemporaryDirectory() as folder:
        metrics = evaluate_detector(model, loader, dataset, config, accelerator, save=Path(folder))
        results = json.loads((Path(folder) / "predictions.json").read_text(encoding="utf-8"))
    annotations = dataset.annotations
    curves = precision_recall(dataset.ground_truth(), results, annotations.category_ids)
    labels = {category: label for label, category in enumerate(annotations.category_ids, start=1)}
    detections: dict[int, list[list[float]]] = {record.image_id: [] for record in annotations.records}
    for row in results:
        if row["score"] >= SCORE_THRESHOLD:
            x, y, width, height = row["bbox"]
            rank = [x, y, x + width, y + height, row["score"], labels[row["category_id"]]]
            detections[row["image_id"]].append(rank)
    matched = [match(record, detections[record.image_id]) for record in annotations.records]
    order = [
        index for index, item in enumerate(matched) if item.num_right + item.num_wrong + item.num_missed
    ]  # F1 says nothing of an image with nothing in it and nothing found
    order.sort(key=lambda index: (-matched[index].f1, -matched[index].num_right))
    num_best = min(num_images, math.ceil(len(order) / 2))
    num_worst = min(num_images, len(order) - num_best)
    chosen = order[:num_best] + order[::-1][:num_worst]
    pictures = [
        draw_picture(model, annotations.records[index], dataset[index][0], matched[index], annotations.categories)
        for index in chosen
    ]
    return Evaluation(metrics, curves, pictures, num_best)


@torch.no_grad()
def _count_answers(model: nn.Module, batches: Iterable[Any], num_classes: int, accelerator: Accelerator) -> Tensor:
    """(K, K) images by true class (row) and answer (column)."""
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    device = next(model.parameters()).device
    for images, labels in batches:
        with accelerator.autocast():
            logits = model(images.to(device))
        # As top-1 is counted: argmax would choose another one of equals, as a silent network's logits are.
        answers = logits.float().topk(min(5, num_classes)).indices[:, 0].cpu()
        counts += torch.bincount(labels.cpu() * num_classes + answers, minlength=num_classes**2).view_as(counts)
    return counts


@dataclass(frozen=True)
class Match:
    """The detections of one image beside its boxes.

    Attributes:
        detections: x1, y1, x2, y2, score, label of each, highest score first.
        right: per detection whether it finds a box; None on a difficult box, where it is neither right nor wrong.
        found: per box whether it is found.
        ignore: per box whether it is difficult.
    """

    detections: list[list[float]]
    right: list[bool | None]
    found: list[bool]
    ignore: list[bool]

    @property
    def num_right(self) -> int:
        """Detections that find a box."""
        return self.right.count(True)

    @property
    def num_wrong(self) -> int:
        """Detections that find none."""
        return self.right.count(False)

    @property
    def num_missed(self) -> int:
        """Boxes that no detection finds, difficult ones left out."""
        return sum(not found and not ignore for found, ignore in zip(self.found, self.ignore, strict=True))

    @property
    def f1(self) -> float:
        """2 right / (2 right + wrong + missed), in [0, 1]; 1 where there is nothing to find and nothing found."""
        total = 2 * self.num_right + self.num_wrong + self.num_missed
        return 2 * self.num_right / total if total else 1.0


def match(record: Record, detections: Iterable[Sequence[float]]) -> Match:
    """Which detections of an image find a box, by VOC's rule as in `precision_recall`, at IoU 0.5.

    Args:
        record: the image and its boxes.
        detections: x1, y1, x2, y2, score, label of each.
    """
    rows = sorted((list(row) for row in detections), key=lambda row: -row[4])
    found = [False] * len(record.boxes)
    right: list[bool | None] = []
    boxes = torch.from_numpy(record.boxes)
    for row in rows:
        overlaps = box_iou(torch.tensor([row[:4]]), boxes)[0] if len(boxes) else torch.zeros(0)
        overlaps[torch.from_numpy(record.labels != int(row[5]))] = 0
        best = int(overlaps.argmax()) if len(overlaps) else -1
        if best < 0 or overlaps[best] < IOU_THRESHOLD:
            right.append(False)
        elif record.ignore[best]:
            right.append(None)
        else:
            right.append(not found[best])
            found[best] = True
    return Match(rows, right, found, record.ignore.tolist())


# Images with boxes

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


# Charts: the geometry is computed here, the template makes SVG of it

Points = Sequence[tuple[float, float]]
LayerValues = Callable[[Mapping[str, Any]], Mapping[str, float] | None]  # of a line of the log, by layer


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: what the legend says.
        points: (x, y), x rising.
        style: class that gives colour and dashes.
        depth: place of the layer in the network, 0 the first and 1 the last; None: no layer.
    """

    name: str
    points: Points
    style: str = "tone-0"
    depth: float | None = None


@dataclass(frozen=True)
class Chart:
    """A line chart as positions in a picture of `width` x `height` units, about pixels on a page."""

    title: str
    y_label: str
    x_label: str
    summary: str
    paths: list[dict[str, Any]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    layers: tuple[str, str] | None  # first and last, where lines are coloured by depth
    width: int = 360
    height: int = 230
    left: int = 46
    right: int = 350
    top: int = 22
    bottom: int = 192


def draw_chart(
    title: str,
    lines: Sequence[Line],
    y_label: str,
    x_label: str = "epoch",
    *,
    limits: tuple[float, float] | None = None,
    may_be_logarithmic: bool = False,
) -> Chart | None:
    """A chart of the lines; None if none of them has a point. The vertical axis starts at 0 unless it is logarithmic.

    Args:
        title: above the chart.
        lines: drawn in this order.
        y_label: name and unit of the vertical axis.
        x_label: the same of the horizontal one. Ticks are whole numbers for "epoch".
        limits: of both axes, where they are given by what is drawn.
        may_be_logarithmic: whether positive values over more than a factor of 10 get a logarithmic axis.
    """
    lines = [
        Line(line.name, [point for point in line.points if all(map(math.isfinite, point))], line.style, line.depth)
        for line in lines
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    x_values = [x for line in lines for x, _ in line.points]
    y_values = [y for line in lines for _, y in line.points]
    x_low, x_high = limits or (min(x_values), max(x_values))
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    logarithmic = may_be_logarithmic and 0 < 10 * min(y_values) < max(y_values)
    if limits is not None:
        y_low, y_high = limits
    elif logarithmic:
        y_low, y_high = min(y_values) / 1.15, max(y_values) * 1.15
    else:
        y_low, y_high = min(0.0, *y_values), 1.05 * max(0.0, *y_values) or 1.0
    chart = Chart  # its defaults are the frame

    def to_x(x: float) -> float:
        return chart.left + (chart.right - chart.left) * (x - x_low) / (x_high - x_low)

    def to_y(y: float) -> float:
        if logarithmic:
            y, low, high = math.log(y), math.log(y_low), math.log(y_high)
        else:
            low, high = y_low, y_high
        return chart.bottom - (chart.bottom - chart.top) * (y - low) / (high - low)

    paths = []
    for line in lines:
        first, last = line.points[0][1], line.points[-1][1]
        value = f"{line.name}: {first:.4g} \N{RIGHTWARDS ARROW} {last:.4g}"
        points = [(to_x(x), to_y(y)) for x, y in line.points]
        paths.append(
            {
                "name": line.name,
                "style": line.style if line.depth is None else "layer",
                "depth": line.depth,
                "title": value,
                "d": "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points),
                "dot": points[0] if len(points) == 1 else None,
            }
        )
    layers = [line.name for line in lines if line.depth is not None]
    if layers:
        ends = [line.points[-1][1] for line in lines if line.depth is not None]
        summary = f"{title}, {len(layers)} layers, at the end from {min(ends):.3g} to {max(ends):.3g}"
    else:
        shown = [path["title"] for path in paths[:8]]
        summary = f"{title}. " + "; ".join(shown) + (f"; {len(paths) - 8} more" if len(paths) > 8 else "")
    x_locator = MaxNLocator(6, integer=x_label == "epoch", min_n_ticks=1, steps=[1, 2, 5, 10])
    y_ticks = _ticks(LogLocator(subs=(1, 2, 5)) if logarithmic else MaxNLocator(5), y_low, y_high)
    if logarithmic and len(y_ticks) > 7:
        y_ticks = _ticks(LogLocator(), y_low, y_high)
    return Chart(
        title=title,
        y_label=y_label + (", logarithmic" if logarithmic else ""),
        x_label=x_label,
        summary=summary,
        paths=paths,
        x_ticks=[(to_x(x), f"{x:g}") for x in _ticks(x_locator, x_low, x_high)],
        y_ticks=[(to_y(y), _short(y)) for y in y_ticks],
        layers=(layers[0], layers[-1]) if layers else None,
    )


def _ticks(locator: MaxNLocator | LogLocator, low: float, high: float) -> list[float]:
    """Round numbers between the limits."""
    slack = 1e-9 * (high - low)
    return [float(tick) for tick in locator.tick_values(low, high) if low - slack <= tick <= high + slack]


def _short(value: float) -> str:
    """A tick's label of at most six letters."""
    value = 0.0 if abs(value) < 1e-12 else value
    return (
        f"{value:.3g}"
        if 1e-2 <= abs(value) < 1e4 or not value
        else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    )


def histograms(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per layer the membrane potentials around the threshold in the first and in the last evaluation, as outlines.

    A picture is 160 x 74 units; the axis goes from -1 to 3 times the effective threshold.
    """
    found = [(line["epoch"], line["potentials"]) for line in log if line.get("potentials")]
    if not found:
        return []
    pictures = []
    for layer, name in short_names(found[-1][1]).items():
        epochs = [(epoch, shares[layer]) for epoch, shares in found if layer in shares]
        epochs = epochs if len(epochs) == 1 else [epochs[0], epochs[-1]]
        highest = max(max(shares) for _, shares in epochs) or 1.0
        outlines = []
        for _, shares in epochs:
            step = 160 / len(shares)
            tops = [f"V{62 - 58 * share / highest:.1f}H{step * (index + 1):.1f}" for index, share in enumerate(shares)]
            outlines.append("M0 62" + "".join(tops) + "V62")
        firing = [100 * sum(shares[len(shares) // 2 :]) for _, shares in epochs]
        change = " \N{RIGHTWARDS ARROW} ".join(f"{value:.1f}" for value in firing)
        pictures.append(
            {
                "name": name,
                "outlines": outlines,
                "epochs": [epoch for epoch, _ in epochs],
                "note": f"{change} %",
            }
        )
    return pictures


# Views: what the template is given


def render(sources: Sequence[Source], command: Sequence[str] = ()) -> str:
    """The page as a string of HTML."""
    environment = Environment(
        loader=PackageLoader("detection"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": format_number,
        "breakable": lambda name: escape(name).replace(".", Markup(".<wbr>")),
        "percent": lambda share: f"{100 * share:.1f} %",
        "count": format_count,
        "energy": format_energy,
    }
    names = run_names([source.run.folder for source in sources])
    styles = run_styles(sources)
    runs = [
        describe(source, name, f"run{index}")
        for index, (source, name) in enumerate(zip(sources, names, strict=True), 1)
    ]
    for run, style in zip(runs, styles, strict=True):
        run["style"] = style
    return environment.get_template("report.html.j2").render(
        generator=GENERATOR,
        sections={
            key: name
            for key, name in SECTIONS.items()
            if key not in DETECTION_ONLY or sources[0].run.config.task == "detection"
        },
        runs=runs,
        comparison=compare(sources, runs) if len(runs) > 1 else None,
        unknown=UNKNOWN,
        command=" ".join(command),
        score_threshold=SCORE_THRESHOLD,
        picture_width=PICTURE_WIDTH,
        label_height=LABEL_HEIGHT,
    )


def describe(source: Source, name: str, key: str) -> dict[str, Any]:
    """Everything that the page shows of one run.

    Args:
        source: the run.
        name: what the page calls it.
        key: start of the ids of its sections.
    """
    config, log, line, analysis, evaluation = (
        source.run.config,
        source.log,
        source.line,
        source.analysis,
        source.evaluation,
    )
    spiking = config.model.backbone.activation != "relu"
    return {
        "key": key,
        "name": name,
        "folder": str(source.run.folder),
        "task": config.task,
        "network": describe_network(config),
        "data": describe_data(config),
        "which": source.which,
        "epoch": line["epoch"] if line else None,
        "state": describe_state(source),
        "spiking": spiking,
        "missing": source.missing,
        "headline": headline(source),
        "recipe": changed_settings(config),
        "config_file": (source.run.folder / "config.yaml").read_text(encoding="utf-8"),
        "curves": [chart for chart in curves(log, config.task) if chart],
        "log": log_table(log, config.task),
        "classes": class_table(line) if line and "per_class" in line else None,
        "precision_recall": precision_recall_view(evaluation.curves) if evaluation and evaluation.curves else None,
        "confusion": confusion_view(evaluation.confusion, config.data.classes)
        if evaluation and evaluation.confusion is not None
        else None,
        "activity": activity_rows(line) if line and line.get("activity_per_layer") else None,
        "analysis": analysis_view(analysis) if analysis else None,
        "dynamics": [chart for chart in dynamics(log) if chart],
        "histograms": histograms(log),
        "pictures": {
            "Best": evaluation.pictures[: evaluation.num_best],
            "Worst": evaluation.pictures[evaluation.num_best :],
        }
        if evaluation and evaluation.pictures
        else None,
        "again": compare_with_log(source),
        "info": source.info,
        "weights": weights_view(source),
    }


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many of the folders above them as it takes to tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    length = 1
    while len({path[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path[-length:]) for path in paths]


def without_common(paths: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """The paths without the folders that all of them are in; each keeps at least its last part."""
    common = 0
    while len({tuple(path[: common + 1]) for path in paths}) == 1 and all(len(path) > common + 1 for path in paths):
        common += 1
    return [path[common:] for path in paths]


def run_styles(sources: Sequence[Source]) -> list[str]:
    """Colour and dashes per run: cold colours for spiking networks, warm ones for analogue ones."""
    taken = {"cold": 0, "warm": 0}
    styles = []
    for source in sources:
        kind = "warm" if source.run.config.model.backbone.activation == "relu" else "cold"
        styles.append(f"{kind}-{taken[kind] % 4} dash-{taken[kind] % 4}")
        taken[kind] += 1
    return styles


def describe_network(config: Recipe) -> str:
    """Such as "RetinaNet, ResNet18 x0.5, spiking"."""
    backbone = config.model.backbone
    name = backbone.name
    for word in ("ResNet", "VGG", "MobileNetV"):
        name = name.replace(word.lower(), word)
    width = "" if backbone.width == 1 else f" \N{MULTIPLICATION SIGN}{backbone.width:g}"
    head = f"{NAMES[config.model.detector]}, " if isinstance(config, Config) else ""
    return f"{head}{name}{width}, {NAMES[backbone.activation]}"


def describe_data(config: Recipe) -> str:
    """Such as "voc data in data/bccd, 3 classes"."""
    data = config.data
    where = "drawn scenes" if data.format == "synthetic" and isinstance(config, Config) else f"{data.format} data"
    num = len(data.classes)
    return f"{where} in {data.root}" + (f", {plural(num, 'class', 'classes')}" if num else "")


def describe_state(source: Source) -> str:
    """Which weights the numbers belong to, and whether the training went to its end."""
    last, epochs = source.log[-1]["epoch"], source.run.config.train.epochs
    weights = {"last": "last", "best": "best", "ema": "averaged"}[source.which]
    sentences = [f"Numbers of the {weights} weights, epoch {source.line['epoch']} of {epochs}."] if source.line else []
    if last < epochs:
        sentences.append(f"The training has not gone to its end: {last} of {epochs} epochs are logged.")
    return " ".join(sentences)


def headline(source: Source) -> list[dict[str, Any]]:
    """The numbers at the top: metric, activity, energy against the twin, certificate, time. All come from the log or
    the analysis; what is not known has None for a value and a note that says why.
    """
    task, line, analysis = source.run.config.task, source.line, source.analysis
    spiking = source.run.config.model.backbone.activation != "relu"
    main, *others = METRICS[task]
    numbers = []
    if line:
        rest = ", ".join(f"{NAMES.get(key, key)} {format_number(line[key])}" for key in others if key in line)
        numbers.append(
            {
                "key": main,
                "label": NAMES.get(main, main),
                "value": line[main],
                "shown": format_number(line[main]),
                "note": rest,
            }
        )
    else:
        note = "No epoch has been evaluated yet."
        numbers.append({"key": main, "label": NAMES.get(main, main), "value": None, "shown": "not yet", "note": note})
    activity = line.get("activity") if line else None
    if activity is not None:
        numbers.append(
            {
                "key": "activity",
                "label": "Spike activity",
                "value": activity,
                "shown": f"{100 * activity:.1f} %",
                "note": "of the spiking neurons fire per image",
            }
        )
    else:
        note = "There is no log of it." if spiking else "The network is analogue: ReLU in place of spikes."
        numbers.append({"key": "activity", "label": "Spike activity", "value": None, "shown": "none", "note": note})
    numbers += analysis_headline(source, analysis, spiking)
    seconds = sum(row.get("seconds", 0.0) + row.get("eval_seconds", 0.0) for row in source.log)
    machine = source.info.get("machine", {})
    where = machine.get("gpu") or f"{plural(machine.get('threads', 0), 'thread')}, {machine.get('cpu', 'unknown CPU')}"
    numbers.append(
        {"key": "seconds", "label": "Training time", "value": seconds, "shown": format_time(seconds), "note": where}
    )
    return numbers


def analysis_headline(source: Source, analysis: dict[str, Any] | None, spiking: bool) -> list[dict[str, Any]]:
    """Energy and certificate for the headline."""
    energy = {"key": "energy", "label": "Energy", "value": None, "shown": "unknown", "note": ""}
    certificate = {"key": "certificate", "label": "Binarity", "value": None, "shown": "not checked", "note": ""}
    if analysis is None:
        energy["note"] = certificate["note"] = source.missing["analysis"]
        return [energy, certificate]
    ratio = analysis["ratios"].get("spiking/twin")
    if ratio is not None and ratio["operations"] is not None:
        energy |= {"value": ratio["operations"], "shown": f"{100 * ratio['operations']:.1f} %"}
        energy["note"] = f"of the analogue twin's for operations; {100 * ratio['with_sram']:.0f} % with traffic to SRAM"
    else:
        twin = analysis["networks"]["twin"]["total_pj"]
        energy |= {"value": twin, "shown": format_energy(twin)}
        energy["note"] = "for the operations of an image; this network is the analogue twin itself"
    verdict, note = certificate_verdict(analysis)
    return [energy, certificate | {"shown": verdict, "note": note}]


def certificate_verdict(analysis: Mapping[str, Any]) -> tuple[str, str]:
    """A word or two, and a sentence with what is behind them."""
    certificate = analysis["certificate"]
    if "spiking" not in analysis["networks"]:
        return "analogue", "It has no spike layer."
    if certificate["violations"]:
        number = len(certificate["violations"])
        return "not binary", f"{plural(number, 'layer sees', 'layers see')} other values than 0 and 1."
    layers, exceptions = plural(certificate["num_binary"], "layer"), len(certificate["exceptions"])
    if exceptions <= 1:  # the stem, which is always allowed to see pixels
        return "binary", f"{layers}, all but the first, which sees pixels, saw 0 and 1 only."
    return f"binary, {exceptions} exceptions", f"{layers} saw 0 and 1 only; {exceptions} are real-valued by design."


def analysis_view(analysis: Mapping[str, Any]) -> dict[str, Any]:
    """Networks side by side, layers with their energy, and the certificate, in an analysis as it is stored."""
    networks = analysis["networks"]
    most = max(network["total_sram_pj"] for network in networks.values()) or 1.0
    own = "spiking" if "spiking" in networks else "twin"
    rows = [
        dict(network)
        | {
            "name": NAMES[name],
            "style": "warm-0" if "twin" in name else "quiet" if name == "binary" else "cold-0",
            "operations_share": network["total_pj"] / most,
            "memory_share": network["memory_sram_pj"] / most,
            "to_first": network["total_pj"] / networks[own]["total_pj"] if networks[own]["total_pj"] else None,
        }
        for name, network in networks.items()
    ]
    layers = analysis["layers"]
    names = short_names(layer["name"] for layer in layers)
    highest = max((energy for layer in layers for energy in layer["energy_pj"].values()), default=0.0) or 1.0
    return {
        "num_images": analysis["num_images"],
        "costs": analysis["costs"],
        "networks": rows,
        "own": NAMES[own],
        "layers": [
            dict(layer)
            | {
                "name": names[layer["name"]],
                "bars": [
                    {
                        "name": NAMES[key],
                        "style": style,
                        "energy": layer["energy_pj"][key],
                        "share": layer["energy_pj"][key] / highest,
                    }
                    for key, style in (("spiking", "cold-0"), ("twin", "warm-0"))
                    if key in layer["energy_pj"]
                ],
            }
            for layer in layers
        ],
        "first_layer": analysis["first_layer"],
        "certificate": dict(analysis["certificate"])
        | dict(zip(("verdict", "note"), certificate_verdict(analysis), strict=True)),
    }


def changed_settings(config: Recipe) -> list[dict[str, str]]:
    """The keys of a recipe whose values are not the defaults, with both values and what the key means."""
    kind = type(config)
    defaults = flatten(kind.model_construct(data=kind.model_fields["data"].annotation.model_construct()))
    meaning = dict(_descriptions(kind))
    return [
        {"key": key, "value": show_value(value), "default": show_value(defaults[key]), "meaning": meaning[key]}
        for key, value in flatten(config).items()
        if value != defaults[key] and key != "data.classes"  # which the training fills in
    ]


def _descriptions(kind: type[BaseModel], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Key and description of every leaf of a recipe."""
    for name, info in kind.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _descriptions(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info.description or ""


def show_value(value: Any) -> str:
    """A setting as a recipe would have it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show_value, value)) or "empty"
    return f"{value:g}" if isinstance(value, float) else str(value) or "empty"


def curves(log: Sequence[Mapping[str, Any]], task: str) -> list[Chart | None]:
    """Losses, metric, activity, thresholds, learning rate and speed over the epochs."""
    terms = [key for key in dict.fromkeys(key for line in log for key in line) if key.startswith("loss/")]
    losses = [Line("total", points_of(log, "loss"), "strong")]
    losses += [
        Line(key.removeprefix("loss/"), points_of(log, key), f"tone-{index % 8}") for index, key in enumerate(terms)
    ]
    keys = METRICS[task]
    metrics = [Line(key, points_of(log, key), f"tone-{index}") for index, key in enumerate(keys)]
    averaged = [{"epoch": line["epoch"]} | line["ema"] for line in log if line.get("ema")]
    metrics += [Line(f"{keys[0]}, averaged weights", points_of(averaged, keys[0]), "tone-3 dash-1")] if averaged else []
    activity = layer_lines(log, lambda line: line.get("activity_per_layer"), scale=100)
    activity.append(Line("whole network", [(x, 100 * y) for x, y in points_of(log, "activity")], "strong"))
    return [
        draw_chart("Training loss", losses, "mean over the epoch", may_be_logarithmic=True),
        draw_chart("Accuracy" if task == "classification" else "Average precision", metrics, "share, 0 to 1"),
        draw_chart("Spike activity", activity, "neurons that fire, %"),
        draw_chart("Effective threshold", layer_lines(log, effective_threshold), "|v_th| \N{MULTIPLICATION SIGN} E"),
        draw_chart("Learning rate", [Line("learning rate", points_of(log, "lr"))], "at the beginning of the epoch"),
        draw_chart(
            "Training speed", [Line("images per second", points_of(log, "images_per_second"))], "images per second"
        ),
    ]


def dynamics(log: Sequence[Mapping[str, Any]]) -> list[Chart | None]:
    """Threshold, extremum and regulariser of each spike layer over the epochs."""
    return [
        draw_chart("Threshold v_th", layer_lines(log, lambda line: line.get("v_th")), "v_th, membrane potential"),
        draw_chart("Hoyer extremum E", layer_lines(log, lambda line: line.get("extremum")), "E, 0 to 1"),
        draw_chart(
            "Hoyer regulariser H", layer_lines(log, lambda line: line.get("hoyer_per_layer")), "H, epoch's mean"
        ),
    ]


def points_of(log: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(epoch, value) of a key where a line has it; -1 stands for undefined and is left out."""
    return [(line["epoch"], float(line[key])) for line in log if line.get(key) is not None and line[key] != -1]


def effective_threshold(line: Mapping[str, Any]) -> dict[str, float]:
    """|v_th| * E per layer, that is the membrane potential from which on it fires."""
    extremum = line.get("extremum") or {}
    return {name: abs(value) * extremum[name] for name, value in (line.get("v_th") or {}).items() if name in extremum}


def layer_lines(log: Sequence[Mapping[str, Any]], of: LayerValues, scale: float = 1.0) -> list[Line]:
    """A line per layer of what `of` gives for each line of the log, in the order of the network."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in log:
        for name, value in (of(line) or {}).items():
            found.setdefault(name, []).append((line["epoch"], scale * value))
    last = max(1, len(found) - 1)
    return [
        Line(name, found[layer], depth=index / last) for index, (layer, name) in enumerate(short_names(found).items())
    ]


def short_names(layers: Iterable[str]) -> dict[str, str]:
    """Layer -> its name without the modules that all of them are in."""
    layers = list(layers)
    paths = without_common([layer.split(".") for layer in layers])
    return {layer: ".".join(path) for layer, path in zip(layers, paths, strict=True)}


def log_table(log: Sequence[Mapping[str, Any]], task: str) -> dict[str, Any]:
    """The scalars of the log, a row per epoch."""
    terms = [key for key in dict.fromkeys(key for line in log for key in line) if key.startswith("loss/")]
    keys = ["loss", *terms, *METRICS[task], "activity", "seconds"]
    keys = [key for key in keys if any(line.get(key) is not None for line in log)]
    rows = [[line["epoch"], *(line.get(key) for key in keys)] for line in log]
    return {"columns": ["epoch", *(key.removeprefix("loss/") for key in keys)], "rows": rows}


def class_table(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """AP per class, the highest first, classes without boxes at the end."""
    rows = [{"name": name} | dict(values) for name, values in line["per_class"].items()]
    return sorted(rows, key=lambda row: -row["AP"])


def precision_recall_view(found: Mapping[str, PrecisionRecall]) -> dict[str, Any] | None:
    """A chart of precision over recall and a table; of more than eight classes the four best and worst have colours."""
    with_boxes = {name: curve for name, curve in found.items() if curve.num_boxes}
    values = {name: average_precision(curve, "area") for name, curve in with_boxes.items()}
    order = sorted(values, key=lambda name: -values[name])
    coloured = order if len(order) <= 8 else order[:4] + order[-4:]
    lines = [Line(name, _outline(with_boxes[name]), "quiet") for name in order if name not in coloured]
    lines += [
        Line(f"{name} {values[name]:.3f}", _outline(with_boxes[name]), f"tone-{index}")
        for index, name in enumerate(coloured)
    ]
    rows = [
        {
            "name": name,
            "AP": values[name],
            "num_boxes": with_boxes[name].num_boxes,
            "num_detections": len(with_boxes[name].scores),
            "recall": float(with_boxes[name].recall[-1]) if len(with_boxes[name].scores) else 0.0,
        }
        for name in order
    ]
    chart = draw_chart("Classes", lines, "precision, highest from here on", "recall", limits=(0.0, 1.0))
    return {"chart": chart, "rows": rows, "num_quiet": len(order) - len(coloured)} if chart else None


def _outline(curve: PrecisionRecall) -> Points:
    """The corners of precision (highest at this recall or above) over recall, down to 0 where the recall ends."""
    if not len(curve.scores):
        return [(0.0, 0.0)]
    recall, precision = curve.recall, curve.envelope
    corners = [(0.0, float(precision[0]))]
    for index in np.flatnonzero(np.diff(precision) != 0).tolist():  # the last point before each fall
        corners += [
            (float(recall[index]), float(precision[index])),
            (float(recall[index]), float(precision[index + 1])),
        ]
    return [*corners, (float(recall[-1]), float(precision[-1])), (float(recall[-1]), 0.0)]


def confusion_view(confusion: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Share of right answers per class, the lowest first, and the ten most frequent mistakes."""
    totals = confusion.sum(1)
    rows = [
        {"name": name, "share": float(confusion[index, index]) / int(totals[index]), "num_images": int(totals[index])}
        for index, name in enumerate(class_names)
        if totals[index]
    ]
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    pairs = []
    for place in wrong.argsort(descending=True, stable=True)[:10].tolist():
        truth, answer = divmod(place, len(class_names))
        if wrong[place]:
            pairs.append(
                {
                    "truth": class_names[truth],
                    "answer": class_names[answer],
                    "num": int(wrong[place]),
                    "share": int(wrong[place]) / int(totals[truth]),
                }
            )
    return {"rows": sorted(rows, key=lambda row: row["share"]), "pairs": pairs}


def activity_rows(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Activity, v_th, extremum, effective threshold and H of each spike layer."""
    rates = line["activity_per_layer"]
    thresholds = effective_threshold(line)
    highest = max(rates.values()) or 1.0
    return [
        {
            "name": name,
            "layer": layer,
            "activity": rates[layer],
            "share": rates[layer] / highest,
            "v_th": (line.get("v_th") or {}).get(layer),
            "extremum": (line.get("extremum") or {}).get(layer),
            "threshold": thresholds.get(layer),
            "H": (line.get("hoyer_per_layer") or {}).get(layer),
        }
        for layer, name in short_names(rates).items()
    ]


def compare_with_log(source: Source) -> str | None:
    """A sentence that says whether the evaluation gave the logged numbers again; None without one."""
    if source.evaluation is None or source.line is None:
        return None
    keys = [key for key in METRICS[source.run.config.task] if key in source.evaluation.metrics]
    now, then = source.evaluation.metrics, source.line
    if all(now[key] == then[key] for key in keys):
        return f"Evaluated again for this page: {', '.join(keys)} equal to the log in every digit."
    parts = [f"{key} {now[key]:.4f} (log: {then[key]:.4f})" for key in keys]
    return f"Evaluated again for this page, not equal to the log: {', '.join(parts)}."


def weights_view(source: Source) -> list[dict[str, str]]:
    """SHA-256 of each weights file, and whether the file is here and the same."""
    logged, here = source.info.get("sha256", {}), source.run.checksums()
    rows = []
    for name in sorted(logged.keys() | here.keys()):
        if name not in here:
            state = "not in the folder"
        elif name not in logged:
            state = "not in run.json"
        else:
            state = "in the folder, equal" if here[name] == logged[name] else "in the folder, but another file"
        rows.append({"name": name, "sha256": logged.get(name) or here[name], "state": state})
    return rows


def compare(sources: Sequence[Source], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs side by side: the headline with gaps to the first run, curves on top of each other, settings."""
    task = sources[0].run.config.task
    metrics = [key for key in METRICS[task] if any(source.line and key in source.line for source in sources)]
    rows = []
    for source, run in zip(sources, runs, strict=True):
        cells = []
        for key in metrics:
            value = source.line.get(key) if source.line else None
            first = sources[0].line.get(key) if sources[0].line else None
            gap = None if value is None or first is None or source is sources[0] else value - first
            cells.append({"key": key, "value": value, "gap": gap})
        numbers = {number["key"]: number for number in run["headline"]}
        rows.append({"run": run, "metrics": cells, "numbers": numbers, "epoch": run["epoch"]})
    charts = []
    for title, key, scale, label in [
        *((NAMES.get(key, key), key, 1, "share, 0 to 1") for key in metrics[:2]),
        ("Training loss", "loss", 1, "mean over the epoch"),
        ("Spike activity", "activity", 100, "neurons that fire, %"),
    ]:
        lines = [
            Line(run["name"], [(x, scale * y) for x, y in points_of(source.log, key)], run["style"])
            for source, run in zip(sources, runs, strict=True)
        ]
        charts.append(draw_chart(title, lines, label, may_be_logarithmic=key == "loss"))
    settings = [flatten(source.run.config) for source in sources]
    differences = [
        {"key": key, "values": [show_value(setting[key]) for setting in settings]}
        for key in settings[0]
        if any(setting[key] != settings[0][key] for setting in settings)
    ]
    return {
        "metrics": [NAMES.get(key, key) for key in metrics],
        "rows": rows,
        "charts": [chart for chart in charts if chart],
        "differences": differences,
    }


# Numbers as text


def format_number(value: float | None) -> str:
    """Three digits after the point; pycocotools' -1 for undefined in words."""
    if value is None:
        return "\N{EN DASH}"
    return "undefined" if value == -1 else f"{value:.3f}"


def format_count(value: float) -> str:
    """Such as 12.3 M."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def format_energy(picojoule: float) -> str:
    """Such as 4.56 \N{MICRO SIGN}J."""
    for factor, unit in ((1e12, "J"), (1e9, "mJ"), (1e6, "\N{MICRO SIGN}J"), (1e3, "nJ")):
        if abs(picojoule) >= factor:
            return f"{picojoule / factor:.3g} {unit}"
    return f"{picojoule:.3g} pJ"


def plural(number: int, singular: str, several: str | None = None) -> str:
    """Such as 1 layer, 2 layers."""
    return f"{number} {singular if number == 1 else several or singular + 's'}"


def format_time(seconds: float) -> str:
    """Such as 1 h 5 min, 24 min or 12 s."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
