"""What is known about a run: its log, and what one more evaluation adds."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from backbones import zoo
from detection.analysis import analyze_run
from detection.checkpoint import Run, Weights
from detection.classification import validation_batches
from detection.config import Config
from detection.data import build_datasets
from detection.evaluation import PrecisionRecall, precision_recall
from detection.report.matching import match
from detection.report.pictures import Picture, draw_picture
from detection.report.words import METRICS
from detection.tasks import evaluate_detector, evaluation_loader, load_for_evaluation, logged_line

SCORE_THRESHOLD = 0.3  # detections with a lower score are neither drawn nor counted in an image's F1


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
    if not zoo.locate(folder).is_dir():
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


def complete(source: Source, which: Weights, num_images: int, data_root: Path | None) -> Source:
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
    steps = {
        "evaluation": lambda: evaluate(Run.open(run.folder, data_root), which, num_images),
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
    """The analysis stored among a run's products; None if there is none, or none of these weights as they are now.

    Raises:
        ValueError: the file is damaged.
    """
    path, weights = run.products / "analysis" / "analysis.json", run.folder / f"{which}.safetensors"
    if not path.is_file() or (weights.is_file() and weights.stat().st_mtime > path.stat().st_mtime):
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored if stored["weights"] == which else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); remove it, and it is computed again") from None


def evaluate(run: Run, which: Weights, num_images: int) -> Evaluation:
    """Evaluates saved weights on the run's evaluation data.

    Raises:
        FileNotFoundError: no such weights, or data.
        ValueError: the weights or the data are damaged.
    """
    config = run.config
    model, accelerator = load_for_evaluation(run, which)
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
