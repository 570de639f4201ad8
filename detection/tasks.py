"""What the command-line tools call: train a detector, evaluate a saved run."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from backbones import LayerActivity, record_activity, record_potentials, spike_activity
from detection.checkpoint import Run, Weights, write_whole
from detection.config import Config, Recipe
from detection.data import DetectionDataset, build_datasets, build_loader
from detection.data.download import download as fetch
from detection.distillation import learn_from
from detection.engine import ComputeLosses, Evaluate, fit
from detection.evaluation import CocoEvaluator, import_backend, mean_average_precision, precision_recall
from detection.models import build_detector, load_model
from detection.plots import plot_curves, plot_dynamics, plot_precision_recall, plot_predictions

NUM_PICTURES = 12


def train_detector(
    config: Config, folder: str | Path, command: Sequence[str], *, download: bool = False
) -> dict[str, Any]:
    """Trains the detector of a recipe into a new run folder; gives the last line of its log.

    The folder is made only once data and model are known to be sound.

    Args:
        config: the recipe.
        folder: where the run goes; must not exist, or be empty.
        command: how the run was started, for its log.
        download: fetch VOC or COCO if it is missing.
    """
    check_run(config, folder)
    import_backend(config.evaluation.backend)
    accelerator = make_accelerator(config, folder)
    with accelerator.main_process_first():  # which fetches what the others find
        if download:
            fetch(config.data)
    train, val = read_data(config, quiet=not accelerator.is_main_process)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"classes": list(train.annotations.categories)})}
    )
    set_seed(config.train.seed)
    model = build_detector(config)
    loader = build_loader(
        train,
        batch_size=config.train.batch_size,
        workers=config.data.workers,
        shuffle=True,
        seed=config.train.seed,
        aspect_groups=config.data.aspect_groups,
    )
    val_loader = evaluation_loader(val, config, accelerator)
    run, line = train_into_run(
        model,
        loader,
        compute_losses=lambda model, batch: model(*batch),
        evaluate=lambda model: evaluate_detector(model, val_loader, val, config, accelerator),
        best_by="AP",
        config=config,
        folder=folder,
        command=command,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        draw_predictions(accelerator.unwrap_model(model), val, run.folder / "predictions.png")
    return line


def check_run(config: Recipe, folder: str | Path) -> None:
    """Nothing; raises if `folder` is taken already, or a package that the recipe asks for is missing."""
    Run.check_free(folder)
    if config.train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ImportError("train.tensorboard needs TensorBoard: pip install hoyer-det[tensorboard]")


def make_accelerator(config: Recipe, folder: str | Path) -> Accelerator:
    """Device, precision and processes of a training."""
    return Accelerator(
        mixed_precision=config.train.precision,
        log_with="tensorboard" if config.train.tensorboard else None,
        project_dir=folder if config.train.tensorboard else None,
    )


def train_into_run(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    compute_losses: ComputeLosses,
    evaluate: Evaluate,
    best_by: str,
    config: Recipe,
    folder: str | Path,
    command: Sequence[str],
    accelerator: Accelerator,
) -> tuple[Run, dict[str, Any]]:
    """Trains `model` into a new run folder, with a teacher, compiled, in channels-last order as the recipe says.

    A run that ends before its first epoch does leaves no folder. See `fit` for the rest.
    """
    if config.distillation.teacher is not None:
        compute_losses = learn_from(config.distillation, compute_losses, model, config, accelerator)
    if config.train.channels_last:  # of the weights; the feature maps follow them
        model.to(memory_format=torch.channels_last)
    if config.train.compile:
        model.backbone.compile()
    run = Run.create(folder, config, list(command)) if accelerator.is_main_process else Run(Path(folder), config)
    accelerator.init_trackers("tensorboard")
    try:
        line = fit(
            model,
            batches,
            compute_losses=compute_losses,
            evaluate=evaluate,
            best_by=best_by,
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
        if "v_th" in line:
            plot_dynamics(run.history(), run.folder / "dynamics.png")
    return run, line


def evaluate_run(
    folder: str | Path, which: Weights = "last", *, save: str | Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of a saved run, computed anew, and the log line of the epoch that the weights come from.

    Args:
        folder: the run.
        which: which of its weights.
        save: where `evaluate_detector` writes its files; must not exist, or be empty.

    Raises:
        FileExistsError: there is something in `save` already.
        FileNotFoundError: no such run, weights, or data.
        ImportError: the package of the run's evaluation.backend is not installed.
        ValueError: the weights are damaged or do not fit.
    """
    if save is not None:
        save = Run.check_free(save)
    run = Run.open(folder)
    if not isinstance(run.config, Config):
        raise ValueError(f"{folder}: a run of {run.config.task}, not of detection")
    logged = logged_line(run, which, "AP")
    accelerator = Accelerator(mixed_precision=run.config.train.precision)
    # As in training: on the device and with its precision, and layers without the name of a wrapper in front.
    model = accelerator.unwrap_model(accelerator.prepare(load_model(run, which)))
    _, val = build_datasets(run.config.data)
    loader = evaluation_loader(val, run.config, accelerator)
    return evaluate_detector(model, loader, val, run.config, accelerator, save=save), logged


