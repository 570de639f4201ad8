"""Exported ONNX files in the place of their networks, and how accurate they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import find_device, send_to_device
from torch import Tensor, nn

from backbones import zoo
from backbones.deploy.events import Engine, from_bytes
from detection.config import Recipe, parse_recipe
from detection.data.pictures import ImageLike
from detection.exporters.common import import_extra, open_session
from detection.predict import options_of, predict_images
from detection.runs import Run, Weights
from detection.tasks import task_of
from detection.tasks.base import Dataset, Task
from detection.tasks.classification import ClassificationTask
from detection.tasks.detection import DetectionTask
from detection.tasks.predictions import AnyPrediction
from detection.tasks.run import make_accelerator, read_evaluation_data

METADATA_KEY = "hoyer_det"


class OnnxFile:
    """An ONNX file by `export_run` as its network: ONNX Runtime computes, the task does what is left to do.

    Args:
        path: the file.
        threads: of ONNX Runtime; 0: its own choice.

    Attributes:
        description: what the file says of itself.
        task: of the run that it was made of.
        class_names: of all classes, in the order of their labels.
        network: what behaves like the network in evaluation.
        model: the same as a module.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the package onnxruntime is not installed.
        ValueError: the file is damaged, or none that this class opens.
    """

    kind: ClassVar[type[Task]] = Task
    words: ClassVar[str] = "network"

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self.description = self._open(threads)
        self.task = task_of(_recipe_of(self.description, str(path))) if self.description else None
        if not isinstance(self.task, self.kind):
            raise ValueError(f"{path}: not a {self.words} exported by this project")
        self.class_names = tuple(self.description["classes"])
        if self.description.get("categories"):
            self.task.category_ids = tuple(each["id"] for each in self.description["categories"])
            self.task.category_source = self.path
        around = self.task.model_around
        self.network = around(self.run, boxes=True) if self.description.get("nms") else around(self.run)
        self.model = _OnTheCpu(self).eval()

    def _open(self, threads: int) -> dict[str, Any]:
        runtime = import_extra("onnxruntime")
        try:
            self.session = open_session(self.path.read_bytes(), runtime.GraphOptimizationLevel.ORT_ENABLE_ALL, threads)
        except Exception as error:  # its errors share no class but this one
            raise ValueError(f"{self.path}: damaged, or no ONNX file ({str(error).splitlines()[0]})") from None
        text = self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        self.shape: Sequence[int | str] = self.session.get_inputs()[0].shape
        return json.loads(text) if text else {}

    def _compute(self, batch: Tensor) -> dict[str, Tensor]:
        names = [output.name for output in self.session.get_outputs()]
        results = self.session.run(None, {"images": batch.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, results, strict=True)}

    def run(self, batch: Tensor) -> dict[str, Tensor]:
        """Return the file's outputs by name for images (N, 3, H, W), RGB in [0, 1], in the file's own precision.

        Raises:
            ValueError: the file is for images of one size, and these have another.
        """
        wanted, found = self.shape[2:], tuple(batch.shape[2:])
        if any(isinstance(side, int) and side != have for side, have in zip(wanted, found, strict=True)):
            raise ValueError(
                f"{self.path}: for batches of {wanted[0]}x{wanted[1]} pixels, these images reach it, perhaps resized "
                f"and padded, as {found[0]}x{found[1]}; export without --height and --width"
            )
        with torch.autocast("cpu", enabled=False):  # an evaluation has the precision of its run
            return self._compute(batch)

    def __call__(self, images: Any) -> Any:
        """Return what the network gives in evaluation for tensors in [0, 1] on the CPU; ValueError as in `run`."""
        return self.network(images)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}: {self.task.describe()})"

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options of `predict` that the task has, such as "score_threshold"."""
        return options_of(self.task)

    def predict(
        self, images: ImageLike | Sequence[ImageLike], *, batch_size: int = 8, **options: Any
    ) -> AnyPrediction | list[AnyPrediction]:
        """Return what the file makes of an image, or a list of that for a list; see `predict.predict_images`.

        Raises:
            ValueError: the file was written by an earlier version, which did not say how images are prepared.
        """
        if "data" not in self.description:
            raise ValueError(f"{self.path}: does not say how images are prepared; export it again, or give it tensors")
        return predict_images(self.task, self.model, images, batch_size=batch_size, **options)

    def evaluate(self, data_root: str | Path) -> dict[str, float]:
        """Return the file's metrics on the evaluation images of its run, whose data lie in `data_root` now.

        Raises:
            FileNotFoundError: they do not.
            ValueError: the file was written by an earlier version, which did not say which images these are.
        """
        if "workers" not in self.description.get("data", {}):
            raise ValueError(f"{self.path}: does not say which images it is evaluated on; export it again")
        self.task.config.data.root = Path(data_root)
        return self.accuracy(self.task, self.task.read("val"))

    def accuracy(self, task: Task, dataset: Dataset) -> dict[str, float]:
        """Return the file's metrics on some images, by a task like the file's."""
        accelerator = make_accelerator(task.config)
        batches = task.evaluation_batches(dataset, accelerator)
        return task.evaluate(self.model, batches, dataset, accelerator).metrics


