"""Trains and evaluates a classifier: pretraining of a backbone, by the same loop and into the same kind of run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detection.checkpoint import Run, Weights
from detection.config import ClassificationConfig
from detection.data import SeededItems, TrainingBatches, TrainingLoader, evaluation_batches, loader_options
from detection.data.images import (
    FolderImages,
    Images,
    MemoryBatches,
    check_files,
    read_folder,
    read_images,
)
from detection.engine import Batches
from detection.models import build_classifier
from detection.tasks import (
    check_run,
    load_for_evaluation,
    logged_line,
    make_accelerator,
    tell,
    train_into_run,
    watch_spikes,
)


def train_classifier(
    config: ClassificationConfig,
    folder: str | Path,
    command: Sequence[str],
    *,
    download: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Trains the classifier of a recipe into a run folder; gives the last line of its log.

    Args:
        config: the recipe.
        folder: where the run goes; must not exist, or be empty, or with `resume` be a run of this recipe.
        command: how the run was started, for its log.
        download: fetch CIFAR if it is missing.
        resume: go on with the run in `folder` from its last saved state, or from the beginning if it has none.
    """
    check_run(config, folder, resume=resume)
    accelerator = make_accelerator(config, folder)
    batches, classes = training_batches(config, accelerator, download=download)
    config = config.model_copy(update={"data": config.data.model_copy(update={"classes": list(classes)})})
    val_batches = validation_batches(config, accelerator)
    set_seed(config.train.seed)
    model = build_classifier(config)

    def compute_losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        images, labels = batch
        return {"classification": F.cross_entropy(model(images), labels, label_smoothing=config.label_smoothing)}

    _, line = train_into_run(
        model,
        batches,
        compute_losses=compute_losses,
        evaluate=lambda model: evaluate_classifier(model, val_batches, accelerator),
        best_by="top1",
        config=config,
        folder=folder,
        command=command,
        accelerator=accelerator,
        resume=resume,
    )
    return line


def evaluate_classification_run(
    folder: str | Path, which: Weights = "last", *, data_root: str | Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of a saved run, computed anew, and the log line of the epoch that the weights come from.

    Args:
        folder: the run, as `Run.open` takes it.
        which: which of its weights.
        data_root: where its data lie now; None: where they lay when it was trained.

    Raises:
        FileNotFoundError: no such run, weights, or data.
        ValueError: the weights are damaged or do not fit.
    """
    run = Run.open(folder, data_root)
    if not isinstance(run.config, ClassificationConfig):
        raise ValueError(f"{folder}: a run of {run.config.task}, not of classification")
    logged = logged_line(run, which, "top1")
    model, accelerator = load_for_evaluation(run, which)
    return evaluate_classifier(model, validation_batches(run.config, accelerator), accelerator), logged


def training_batches(
    config: ClassificationConfig, accelerator: Accelerator, *, download: bool = False
) -> tuple[Batches, tuple[str, ...]]:
    """This process's share of the training batches, and the class names.

    What had to be left out is told on standard error, here and in `validation_batches`.
    """
    data, train = config.data, config.train
    if in_memory(config):
        with accelerator.main_process_first():  # which fetches what the others find
            images = read_images(data, "train", download=download)
        if accelerator.is_main_process:
            tell("train", images.dropped)
        batches = memory_batches(images, config, accelerator, augment=data.augment, seed=train.seed)
        return batches, images.classes
    files = check_files(read_folder(data.root / data.train, data.classes), data.verify)
    if accelerator.is_main_process:
        tell("train", files.dropped)
    order = TrainingBatches(
        len(files.files),
        train.batch_size,
        seed=train.seed,
        share=(accelerator.process_index, accelerator.num_processes),
        drop_single=True,
    )
    items = SeededItems(FolderImages(files, data, train=True))
    return TrainingLoader(items, batch_sampler=order, **loader_options(data.workers)), files.classes


def validation_batches(config: ClassificationConfig, accelerator: Accelerator) -> Iterable[Any]:
    """This process's share of the validation batches of a recipe whose class names are filled in."""
    data = config.data
    if in_memory(config):
        images = read_images(data, "val")
        if accelerator.is_main_process:
            tell("val", images.dropped)
        return memory_batches(images, config, accelerator)
    files = check_files(read_folder(data.root / data.val, data.classes), data.verify)
    if accelerator.is_main_process:
        tell("val", files.dropped)
    share = (accelerator.process_index, accelerator.num_processes)
    batches = evaluation_batches(len(files.files), config.train.batch_size, share)
    return DataLoader(FolderImages(files, data, train=False), batch_sampler=batches, **loader_options(data.workers))


def in_memory(config: ClassificationConfig) -> bool:
    """Whether all pixels lie on the training device: always, but for large images in folders."""
    return config.data.in_memory or config.data.format != "folder"


def memory_batches(
    images: Images, config: ClassificationConfig, accelerator: Accelerator, **options: Any
) -> MemoryBatches:
    """This process's share of the images as batches of the recipe."""
    return MemoryBatches(
        images,
        accelerator.device,
        batch_size=config.train.batch_size,
        mean=config.data.mean,
        std=config.data.std,
        share=(accelerator.process_index, accelerator.num_processes),
        **options,
    )


@torch.no_grad()
def evaluate_classifier(model: nn.Module, batches: Iterable[Any], accelerator: Accelerator) -> dict[str, Any]:
    """Accuracy "top1" and "top5" in [0, 1], "val_loss" (mean cross entropy), and the spike activity on the way.

    "activity" is the share of all spiking neurons that fire per image, "activity_per_layer" the same by layer; these
    and "potentials" (`record_potentials` of the first batch) are absent from a model without spike layers. With fewer
    than five classes "top5" takes as many as there are.
    """
    counts = []
    with watch_spikes(model) as spikes:
        for images, labels in batches:
            images, labels = images.to(accelerator.device), labels.to(accelerator.device)
            with accelerator.autocast():
                logits = model(images)
            counts.append(torch.stack(_count(logits.float(), labels)))
    # Batch b is the b // n-th of process b % n: summed in their order, for the same digits with any number of them.
    shares = gather_object([torch.stack(counts).tolist() if counts else []])
    in_order = [count for row in itertools.zip_longest(*shares) for count in row if count is not None]
    number, top1, top5, loss = (sum(column) for column in zip(*in_order, strict=True))
    return {"top1": top1 / number, "top5": top5 / number, "val_loss": loss / number, **spikes()}


def _count(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Images, right answers, right answers among the first five, and summed cross entropy of a batch, in float64."""
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    return [
        torch.tensor(len(labels), device=loss.device).double(),
        best[:, 0].sum().double(),
        best.sum().double(),
        loss,
    ]
