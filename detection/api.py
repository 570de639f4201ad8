"""The Python face of the package: train, evaluate, open and export runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from detection.config import Recipe
    from detection.predict import Predictor
    from detection.records import EpochLog, Evaluation
    from detection.runs import Run, Weights


def load(run: str | Path, weights: Weights = "last", device: str | torch.device | None = None) -> Predictor:
    """Return a saved run, ready to be asked: `detection.load("runs/demo").predict("image.jpg")`.

    Args:
        run: run folder, or "zoo:NAME" for a network that comes with the package (`backbones.zoo.names()`).
        weights: "last", "best" or "ema".
        device: such as "cpu" or "cuda:0"; None: the first GPU, if there is one.

    Raises:
        FileNotFoundError: no such run or weights.
        ValueError: the weights are damaged or do not fit, or there is no such device or entry of the zoo.
    """
    from detection.predict import Predictor
    from detection.runs import Run

    return Predictor(Run.open(run), weights, device)


def train(recipe: str | Path | Recipe, out: str | Path | None = None, **overrides: Any) -> Run:
    """Train a recipe into a run folder and return the run: `detection.train("recipe.yaml", train__epochs=3)`.

    Args:
        recipe: YAML file, name of a recipe that comes with the package, or a recipe.
        out: folder of the new run; None: runs/NAME of the recipe's file.
        overrides: values of keys; "__" stands for the dot: `model__backbone__activation="relu"`.

    Raises:
        FileExistsError: there is something in the folder already.
        FileNotFoundError: no such recipe, or no data.
        ValueError: a key or value is not allowed, or what is wrong with the data.
    """
    from detection.config import Recipe, find_recipe, read_recipe, set_values
    from detection.runs import Run
    from detection.tasks.run import train_run

    if isinstance(recipe, Recipe):
        config, name = recipe, recipe.task
    else:
        path = find_recipe(recipe)
        config, name = read_recipe(path), path.stem
    config = set_values(config, {key.replace("__", "."): value for key, value in overrides.items()})
    folder = Path("runs") / name if out is None else Path(out)
    train_run(
        config, folder, [f"detection.train({str(recipe)!r}, ...)" if overrides else f"detection.train({str(recipe)!r})"]
    )
    return Run.open(folder)


@dataclass(frozen=True)
class EvaluatedRun:
    """The findings of `evaluate`, beside what the run has logged of the same weights.

    Attributes:
        run: its address.
        evaluation: computed now.
        logged: the line of the log.
    """

    run: str
    evaluation: Evaluation
    logged: EpochLog

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers of the evaluation, "activity" among them."""
        found = self.evaluation
        return found.metrics | ({} if found.activity is None else {"activity": found.activity})

    @property
    def is_as_logged(self) -> bool:
        """Whether every number that the log has is equal in every digit."""
        return not self.different

    @property
    def different(self) -> list[str]:
        """Names of the numbers that differ from the log's."""
        logged = self.logged.metrics
        return [key for key, value in self.metrics.items() if key in logged and logged[key] != value]


def evaluate(
    run: str | Path,
    weights: Weights = "last",
    *,
    data_root: str | Path | None = None,
    save: str | Path | None = None,
) -> EvaluatedRun:
    """Evaluate a saved run again: `detection.evaluate("runs/demo").metrics["AP50"]`.

    Args:
        run: run folder, or "zoo:NAME".
        weights: "last", "best" or "ema".
        data_root: where its data lie now; None: where they lay when it was trained.
        save: new folder for a detector's predictions.json (COCO results), metrics.json and precision_recall.png.

    Raises:
        FileExistsError: there is something in `save` already.
        FileNotFoundError: no such run, weights, or data.
        ValueError: the weights are damaged or do not fit.
    """
    from detection.tasks.run import evaluate_run

    evaluation, logged = evaluate_run(run, weights, data_root=data_root, save=save)
    return EvaluatedRun(str(run), evaluation, logged)


def export(run: str | Path, out: str | Path | None = None, **options: Any) -> tuple[Path, Mapping[str, Any]]:
    """Write the network of a saved run as a file for other programs; see `detection.exporters.export_run`.

    Args:
        run: run folder, or "zoo:NAME".
        out: the file; None: model.onnx, ... among the run's products.
        options: file_format="onnx", "torch" or "nir", int8=True, analogue=True, evaluate=True, ...

    Returns:
        The file, and what the JSON file beside it says.
    """
    from detection.exporters import export_run

    return export_run(run, options.pop("file_format", "onnx"), out, **options)