def logged_line(run: Run, which: Weights, best_by: str) -> dict[str, Any]:
    """The line of the run's log that has the metrics of these weights; those of the average stand under "ema".

    Raises:
        FileNotFoundError: the run has no such weights, or no log.
    """
    history = [line for line in run.history() if best_by in line]
    if not history:
        raise FileNotFoundError(f"{run.folder}: its log has no {best_by} yet; it ended before its first evaluation")
    if which == "ema":
        if "ema" not in history[-1]:
            raise FileNotFoundError(f"{run.folder}: no such weights as ema; it was trained without train.ema_decay")
        return history[-1] | history[-1]["ema"]
    return history[-1] if which == "last" else max(history, key=lambda line: line[best_by])


@torch.no_grad()
def evaluate_detector(
    model: nn.Module,
    loader: DataLoader,
    dataset: DetectionDataset,
    config: Config,
    accelerator: Accelerator,
    *,
    save: Path | None = None,
) -> dict[str, Any]:
    """COCO's 12 numbers of `model` in evaluation mode, "per_class" AP, VOC's AP50, and the spike activity on the way.

    "voc" has the mean over the classes of VOC's average precision at IoU 0.5, "AP50_11point" and "AP50_area".
    "activity" is the share of all spiking neurons that fire per image, "activity_per_layer" the same by layer;
    these and "potentials" (`record_potentials` of the first batch) are absent from a model without spike layers.

    Args:
        model: the detector.
        loader: this process's share of the images; every number is that of all processes together.
        dataset: the images of all processes.
        config: says who counts COCO's numbers.
        accelerator: of the run.
        save: folder to write predictions.json (COCO results), metrics.json (what is returned) and
            precision_recall.png (IoU 0.5) into; it is made if need be.
    """
    ground_truth, category_ids = dataset.ground_truth(), dataset.annotations.category_ids
    evaluator = CocoEvaluator(ground_truth, category_ids, config.evaluation.backend)
    device = next(model.parameters()).device
    with watch_spikes(model) as spikes:
        for images, targets in loader:
            with accelerator.autocast():
                predictions = model([image.to(device) for image in images])
            evaluator.update([target["image_id"] for target in targets], [to_cpu(each) for each in predictions])
    # VOC ranks equal scores in order of arrival, which must not depend on the number of processes.
    evaluator.results = sorted(gather_object(evaluator.results), key=lambda row: row["image_id"])
    metrics: dict[str, Any] = evaluator.compute()
    metrics["per_class"] = evaluator.per_class()
    curves = precision_recall(ground_truth, evaluator.results, category_ids)
    metrics["voc"] = {
        "AP50_11point": mean_average_precision(curves, "11-point"),
        "AP50_area": mean_average_precision(curves, "area"),
    }
    metrics |= spikes()
    if save is not None and accelerator.is_main_process:
        save.mkdir(parents=True, exist_ok=True)
        evaluator.save_results(save / "predictions.json")
        write_whole(save / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
        plot_precision_recall(curves, save / "precision_recall.png")
    return metrics


@contextmanager
def watch_spikes(model: nn.Module) -> Iterator[Callable[[], dict[str, Any]]]:
    """Watches an evaluation; what it gives can be called afterwards, in all processes together, for the metrics.

    They are "activity" and "activity_per_layer" of all processes and "potentials" of this process's first batch, or
    none for a model without spike layers.
    """

    def metrics() -> dict[str, Any]:
        layers = sum_activity(gather_object([activity]))
        if not layers:
            return {}
        rates = {name: layer.firing_rate for name, layer in layers.items()}
        return {"activity": spike_activity(layers), "activity_per_layer": rates, "potentials": potentials}

    # Hooks count the spikes, and compiled code may skip hooks.
    with (
        record_activity(model) as activity,
        record_potentials(model) as potentials,
        torch.compiler.set_stance("force_eager"),
    ):
        yield metrics


def sum_activity(shares: Sequence[dict[str, LayerActivity]]) -> dict[str, LayerActivity]:
    """The spikes of several processes, each of which saw some of the images, counted together."""
    return {
        name: LayerActivity(
            name, sum(share[name].num_spikes for share in shares), sum(share[name].num_neurons for share in shares)
        )
        for name in shares[0]
    }


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


def read_data(config: Config, *, quiet: bool = False) -> tuple[DetectionDataset, DetectionDataset]:
    """Training and validation data; what had to be left out is told on standard error, unless `quiet`."""
    datasets = build_datasets(config.data)
    for name, dataset in zip(("train", "val"), datasets, strict=True):
        if not quiet:
            tell(name, dataset.annotations.dropped)
    return datasets


def tell(split: str, dropped: Iterable[str]) -> None:
    """Says on standard error what had to be left out of a split."""
    for sentence in dropped:
        print(f"{split}: {sentence}", file=sys.stderr)


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


def to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same dict with every tensor on the CPU."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}
