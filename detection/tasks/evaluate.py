"""Evaluate a saved run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from backbones import stop_after, time_steps
from detection.config import Recipe, set_values
from detection.config.training_sections import Precision
from detection.files import require_path, require_writable, write_whole
from detection.records import EpochLog, Evaluation, Weights
from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.base import Dataset, Task
from detection.tasks.run import load_for_evaluation, read_evaluation_data, tell_dropped

TRAINING_KEYS = {"train", "train_images", "num_train", "augment", "workers", "verify", "aspect_groups"}
"""Keys of a recipe's `data` in which runs on the same evaluation images may differ."""


def evaluation_data(config: Recipe) -> dict[str, Any]:
    """Return the keys of a recipe's `data` that say what the evaluation images are."""
    part = {"train", "train_images"} if getattr(config.data, "val_fraction", 0) else set()  # of which they are taken
    return config.data.model_dump(mode="json", exclude=TRAINING_KEYS - part)


def evaluate_run(
    folder: str | Path,
    weights: Weights = "last",
    *,
    data_root: str | Path | None = None,
    save: str | Path | None = None,
    precision: Precision | None = None,
) -> tuple[Evaluation, EpochLog]:
    """Return the metrics of a saved run, computed anew, and the log line of its last or best evaluation.

    Args:
        folder: the run, as `Run.open` takes it.
        weights: which of its weights.
        data_root: where its data lie now; None: where they lay when it was trained.
        save: folder for metrics.json (the evaluation) and what `Task.evaluate` adds; must not exist, or be empty.
        precision: of the passes; None: that of the training.

    Raises:
        FileExistsError: there is something in `save` already.
        FileNotFoundError: no such run, weights, or data.
        ImportError: the package of the run's evaluation.backend is not installed.
        ValueError: the weights are damaged or do not fit, or there is no such precision.
    """
    if save is not None:
        require_path("save", save)
        save = Run.check_free(save)
        require_writable(save)
    run = Run.open(folder, data_root)
    if precision is not None:
        run.config = set_values(run.config, {"train.precision": precision})
    task = task_of(run.config)
    logged = run.logged(weights, task.best_by)
    model, accelerator = load_for_evaluation(run, weights)
    dataset = read_evaluation_data(run)
    if accelerator.is_main_process:
        tell_dropped(val=dataset)
    batches = task.evaluation_batches(dataset, accelerator)
    evaluation = task.evaluate(model, batches, dataset, accelerator, save=save)
    evaluation = with_early_metrics(evaluation, task, model, dataset, accelerator)
    if save is not None and accelerator.is_main_process:
        write_whole(save / "metrics.json", (json.dumps(evaluation.to_json(), indent=2) + "\n").encode())
    return evaluation, logged


def with_early_metrics(
    evaluation: Evaluation, task: Task, model: nn.Module, dataset: Dataset, accelerator: Accelerator
) -> Evaluation:
    """Return the evaluation of a network of T time steps with the headline metrics after 1, ..., T - 1 under "anytime".

    A task that has found them in passing is left alone; of others the network is stopped early and evaluated again.
    """
    steps, early = time_steps(model), {}
    if steps == 1 or "anytime" in evaluation.tables:
        return evaluation
    for step in range(1, steps):
        with stop_after(model, step):
            found = task.evaluate(model, task.evaluation_batches(dataset, accelerator), dataset, accelerator)
        early |= {f"{key} after {step} of {steps} steps": found.metrics[key] for key in task.headline}
    return evaluation.model_copy(update={"tables": evaluation.tables | {"anytime": early}})
