"""What the command-line tools call: train a detector, evaluate a saved run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from backbones import record_activity, spike_activity
from detection.checkpoint import Run, Weights
from detection.config import Config
from detection.data import DetectionDataset, build_datasets, build_loader
from detection.engine import fit
from detection.evaluation import CocoEvaluator
from detection.models import build_detector
from detection.plots import plot_curves, plot_predictions

NUM_PICTURES = 12


def train_detector(config: Config, folder: str | Path, command: Sequence[str]) -> dict[str, Any]:
    """Trains the detector of a recipe into a new run folder; gives the last line of its log.

    The folder is made only once data and model are known to be sound.

    Args:
        config: the recipe.
        folder: where the run goes; must not exist, or be empty.
        command: how the run was started, for its log.
    """
    Run.check_free(folder)
    train, val = read_data(config)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"classes": list(train.annotations.categories)})}
    )
    accelerator = Accelerator(
        mixed_precision=config.train.precision,
        log_with="tensorboard" if config.train.tensorboard else None,
        project_dir=folder if config.train.tensorboard else None,
    )
    set_seed(config.train.seed)
    model = build_detector(config)
    if config.train.compile:
        model.backbone.compile()
    run = Run.create(folder, config, list(command)) if accelerator.is_main_process else Run(Path(folder), config)
    accelerator.init_trackers("tensorboard")
    loader = build_loader(
        train, batch_size=config.train.batch_size, workers=config.data.workers, shuffle=True, seed=config.train.seed
    )
    val_loader = evaluation_loader(val, config, accelerator)
    try:
        line = fit(
            model,
            loader,
            compute_losses=lambda model, batch: model(*batch),
            evaluate=lambda model: evaluate_detector(model, val_loader, val, accelerator),
            best_by="AP",
            config=config,
            run=run,
            accelerator=accelerator,
        )
    except BaseException:
        if accelerator.is_main_process:
            run.discard_if_empty()
        raise
    accelerator.end_training()
    if accelerator.is_main_process:
        run.write_info(run.info() | {"sha256": run.checksums()})
        plot_curves(run.history(), run.folder / "curves.png")
        draw_predictions(accelerator.unwrap_model(model), val, run.folder / "predictions.png")
    return line


def evaluate_run(folder: str | Path, which: Weights = "last") -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of a saved run, computed anew, and the log line of the epoch that the weights come from.

    Raises:
        FileNotFoundError: no such run, weights, or data.
        ValueError: the weights are damaged or do not fit.
    """
    run = Run.open(folder)
    history = [line for line in run.history() if "AP" in line]
    logged = history[-1] if which == "last" else max(history, key=lambda line: line["AP"])
    accelerator = Accelerator(mixed_precision=run.config.train.precision)
    model = build_detector(without_pretraining(run.config))
    run.load(model, which)
    _, val = build_datasets(run.config.data)
    model = accelerator.prepare(model)
    loader = evaluation_loader(val, run.config, accelerator)
    return evaluate_detector(model.eval(), loader, val, accelerator), logged


@torch.no_grad()
def evaluate_detector(
    model: nn.Module, loader: DataLoader, dataset: DetectionDataset, accelerator: Accelerator
) -> dict[str, Any]:
    """COCO's 12 numbers of `model` in evaluation mode, "per_class" AP, and the spike activity on the way.

    "activity" is the share of all spiking neurons that fire per image, "activity_per_layer" the same by layer;
    both are absent from a model without spike layers.
    """
    evaluator = CocoEvaluator(dataset.ground_truth(), dataset.annotations.category_ids)
    device = next(model.parameters()).device
    # Hooks count the spikes, and compiled code may skip hooks.
    with record_activity(model) as activity, torch.compiler.set_stance("force_eager"):
        for images, targets in loader:
            with accelerator.autocast():
                predictions = model([image.to(device) for image in images])
            evaluator.update([target["image_id"] for target in targets], [to_cpu(each) for each in predictions])
    evaluator.results = gather_object(evaluator.results)
    metrics: dict[str, Any] = evaluator.compute()
    metrics["per_class"] = evaluator.per_class()
    if activity:
        metrics["activity"] = spike_activity(activity)
        metrics["activity_per_layer"] = {name: layer.firing_rate for name, layer in activity.items()}
    return metrics


def evaluation_loader(dataset: DetectionDataset, config: Config, accelerator: Accelerator) -> DataLoader:
    """Batches of this process's share of `dataset`: each image goes to exactly one process."""
    mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    return build_loader(
        Subset(dataset, mine),
        batch_size=config.train.batch_size,
        workers=config.data.workers,
        shuffle=False,
        seed=config.train.seed,
    )


def read_data(config: Config) -> tuple[DetectionDataset, DetectionDataset]:
    """Training and validation data; what had to be left out is told on standard error."""
    datasets = build_datasets(config.data)
    for name, dataset in zip(("train", "val"), datasets, strict=True):
        for sentence in dataset.annotations.dropped:
            print(f"{name}: {sentence}", file=sys.stderr)
    return datasets


@torch.no_grad()
def draw_predictions(model: nn.Module, dataset: DetectionDataset, path: Path) -> None:
    """A contact sheet of the first validation images with predicted and true boxes."""
    samples = [dataset[index] for index in range(min(NUM_PICTURES, len(dataset)))]
    device = next(model.parameters()).device
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        predictions = [to_cpu(model([image.to(device)])[0]) for image, _ in samples]
    images, targets = zip(*samples, strict=True)
    plot_predictions(list(images), predictions, list(targets), dataset.annotations.categories, path)


def without_pretraining(config: Config) -> Config:
    """`config` without the file that its backbone started from: a saved run brings its own weights."""
    backbone = config.model.backbone.model_copy(update={"weights": None})
    return config.model_copy(update={"model": config.model.model_copy(update={"backbone": backbone})})


def to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same dict with every tensor on the CPU."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}
