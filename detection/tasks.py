"""What the command-line tools call: train a detector, evaluate a saved run."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from backbones import LayerActivity, record_activity, record_potentials, spike_activity
from detection.checkpoint import Run, Weights
from detection.config import Config, Recipe, flatten, require_same
from detection.data import DetectionDataset, build_datasets, build_loader
from detection.data.download import download as fetch
from detection.distillation import learn_from
from detection.distributed import synchronise
from detection.engine import Batches, ComputeLosses, Evaluate, fit
from detection.evaluation import CocoEvaluator, import_backend, mean_average_precision, precision_recall
from detection.files import require_writable, write_whole
from detection.models import build_detector, load_model
from detection.plots import plot_curves, plot_dynamics, plot_precision_recall, plot_predictions
from detection.resume import state_path

NUM_PICTURES = 12


def train_detector(
    config: Config, folder: str | Path, command: Sequence[str], *, download: bool = False, resume: bool = False
) -> dict[str, Any]:
    """Trains the detector of a recipe into a run folder; gives the last line of its log.

    A new folder is made only once data and model are known to be sound.

    Args:
        config: the recipe.
        folder: where the run goes; must not exist, or be empty, or with `resume` be a run of this recipe.
        command: how the run was started, for its log.
        download: fetch VOC or COCO if it is missing.
        resume: go on with the run in `folder` from its last saved state, or from the beginning if it has none.
    """
    check_run(config, folder, resume=resume)
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
        share=(accelerator.process_index, accelerator.num_processes),
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
        resume=resume,
        facts={"category_ids": list(train.annotations.category_ids)},
    )
    if accelerator.is_main_process:
        draw_predictions(accelerator.unwrap_model(model), val, run.folder / "predictions.png")
    return line


def check_run(config: Recipe, folder: str | Path, *, resume: bool = False) -> None:
    """Nothing; raises if `folder` cannot take the run, or a package that the recipe asks for is missing.

    Raises:
        FileExistsError: there is something in it already.
        FileNotFoundError: with `resume`, there is no run.
        ImportError: TensorBoard is missing.
        ValueError: with `resume`, the run has another recipe.
    """
    if resume:
        require_same(flatten(Run.open(folder).config), config, str(folder))
    else:
        require_writable(Run.check_free(folder))
    if config.train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ImportError("train.tensorboard needs TensorBoard: pip install hoyer-det[tensorboard]")


def make_accelerator(config: Recipe, folder: str | Path | None = None) -> Accelerator:
    """Device, precision, algorithms and processes of a run; `folder` is that of a training, for its TensorBoard."""
    train = config.train
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
    torch.use_deterministic_algorithms(train.deterministic)
    # accelerate keeps the first precision for the whole process, in which runs of others may follow.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=train.precision,
        log_with="tensorboard" if train.tensorboard and folder else None,
        project_dir=folder if train.tensorboard else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=train.timeout_minutes))],
    )
    if train.precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would train in float32 without a word; torch knows fp16 on a CPU, slow as it is.
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator


def train_into_run(
    model: nn.Module,
    batches: Batches,
    *,
    compute_losses: ComputeLosses,
    evaluate: Evaluate,
    best_by: str,
    config: Recipe,
    folder: str | Path,
    command: Sequence[str],
    accelerator: Accelerator,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> tuple[Run, dict[str, Any]]:
    """Trains `model` into a run folder, with a teacher, compiled, in channels-last order as the recipe says.

    A new run that ends before anything of it is saved leaves no folder. `facts` about the data go into its run.json.
    See `fit` for the rest.

    Raises:
        ConnectionError: another process of the training has ended, or does not answer.
    """
    model = synchronise(model, spikes=config.hoyer.sync, batch_norm=config.train.sync_batchnorm)
    if config.distillation.teacher is not None:
        compute_losses = learn_from(config.distillation, compute_losses, model, config, accelerator)
    if config.train.channels_last:  # of the weights; the feature maps follow them
        model.to(memory_format=torch.channels_last)
    if config.train.compile:
        model.backbone.compile()
    run, main = Run(Path(folder), config), accelerator.is_main_process

    def begin() -> None:
        if main and resume:
            run.note_resumption(command, facts)
        elif main:
            Run.create(folder, config, command, facts)
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
            begin=begin,
            resume=resume,
        )
    except BaseException as error:
        if main and not resume:
            run.discard_if_empty()
        if accelerator.num_processes > 1 and is_broken_connection(error):
            raise ConnectionError(
                f"another process of this training has ended or does not answer ({str(error).splitlines()[0]}); go on "
                f"from the last saved state with as many processes and --resume {run.folder}"
            ) from error
        raise
    accelerator.end_training()
    if main:
        plot_curves(run.history(), run.folder / "curves.png")
        if "v_th" in line:
            plot_dynamics(run.history(), run.folder / "dynamics.png")
        run.write_info(run.info() | {"sha256": run.checksums()})
        state_path(run).unlink(missing_ok=True)
    return run, line


def is_broken_connection(error: BaseException) -> bool:
    """Whether torch.distributed failed, which raises plain RuntimeErrors for some backends."""
    signs = ("gloo", "nccl", "connection", "timed out", "socket")
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    )


def evaluate_run(
    folder: str | Path,
    which: Weights = "last",
    *,
    data_root: str | Path | None = None,
    save: str | Path | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of a saved run, computed anew, and the log line of the epoch that the weights come from.

    Args:
        folder: the run, as `Run.open` takes it.
        which: which of its weights.
        data_root: where its data lie now; None: where they lay when it was trained.
        save: where `evaluate_detector` writes its files; must not exist, or be empty.

    Raises:
        FileExistsError: there is something in `save` already.
        FileNotFoundError: no such run, weights, or data.
        ImportError: the package of the run's evaluation.backend is not installed.
        ValueError: the weights are damaged or do not fit.
    """
    if save is not None:
        save = Run.check_free(save)
        require_writable(save)
    run = Run.open(folder, data_root)
    if not isinstance(run.config, Config):
        raise ValueError(f"{folder}: a run of {run.config.task}, not of detection")
    logged = logged_line(run, which, "AP")
    model, accelerator = load_for_evaluation(run, which)
    _, val = build_datasets(run.config.data)
    loader = evaluation_loader(val, run.config, accelerator)
    return evaluate_detector(model, loader, val, run.config, accelerator, save=save), logged


def load_for_evaluation(run: Run, which: Weights = "last") -> tuple[nn.Module, Accelerator]:
    """The network of a saved run as its own evaluation had it, on the device and with the precision of its recipe.

    Raises:
        FileNotFoundError: the run has no such weights.
        ValueError: they are damaged or do not fit.
    """
    accelerator = make_accelerator(run.config)
    # Layers without the name of a wrapper in front.
    return accelerator.unwrap_model(accelerator.prepare(load_model(run, which))), accelerator


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
    return build_loader(
        dataset,
        batch_size=config.train.batch_size,
        workers=config.data.workers,
        shuffle=False,
        share=(accelerator.process_index, accelerator.num_processes),
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
