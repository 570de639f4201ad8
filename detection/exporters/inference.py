"""Exported ONNX files as detectors and classifiers, and how accurate they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detection.analysis import evaluate_model
from detection.checkpoint import Run, Weights
from detection.config import ClassificationConfig, Config, Recipe
from detection.evaluation import METRICS
from detection.export.common import import_extra, open_session
from detection.export.networks import DetectorOf
from detection.models import build_detector
from detection.tasks import logged_line, make_accelerator

METADATA_KEY = "hoyer_det"


class _OnnxFile:
    """An ONNX file by `export_run`, opened in ONNX Runtime."""

    task: str

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        path, runtime = Path(path), import_extra("onnxruntime")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            self.session = open_session(path.read_bytes(), runtime.GraphOptimizationLevel.ORT_ENABLE_ALL, threads)
        except Exception as error:  # its errors share no class but this one
            raise ValueError(f"{path}: damaged, or no ONNX file ({str(error).splitlines()[0]})") from None
        self.path = path
        text = self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        self.description: dict[str, Any] = json.loads(text) if text else {}
        if self.description.get("task") != self.task:
            kind = {"detection": "detector", "classification": "classifier"}[self.task]
            raise ValueError(f"{path}: not a {kind} exported by this project")
        self.class_names = tuple(self.description["classes"])
        self.names = [output.name for output in self.session.get_outputs()]

    def run(self, batch: Tensor) -> dict[str, Tensor]:
        """The file's outputs by name for images (N, 3, H, W), RGB in [0, 1].

        Raises:
            ValueError: the file is for images of one size, and these have another.
        """
        wanted = self.session.get_inputs()[0].shape[2:]
        if any(isinstance(side, int) and side != have for side, have in zip(wanted, batch.shape[2:], strict=True)):
            resized = "resized and padded to " if self.task == "detection" else ""
            raise ValueError(
                f"{self.path}: for batches of {wanted[0]}x{wanted[1]} pixels, these images are {resized}"
                f"{batch.shape[2]}x{batch.shape[3]}; export without --height and --width"
            )
        results = self.session.run(None, {"images": batch.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(self.names, results, strict=True)}


class OnnxDetector(_OnnxFile):
    """Detections of an ONNX file by `export_run`: sizes, anchors and boxes by torchvision, the rest by ONNX Runtime.

    Args:
        path: the file.
        threads: of ONNX Runtime; 0: its own choice.

    Attributes:
        class_names: of the labels 1..K.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the package onnxruntime is not installed.
        ValueError: no detector of this project.
    """

    task = "detection"

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        super().__init__(path, threads=threads)
        model = self.description["model"]
        recipe = {
            "model": model | {"backbone": model["backbone"] | {"weights": None}},
            "data": {"format": "synthetic", "classes": self.description["classes"]},
        }
        self.detector = DetectorOf(build_detector(Config.model_validate(recipe)), self.run)

    def predict(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Boxes (M, 4) in pixels of each image, scores (M,) and labels (M,) in 1..K, as torchvision's detectors.

        Args:
            images: (3, H_i, W_i) in [0, 1].

        Raises:
            ValueError: the file is for images of one size, and these have another.
        """
        return self.detector(images)

    __call__ = predict


class OnnxClassifier(_OnnxFile):
    """Logits of an ONNX file by `export_run`, by ONNX Runtime.

    Args, attributes and errors are those of `OnnxDetector`; class k is class_names[k].
    """

    task = "classification"

    def predict(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, 3, H, W), RGB in [0, 1].

        Raises:
            ValueError: the file is for images of one size, and these have another.
        """
        return self.run(images)["logits"]

    __call__ = predict


class _OnTheCpu(nn.Module):
    """A function where an evaluation expects a network."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function
        self.nothing = nn.Parameter(torch.empty(0))  # says by its place that images are wanted on the CPU

    def forward(self, images: Any) -> Any:
        return self.function(images)


def evaluate_file(
    path: str | Path, folder: str | Path, which: Weights = "last", *, data_root: str | Path | None = None
) -> dict[str, dict[str, float]]:
    """COCO's 12 numbers, or top1 and top5, of an exported ONNX file on its run's evaluation images.

    Args:
        path: the file.
        folder: the run that it was made of, as `Run.open` takes it.
        which: the weights that it was made of.
        data_root: where the run's data lie now; None: where they lay when it was trained.

    Returns:
        "file": the file's metrics; "run": those that the run has logged of the same weights.

    Raises:
        FileNotFoundError: no such file, run, or data.
        ImportError: the package onnxruntime is not installed.
        ValueError: the file is none of this project, or of another task than the run.
    """
    run = Run.open(folder, data_root)
    keys = ("top1", "top5") if isinstance(run.config, ClassificationConfig) else METRICS
    logged = logged_line(run, which, keys[0])
    found = _evaluate(Path(path), run.config)
    return {name: {key: metrics[key] for key in keys} for name, metrics in (("file", found), ("run", logged))}


def _evaluate(path: Path, config: Recipe) -> dict[str, Any]:
    accelerator = make_accelerator(config)
    if isinstance(config, ClassificationConfig):
        classifier = OnnxClassifier(path)
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (config.data.mean, config.data.std))
        model = _OnTheCpu(lambda images: classifier.predict(images.cpu() * std + mean).to(images.device))
    else:
        model = _OnTheCpu(OnnxDetector(path).predict)
    return evaluate_model(model, config, accelerator)
