"""The contract of a task: the one place where kinds of training differ."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

import backbones
from backbones.networks.base import find_family
from detection.config import Recipe
from detection.data.batches import Batches
from detection.records import Evaluation
from detection.runs import Run
from detection.sections import Examination, Section
from detection.tasks.checks import run_warnings
from detection.tasks.parts import Deployable, SpikingPart
from detection.text import nearest, plural

if TYPE_CHECKING:
    from detection.data.report import DataReport
    from detection.tasks.predictions import AnyPrediction

Split = Literal["train", "val"]
FAMILIES = {"resnet": "ResNet", "vgg": "VGG", "mobilenetv": "MobileNetV"}  # as their papers spell them


class Dataset(Protocol):
    """A split that was read.

    Attributes:
        classes: names of the classes, in the order of their labels.
        dropped: a sentence for each thing that was left out or mended.
    """

    classes: tuple[str, ...]
    dropped: tuple[str, ...]

    def __len__(self) -> int: ...

    def choose(self, indices: Sequence[int]) -> Self:
        """Return these images alone."""

    def fingerprint(self) -> str:
        """Return a hexadecimal number that is another one for other data."""


class Task(ABC):
    """All that differs between detection, classification and what others add, for one recipe.

    A subclass is registered by `register_task`. What it does not define below `evaluate` is refused by name where it
    is asked for.

    Args:
        config: the recipe; its class names may be filled in only when the data have been read, see `with_classes`.

    Attributes:
        recipe: the class of its recipes.
        headline: the metrics that stand in tables, the first one in every plot.
        metrics: the metrics of a page about a run, the first ones being `headline`'s first.
        best_by: the metric whose highest value decides which weights are kept as "best".
        words: metrics in words, where their names are none.
        score: what `metrics` are called together.
        num_calibration: images that 8-bit thresholds are set on by default.
        prediction_layers: parts of names of the layers whose outputs are predictions: they stay in floating point in
            8-bit files, and Muon leaves them to AdamW.
        windows: whether a recording of events is an image for each of its windows, as a film's, or one image.
        parts: modules of the network by the name of a part in train.freeze, where they are called otherwise.
    """

    recipe: ClassVar[type[Recipe]]
    headline: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]]
    best_by: ClassVar[str]
    words: ClassVar[Mapping[str, str]] = {}
    score: ClassVar[str] = "Metrics"
    num_calibration: ClassVar[int] = 64
    prediction_layers: ClassVar[tuple[str, ...]] = ()
    windows: ClassVar[bool] = False
    parts: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, config: Recipe) -> None:
        self.config = config

    @property
    def name(self) -> str:
        """Value of `task` in its recipes."""
        return self.config.task

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics that stand in a line about a run, that of the best weights first."""
        return tuple(dict.fromkeys((self.best_by, *self.headline)))

    def with_classes(self, classes: Sequence[str]) -> Self:
        """Return the task of the recipe with the class names filled in."""
        data = self.config.data.model_copy(update={"classes": list(classes)})
        return type(self)(self.config.model_copy(update={"data": data}))

    @property
    def spiking(self) -> bool:
        """Whether the network of the recipe spikes."""
        return backbones.find_neuron(self.config.model.backbone.activation).spiking

    @property
    def time_steps(self) -> int:
        """Time steps of the network of the recipe; the analogue twin has one, whatever the recipe says."""
        return self.config.model.backbone.time_steps if self.spiking else 1

    def describe(self) -> str:
        """Return the network in words, such as "ResNet18 \N{MULTIPLICATION SIGN}0.5, spiking"."""
        backbone = self.config.model.backbone
        name = re.sub("^(resnet|vgg|mobilenetv)", lambda family: FAMILIES[family[0]], backbone.name)
        width = "" if backbone.width == 1 else f" \N{MULTIPLICATION SIGN}{backbone.width:g}"
        words = [backbones.find_neuron(backbone.activation).words]
        if backbone.arithmetic != "float":
            kind = backbones.find_arithmetic(backbone.arithmetic)
            words = [kind.words, *(words if backbone.activation != kind.activation else [])]
        steps = f", {backbone.time_steps} time steps" if self.time_steps > 1 else ""
        bits = f", {backbone.thresholds} thresholds" if self.spiking and backbone.thresholds > 1 else ""
        return f"{name}{width}, {', '.join(words)}{steps}{bits}"

    def describe_data(self) -> str:
        """Return the data in words, such as "voc data in data/bccd, 3 classes"."""
        data = self.config.data
        classes = f", {plural(len(data.classes), 'class', 'classes')}" if data.classes else ""
        return f"{data.format} data in {data.root}{classes}"

    def check_names(self, source: str | Path | None = None) -> None:
        """Raise ValueError if the recipe names something that is not registered.

        Args:
            source: of the recipe, for the message.
        """
        found = [
            f"{key}: unknown {name!r}{nearest(name, known)}" for key, name, known in self.named() if name not in known
        ]
        if found:
            raise ValueError(f"{source}: {'; '.join(found)}" if source else "; ".join(found))

    def named(self) -> Iterator[tuple[str, str, list[str]]]:
        """Yield (key, name, registered names) for each name in the recipe: the backbone, its neuron, their options."""
        settings = self.config.model.backbone
        yield "model.backbone.name", settings.name, backbones.names()
        yield "model.backbone.activation", settings.activation, list(backbones.neurons())
        yield "model.backbone.arithmetic", settings.arithmetic, list(backbones.ARITHMETICS)
        if settings.name in backbones.names():
            options = {
                *find_family(settings.name)[1],
                *(each for neuron in backbones.neurons().values() for each in neuron.options),
            }
            yield from (("model.backbone.options", option, sorted(options)) for option in settings.options)

    # Data

    def download(self) -> None:
        """Fetch the data of the recipe, if they are missing."""
        raise self.refusal("downloads nothing")

    @abstractmethod
    def read(self, split: Split) -> Dataset:
        """Return a split as it is stored; classes are those of the recipe, or all that the data have.

        Raises:
            FileNotFoundError: a file or folder is missing.
            ValueError: what is wrong with the data, by file and place.
        """

    @abstractmethod
    def training_batches(self, dataset: Dataset, accelerator: Accelerator) -> Batches:
        """Return this process's share of the training batches, augmented, in the order of the recipe's seed."""

    @abstractmethod
    def evaluation_batches(self, dataset: Dataset, accelerator: Accelerator) -> Iterable[Any]:
        """Return this process's share of the batches (images in [0, 1], targets), in the order of the data."""

    def facts(self, dataset: Dataset) -> dict[str, Any]:
        """Return what run.json should have of the data and of the network."""
        return {}

    def data_report(self, dataset: Dataset) -> DataReport | None:
        """Return the counts of a split's objects; None: its images have none."""
        return None

    def warnings(self, dataset: Dataset, *, data_alone: bool = False) -> list[str]:
        """Return a sentence for each likely mistake in training data, and in the recipe unless `data_alone`."""
        return [] if data_alone else run_warnings(self.config, len(dataset))

    def shared_images(self, train: Dataset, val: Dataset) -> tuple[str, ...]:
        """Return the paths of images that are in both splits, as far as the task can tell."""
        return ()

    def example(self) -> Any:
        """Return one image of noise, of the size that the recipe's network sees in evaluation, as a batch for it."""
        raise self.refusal("has no example of an image")

    # Training

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return the network; its class names are filled in."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Return the scalar losses of a batch by name."""

    def class_outputs(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Return (outputs in front of the classes', outputs of each) by name of each layer with outputs per class."""
        raise self.refusal("starts from no whole network (model.weights)")

    def describe_batch(self, batch: Any) -> str:
        """Say which images a batch has, for an error."""
        return ""

    def is_at_chance(self, metrics: Mapping[str, float]) -> bool:
        """Return whether an evaluation is no better than guessing."""
        return False

    def learn_from(self, teacher: Task) -> None:
        """Raise ValueError unless networks of the other task's recipe can teach networks of this one's."""
        raise self.refusal("learns from no teacher (distillation.teacher)")

    def head_of(self, model: nn.Module) -> nn.Module:
        """Return the module whose output are the class predictions."""
        raise self.refusal("learns from no teacher (distillation.teacher)")

    def receiver_of(self, model: nn.Module) -> nn.Module:
        """Return the module whose input are the features."""
        return self.head_of(model)

    def teacher_pass(self, student: nn.Module) -> Callable[[nn.Module, Any], None]:
        """Return (teacher, batch), which runs the teacher on what the student has just seen of the batch."""
        raise self.refusal("learns from no teacher (distillation.teacher)")

    def distance(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Return the distance between two networks' class predictions, shape ()."""
        raise self.refusal("learns from no teacher (distillation.teacher)")

    def finish(self, model: nn.Module, dataset: Dataset, run: Run) -> None:  # noqa: B027, nothing by default
        """Leave pictures of the trained network on evaluation images in the run folder."""

    # Evaluation

    @abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        dataset: Dataset,
        accelerator: Accelerator,
        *,
        save: Path | None = None,
    ) -> Evaluation:
        """Return the metrics of a network in evaluation mode, and the spike activity on the way.

        Args:
            model: the network, or what behaves like one.
            batches: of `evaluation_batches`, perhaps changed.
            dataset: the images of all processes.
            accelerator: of the run.
            save: folder for files about the predictions; it is made if need be.
        """

    def sections(self, logged: Evaluation | None, found: Examination | None) -> list[Section]:
        """Return the sections that this task alone has on a page about a run, in their order.

        Args:
            logged: what the log has of the weights; None before the first evaluation.
            found: what `examine` gave; None where the run could not be evaluated.
        """
        return []

    def examine(
        self, model: nn.Module, dataset: Dataset, batches: Iterable[Any], accelerator: Accelerator, num_images: int
    ) -> Examination:
        """Return an evaluation of a network, and what a page shows of it beside the log.

        Args:
            model: the network, in evaluation mode.
            dataset: the evaluation images.
            batches: of `evaluation_batches`.
            accelerator: of the run.
            num_images: best and worst images to show, so many each.
        """
        return Examination(self.evaluate(model, batches, dataset, accelerator))

    def analogue_parts(self, model: nn.Module) -> dict[str, str]:
        """Return the parts of the network that are meant to see real values, as `backbones.certify` takes them."""
        return {}

    # Predictions and files

    def predict(
        self, model: nn.Module, pictures: Sequence[Tensor], *, batch_size: int, precision: AbstractContextManager
    ) -> list[AnyPrediction]:
        """Return a prediction for each picture (3, H, W), uint8 or float in [0, 1]; subclasses have more options."""
        raise self.refusal("has no predictions of single images")

    def prepare(self, model: nn.Module, picture: Tensor) -> Tensor:
        """Return a picture as the network takes one, in [0, 1]: for `spike_maps`."""
        raise self.refusal("has no predictions of single images")

    def attach(self, run: Run) -> None:  # noqa: B027, nothing by default
        """Take from a run what predictions need beside its recipe."""

    def describe_labels(self, run: Run) -> dict[str, Any]:
        """Return what a file of predictions says of the labels."""
        return {"classes": list(self.config.data.classes)}

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the images that `deployable` takes, by the recipe."""
        raise self.refusal("cannot be exported")

    def backbone_of(self, model: nn.Module) -> backbones.Backbone:
        """Return the backbone in the network."""
        raise self.refusal("cannot be exported")

    def deployable(self, model: nn.Module) -> Deployable:
        """Return the part of the network that goes into a file."""
        raise self.refusal("cannot be exported")

    def spiking_part(self, model: nn.Module) -> SpikingPart:
        """Return the part of the network over normalised images that consists of layers with weights and spikes.

        Args:
            model: the network; it may be changed.
        """
        raise self.refusal("cannot be exported to NIR")

    def calibration_images(self, model: nn.Module, number: int) -> Tensor:
        """Return training images without augmentation, as `deployable` takes them: drawn at random, always the same."""
        raise self.refusal("cannot be exported")

    def model_around(self, run: Callable[[Tensor], dict[str, Tensor]], *, boxes: bool = False) -> Callable[[Any], Any]:
        """Return what behaves like the network in evaluation, around outputs by name that a file computes.

        Args:
            run: images as `deployable` takes them, on the CPU -> outputs by name.
            boxes: these are the boxes of one image, resized.
        """
        raise self.refusal("cannot be exported")

    def refusal(self, what: str) -> ValueError:
        """Return the error for something that the task does not do."""
        return ValueError(f"task {self.name}: {what}")


@contextmanager
def record_spikes(model: nn.Module) -> Iterator[Callable[[], dict[str, Any]]]:
    """Watch an evaluation; what it yields can be called afterwards, in all processes together.

    It returns "activity" and "activity_per_layer" of all processes and "potentials" of this process's first batch, as
    `Evaluation` takes them, or nothing for a model without spike layers.
    """

    def found() -> dict[str, Any]:
        layers = backbones.sum_activity(gather_object([activity]))
        if not layers:
            return {}
        rates = {name: layer.firing_rate for name, layer in layers.items()}
        return {"activity": backbones.spike_activity(layers), "activity_per_layer": rates, "potentials": potentials}

    with backbones.record_activity(model) as activity, backbones.record_potentials(model) as potentials:
        yield found
