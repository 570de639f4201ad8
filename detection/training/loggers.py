"""Logs beside a run's own, `train.loggers`, by accelerate's trackers: TensorBoard, CSV, Weights & Biases, MLflow."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker, on_main_process
from torch import nn

from detection.config import Recipe, flatten
from detection.files import write_csv
from detection.records import EpochLog
from detection.runs import Run
from detection.training.callbacks import Callback
from detection.training.checkpoint import random_states, set_random_states

PROJECT = "hoyer-det"  # of the runs at Weights & Biases and MLflow; WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME name others


class CsvTracker(GeneralTracker):
    """A file log.csv in a run's folder: a row per epoch, a column per number; empty where an epoch has none.

    It is whole after each epoch, and config.yaml has the configuration: nothing is to be done at beginning and end.
    """

    name = "csv"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        """Write the row of an epoch; rows of this and later ones, of before a run went on, are replaced."""
        rows: list[dict[str, Any]] = []
        if self.path.is_file():
            with self.path.open(encoding="utf-8", newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < step]
        rows.append({"epoch": step, **values})
        columns = list(dict.fromkeys(key for row in rows for key in row))
        write_csv(self.path, columns, ([row.get(key) for key in columns] for row in rows))


class OnceMLflow(MLflowTracker):
    """MLflow's tracker, which would keep the numbers of an epoch twice where a run has gone on."""

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        """Log an epoch that the run does not have yet."""
        import mlflow

        if not hasattr(self, "known"):
            logged = mlflow.MlflowClient().get_metric_history(self.active_run.info.run_id, "loss")
            self.known = {metric.step for metric in logged}
        if step not in self.known:
            super().log(values, step=step, **options)


class Loggers(Callback):
    """The trackers of an accelerator, as a callback: they log the single numbers of each epoch."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def on_train_begin(self, run: Run, network: nn.Module) -> None:
        """Log the last epoch of a run that goes on once more: something may have failed in front of it."""
        for line in run.history()[-1:] if run.has_log else ():
            self.on_epoch_end(run, line)

    def on_epoch_end(self, run: Run, line: EpochLog) -> None:
        scalars = {key: value for key, value in line.to_json().items() if isinstance(value, float)}
        self.accelerator.log(scalars, step=line.epoch)


def wanted(config: Recipe) -> list[str]:
    """Return the names of a recipe's loggers, each once."""
    return list(dict.fromkeys([*config.train.loggers, *(["tensorboard"] if config.train.tensorboard else [])]))


def require_packages(config: Recipe) -> None:
    """Raise ImportError if the package of a logger is missing."""
    for name in wanted(config):
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise ImportError(f"train.loggers: {name} is not installed: pip install hoyer-det[{name}]")


def start(accelerator: Accelerator, run: Run, epoch: int) -> None:
    """Start a run's loggers in the accelerator, for `Loggers`; they go on where the run does.

    Args:
        accelerator: of the training.
        run: whose run.json keeps the names that the run has elsewhere.
        epoch: the next one to be logged.
    """
    names = wanted(run.config)
    if not (names and accelerator.is_main_process):
        return
    randoms, before = random_states(), run.info().trackers
    trackers: dict[str, GeneralTracker] = {}
    for name in names:
        match name:
            case "tensorboard":  # what it has of the epoch before and later ones is forgotten
                trackers[name] = TensorBoardTracker("tensorboard", str(run.folder), purge_step=epoch - 1)
            case "csv":
                trackers[name] = CsvTracker(run.folder / "log.csv")
            case "wandb":
                known = {"id": before[name], "resume": "allow"} if name in before else {}
                project = os.environ.get("WANDB_PROJECT", PROJECT)
                trackers[name] = WandBTracker(project, name=run.folder.name, dir=str(run.folder), **known)
            case "mlflow":
                trackers[name] = OnceMLflow(PROJECT, run_id=before.get(name), run_name=run.folder.name)
    accelerator.log_with = list(trackers.values())
    accelerator.init_trackers(PROJECT)
    found = {"wandb": lambda tracker: tracker.id, "mlflow": lambda tracker: tracker.info.run_id}
    ids = {name: found[name](trackers[name].tracker) for name in names if name in found}
    for name in ids.keys() - before.keys():
        trackers[name].store_init_configuration(flatten(run.config))
    if ids:
        run.write_info(run.info().model_copy(update={"trackers": before | ids}))
    set_random_states(randoms)


def stop(accelerator: Accelerator) -> None:
    """Close the loggers of a training that has failed, whatever they say to that."""
    for tracker in accelerator.trackers:
        with contextlib.suppress(Exception):
            tracker.finish()
