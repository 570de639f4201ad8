"""The Python face of the package: train, evaluate, open and export runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

    from detection.config import Recipe
    from detection.config.training_sections import Precision
    from detection.exporters import OnnxFile
    from detection.predict import Predictor
    from detection.records import EpochLog, Evaluation
    from detection.runs import Run, Weights
    from detection.training.callbacks import Callback


def load(run: str | Path, weights: Weights = "last", device: str | torch.device | None = None) -> Predictor | OnnxFile:
    """Return a saved run or exported file, ready to be asked: `detection.load("runs/demo").predict("image.jpg")`.

    Args:
        run: run folder, or "zoo:NAME" for a network that comes with the package (`backbones.zoo.names()`), or a file by
            `export`, .events, .onnx or .pt2, which runs on the CPU.
        weights: "last", "best" or "ema", of a run.
        device: such as "cpu" or "cuda:0", of a run; None: the first GPU, if there is one.

    Raises:
        FileNotFoundError: no such run, weights or file.
        ImportError: the package onnxruntime is not installed, for an ONNX file.
        ValueError: the weights or the file are damaged or do not fit, or there is no such device or entry of the zoo,
            or weights or a device are named for a file.
    """
    from detection.files import is_exported
    from detection.predict import Predictor
    from detection.runs import Run

    if is_exported(run):
        from detection.exporters import open_file

        if weights != "last" or device is not None:
            raise ValueError(f"{run}: a file has one set of weights and runs on the CPU: leave out weights and device")
        return open_file(run)
    return Predictor(Run.open(run), weights, device)


def train(
    recipe: str | Path | Recipe | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    *,
    callbacks: Callback | Iterable[Callback] = (),
    resume: str | Path | None = None,
    extend: int = 0,
    extend_lr: float = 0.5,
    **overrides: Any,
) -> Run:
    """Train a recipe into a run folder and return the run: `detection.train("recipe.yaml", train={"epochs": 3})`.

    Args:
        recipe: YAML file, name of a recipe that comes with the package, a recipe, or the values of one as in its file.
        out: folder of the new run; None: runs/NAME of the recipe's file.
        callbacks: one or several, called at the turns of the training, see `detection.Callback`.
        resume: a run that was interrupted, to go on with, by its own recipe and in its own folder.
        extend, extend_lr: with `resume`, epochs behind its end with a new optimiser, and their part of the rates.
        overrides: values of keys: `train={"epochs": 3}`, `**{"train.epochs": 3}` or `train__epochs=3`.

    Raises:
        CallbackError: a callback failed; the state is saved.
        FileExistsError: there is something in the folder already.
        FileNotFoundError: no such recipe, or no data.
        TypeError: a callback is no `detection.Callback`.
        ValueError: a key or value is not allowed, not one of `recipe` and `resume`, or what is wrong with the data.
    """
    from detection.config import Recipe, find_recipe, parse_recipe, read_recipe, set_values, spread_values
    from detection.files import require_path
    from detection.runs import Run
    from detection.tasks.run import train_run
    from detection.text import require_whole
    from detection.training.callbacks import Callback

    if (recipe is None) == (resume is None) or (resume is not None and out is not None):
        raise ValueError("detection.train: give a recipe, and perhaps a folder `out`, or the run to `resume` alone")
    require_whole("extend", extend, 0)
    if not (isinstance(extend_lr, int | float) and 0 < extend_lr < math.inf) or (extend and resume is None):
        raise ValueError(f"detection.train: extend {extend} and extend_lr {extend_lr!r}: above 0, with resume=RUN")
    if out is not None:
        require_path("out", out)
    shown = repr(str(recipe)) if isinstance(recipe, (str, Path)) else "..."  # its values are the run's config.yaml
    command = f"detection.train({shown}{', ...' if overrides else ''})"
    if resume is not None:
        config, out, command = Run.open(resume).config, resume, f"detection.train(resume={str(resume)!r})"
    elif isinstance(recipe, (Recipe, Mapping)):
        config = parse_recipe(recipe, "recipe") if isinstance(recipe, Mapping) else recipe
        name = config.task
    else:
        path = find_recipe(recipe)
        config, name = read_recipe(path), path.stem
    config = set_values(config, spread_values(type(config), overrides))
    callbacks = [*callbacks] if isinstance(callbacks, Iterable) else [callbacks]
    if wrong := [each for each in callbacks if not isinstance(each, Callback)]:
        raise TypeError(f"callbacks: expected instances of detection.Callback, got {wrong[0]!r}")
    folder = Path("runs") / name if out is None else Path(out)
    options = {"extend": extend, "lr_factor": extend_lr} if extend else {}
    train_run(config, folder, [command], resume=resume is not None, callbacks=callbacks, **options)
    return Run.open(folder)


@dataclass(frozen=True, repr=False)
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
        return self.evaluation.numbers

    @property
    def different(self) -> list[str]:
        """Names of the metrics that differ from the log's."""
        logged = self.logged.metrics
        return [key for key, value in self.metrics.items() if key in logged and logged[key] != value]

    def __repr__(self) -> str:
        numbers = ", ".join(f"{key} {value:.4f}" for key, value in self.metrics.items())
        return f"EvaluatedRun({self.run!r}: {numbers}; {'not as' if self.different else 'as'} logged)"