class OnnxDetector(OnnxFile):
    """An `OnnxFile` that is a detector: sizes, anchors and boxes by torchvision, the rest by ONNX Runtime.

    `predict` takes images of any kind and gives `Prediction`s, as `detection.load(run).predict` does. To be called
    it takes tensors, and gives what torchvision's detectors do: [(3, H_i, W_i)] in [0, 1] -> [{"boxes": (M, 4) in
    pixels of the image, "scores": (M,), "labels": (M,) in 1..K}]; label k is class_names[k - 1].
    """

    kind, words = DetectionTask, "detector"


class OnnxClassifier(OnnxFile):
    """An `OnnxFile` that is a classifier.

    `predict` takes images of any kind and gives `ClassPrediction`s. To be called it takes tensors: (N, 3, H, W) in
    [0, 1] -> logits (N, K); class k is class_names[k].
    """

    kind, words = ClassificationTask, "classifier"


class TorchFile(OnnxFile):
    """A .pt2 file by `export_run` as its network, likewise; what it is stands in the JSON file beside it.

    Torch computes, with as many threads as it has.
    """

    def _open(self, threads: int) -> dict[str, Any]:
        sidecar = self.path.with_name(f"{self.path.name}.json")
        try:
            description = json.loads(sidecar.read_text(encoding="utf-8"))
            checksum, self.shape = description["sha256"], description["inputs"]["images"]["shape"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{sidecar}: missing or damaged, and it says what {self.path.name} takes ({error})"
            ) from None
        if hashlib.sha256(self.path.read_bytes()).hexdigest() != checksum:
            raise ValueError(f"{self.path}: damaged, or not the file that {sidecar.name} tells of")
        self.program = torch.export.load(self.path).module()
        return description

    @torch.no_grad()
    def _compute(self, batch: Tensor) -> dict[str, Tensor]:
        results = self.program(batch)
        results = results if isinstance(results, tuple | list) else (results,)
        return dict(zip(self.description["outputs"], results, strict=True))


class EventsFile(OnnxFile):
    """A file for the event-driven engine by `export_run` as its network, likewise; see `backbones.deploy.events`.

    The engine has as many threads as torch.
    """

    words = "network for the event-driven engine"

    def _open(self, threads: int) -> dict[str, Any]:
        program, description = from_bytes(self.path.read_bytes(), str(self.path))
        try:
            self.engine = Engine(program)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        self.shape = description.get("inputs", {}).get("images", {}).get("shape", ())
        return description if self.shape else {}

    def _compute(self, batch: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.description["outputs"], self.engine(batch), strict=True))


KINDS: dict[str, type[OnnxFile]] = {".onnx": OnnxFile, ".pt2": TorchFile, ".events": EventsFile}


def open_file(path: str | Path, *, threads: int = 0, suffix: str | None = None) -> OnnxFile:
    """Return an exported file as its network, by its suffix or the given one: .onnx, .pt2 or .events.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the package onnxruntime is not installed.
        ValueError: the file is damaged, or none that is run here, or the zoo has no such file.
    """
    suffix = suffix or Path(path).suffix.lower()
    if suffix == ".nir":
        raise ValueError(
            f"{path}: a NIR file is run by a neuromorphic chip or its simulator (allowed: {', '.join(KINDS)})"
        )
    if suffix not in KINDS:
        raise ValueError(f"{path}: no exported network (allowed: {', '.join(KINDS)})")
    return KINDS[suffix](zoo.locate(path), threads=threads)


def _recipe_of(description: Mapping[str, Any], source: str) -> Recipe:
    """Return a recipe of the network in a file."""
    values = {key: description[key] for key in ("task", "plugins", "model") if key in description}
    if "batch_size" in description:  # earlier files do not say it
        values["train"] = {"batch_size": description["batch_size"]}
    recipe = parse_recipe(values | {"data": {"classes": description["classes"], **description.get("data", {})}}, source)
    recipe.model.backbone.weights = None  # what its training started from
    return recipe


class _OnTheCpu(nn.Module):
    """A file in the place of a network, whose first parameter says where it wants its images.

    Attributes:
        detector: of a detector, the one of torchvision around the file.
    """

    def __init__(self, file: OnnxFile) -> None:
        super().__init__()
        self.file, self.nothing = file, nn.Parameter(torch.empty(0))
        if hasattr(file.network, "detector"):
            self.detector = file.network.detector

    def forward(self, images: Any) -> Any:
        return send_to_device(self.file(send_to_device(images, "cpu")), find_device(images))


def evaluate_file(
    path: str | Path,
    folder: str | Path,
    weights: Weights = "last",
    *,
    data_root: str | Path | None = None,
    suffix: str | None = None,
) -> dict[str, dict[str, float]]:
    """Return an exported file's metrics on its run's evaluation images ("file"), beside the run's own ("run").

    Args:
        path: the file.
        folder: the run that it was made of, as `Run.open` takes it.
        weights: the weights that it was made of.
        data_root: where the run's data lie now; None: where they lay when it was trained.
        suffix: of files of its format; None: that of its name.

    Raises:
        FileNotFoundError: no such file, run, or data.
        ImportError: the package onnxruntime is not installed.
        ValueError: the file is none of this project, or of another task than the run.
    """
    run = Run.open(folder, data_root)
    task = task_of(run.config)
    logged = run.logged(weights, task.best_by).metrics
    file = open_file(path, suffix=suffix)
    if file.task.name != task.name:
        raise ValueError(f"{path}: exported from a run of the task {file.task.name}, {run.folder} is of {task.name}")
    found = file.accuracy(task, read_evaluation_data(run))
    return {"file": found, "run": {key: logged[key] for key in found if key in logged}}
