"""Saved runs that are ready to be evaluated under noise, and which of them compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from detection.config import Recipe
from detection.robustness.corruptions import CorruptedBatches
from detection.robustness.kinds import ALL_LAYERS, IMAGE_KINDS, RANDOM_KINDS, SEVERITIES, SPIKE_KINDS
from detection.robustness.noise import potential_noise, record_margins, sum_margins
from detection.runs import Run, Weights
from detection.tasks import task_of
from detection.tasks.base import Dataset, Task
from detection.tasks.run import load_for_evaluation, read_evaluation_data

TRAINING_KEYS = {"train", "train_images", "num_train", "augment", "workers", "verify", "aspect_groups"}
"""Keys of a recipe's `data` in which runs on the same evaluation images may differ."""


@dataclass
class Subject:
    """A run that is ready to be evaluated again and again.

    Attributes:
        name: of the run, in tables and plots.
        task: of its recipe.
        model: in evaluation mode.
        accelerator: its device and precision.
        dataset: the evaluation images.
        batches: of them, in order.
    """

    name: str
    task: Task
    model: nn.Module
    accelerator: Accelerator
    dataset: Dataset
    batches: Iterable[Any]

    @property
    def num_images(self) -> int:
        """Number of images in `batches`."""
        return len(self.dataset)

    def measure(self, kind: str, severity: float, seed: int) -> dict[str, float]:
        """Return the task's headline metrics, and "activity" with spike layers, at one severity."""
        batches = self.batches
        if kind in IMAGE_KINDS and severity:
            batches = CorruptedBatches(batches, kind, severity, seed)
        with potential_noise(self.model, kind, severity, seed) if kind in SPIKE_KINDS else nullcontext():
            found = self.task.evaluate(self.model, batches, self.dataset, self.accelerator)
        chosen = {key: found.metrics[key] for key in self.task.headline}
        return chosen | ({} if found.activity is None else {"activity": found.activity})

    def rows(self, kinds: Sequence[str], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield a row for the clean network, then one for each kind, severity and seed.

        Raises:
            ValueError: the images have nothing to find.
        """
        clean = self.measure("clean", 0.0, 0)
        for metric in self.task.headline:
            if clean[metric] < 0:
                raise ValueError(f"--images {self.num_images}: {metric} needs something to find in them; take more")
        yield {"run": self.name, "kind": "clean", "severity": 0.0, "seed": None, **clean}
        for kind in kinds:
            for severity in SEVERITIES[kind]:
                for seed in seeds if kind in RANDOM_KINDS else [None]:
                    metrics = self.measure(kind, severity, seed or 0)
                    yield {"run": self.name, "kind": kind, "severity": severity, "seed": seed, **metrics}

    def margins(self, seeds: Sequence[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the rows of "margins" and of "flips", see `study`."""
        sds = SEVERITIES["membrane"]
        with record_margins(self.model, sds, seeds) as found:
            self.task.evaluate(self.model, self.batches, self.dataset, self.accelerator)
        margins, flips = [], []
        for layer, margin in {ALL_LAYERS: sum_margins(found.values()), **found}.items():
            place = {"run": self.name, "layer": layer}
            rates = {key: getattr(margin, key) for key in ("firing_rate", "near_rate", "potential_sd")}
            margins.append({**place, "num_neurons": margin.num_neurons // self.num_images, **rates})
            for sd in sds:
                for seed in seeds:
                    rates = {"flip_rate": margin.flip_rate(sd, seed), "lost_rate": margin.lost_rate(sd, seed)}
                    flips.append({**place, "severity": sd, "seed": seed, **rates})
        return margins, flips


def prepare(run: Run, name: str, *, weights: Weights = "last", num_images: int | None = None) -> Subject:
    """Return a run with its network and its evaluation images.

    Args:
        run: of any task.
        name: how to call it.
        weights: which of its weights.
        num_images: as many images, spread evenly over the evaluation images (those of a folder are sorted by class, so
            the first ones would be of one class); a detector is then asked for their boxes alone. None: all.

    Raises:
        FileNotFoundError: no such weights, or data.
        ValueError: there are not as many images, or the weights do not fit.
    """
    task = task_of(run.config)
    model, accelerator = load_for_evaluation(run, weights)
    dataset = read_evaluation_data(run)
    number, wanted = len(dataset), len(dataset) if num_images is None else num_images
    if wanted > number:
        raise ValueError(f"--images {wanted}: there are only {number} evaluation images")
    dataset = dataset.choose([index * number // wanted for index in range(wanted)])
    return Subject(name, task, model, accelerator, dataset, task.evaluation_batches(dataset, accelerator))


def open_runs(folders: Sequence[str | Path], *, data_root: str | Path | None = None) -> list[Run]:
    """Return the runs, which must be of one task and have the same evaluation data and precision.

    Args:
        folders: of the runs, as `Run.open` takes them.
        data_root: where their data lie now; None: where their recipes say.

    Raises:
        FileNotFoundError: no such run.
        ValueError: a run given twice, or runs that do not compare.
    """
    runs: list[Run] = []
    for folder in folders:
        run = Run.open(folder, data_root)
        if any(run.folder.resolve() == other.folder.resolve() for other in runs):
            raise ValueError(f"{folder}: given twice")
        run.config.data.root = run.config.data.root.resolve()
        runs.append(run)
    first, *others = [(run, _comparable(run.config)) for run in runs]
    for run, values in others:
        for key, value in first[1].items():
            if values.get(key) != value:
                raise ValueError(
                    f"{run.folder}: {key} is {_shorten(values.get(key))}, that of {first[0].folder} is "
                    f"{_shorten(value)}; only runs of the same task, evaluation data and precision compare"
                )
    return runs


def _comparable(config: Recipe) -> dict[str, Any]:
    """Return what two runs must have in common, task first."""
    data = config.data.model_dump(mode="json", exclude=TRAINING_KEYS)
    return {
        "task": config.task,
        **{f"data.{key}": value for key, value in data.items()},
        "train.precision": config.train.precision,
    }


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