def evaluate(
    run: str | Path,
    weights: Weights = "last",
    *,
    data_root: str | Path | None = None,
    save: str | Path | None = None,
    precision: Precision | None = None,
) -> EvaluatedRun:
    """Evaluate a saved run again: `detection.evaluate("runs/demo").metrics["AP50"]`.

    Args:
        run: run folder, or "zoo:NAME".
        weights: "last", "best" or "ema".
        data_root: where its data lie now; None: where they lay when it was trained.
        save: new folder for a detector's predictions.json (COCO results), metrics.json and precision_recall.png.
        precision: "no" (float32), "bf16", "fp16" or "auto"; None: that of the training.

    Raises:
        FileExistsError: there is something in `save` already.
        FileNotFoundError: no such run, weights, or data.
        ValueError: the weights are damaged or do not fit, or there is no such precision.
    """
    from detection.tasks.evaluate import evaluate_run

    evaluation, logged = evaluate_run(run, weights, data_root=data_root, save=save, precision=precision)
    return EvaluatedRun(str(run), evaluation, logged)


class ExportedFile(NamedTuple):
    """A file by `export`.

    Attributes:
        path: the file.
        description: what NAME.json beside it says.
    """

    path: Path
    description: Mapping[str, Any]

    def __repr__(self) -> str:
        parity = ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in self.description["parity"].items())
        outputs = self.description["outputs"]  # in words for NIR
        names = outputs if isinstance(outputs, str) else ", ".join(outputs)
        return f"ExportedFile({str(self.path)!r}: {names}; {parity})"


def export(
    run: str | Path,
    out: str | Path | None = None,
    *,
    file_format: Literal["onnx", "torch", "nir", "events"] = "onnx",
    weights: Weights = "last",
    int8: bool = False,
    analogue: bool = False,
    nms: bool = False,
    num_calibration: int | None = None,
    height: int | None = None,
    width: int | None = None,
    evaluate: bool = False,
    data_root: str | Path | None = None,
) -> ExportedFile:
    """Write the network of a saved run as a file for other programs: `detection.export("runs/demo", nms=True)`.

    Args:
        run: run folder, or "zoo:NAME".
        out: the file; None: model.onnx, ... among the run's products.
        file_format: "onnx", "torch" (torch.export), "nir" or "events", for the event-driven engine.
        weights: "last", "best" or "ema".
        int8: int8 weights and integer thresholds where layers see spikes.
        analogue: with `int8`: 8 bits for analogue convolutions, too, but the first and those of prediction.
        nms: a detector's ONNX file that gives boxes.
        num_calibration: training images for `int8`; None: 64 for a detector, 256 for a classifier.
        height: of the images in pixels, with `width`: that size only; None: free where the network permits.
        width: likewise.
        evaluate: measure how accurate an ONNX or events file is on the evaluation images.
        data_root: where its data lie now; None: where they lay when it was trained.

    Raises:
        FileExistsError: the file, or the .json beside it, exists already.
        FileNotFoundError: no such run, weights, or data.
        ImportError: a package is missing.
        ValueError: the run cannot be exported so, or the file does not do what the network does.
    """
    from detection.exporters import export_run

    options = {"weights": weights, "int8": int8, "analogue": analogue, "nms": nms, "num_calibration": num_calibration}
    options |= {"height": height, "width": width, "evaluate": evaluate}
    return ExportedFile(*export_run(run, file_format, out, data_root=data_root, **options))
