"""What a task is: the one place where kinds of training differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from backbones import record_activity, record_potentials, spike_activity, sum_activity
from detection.config import Recipe
from detection.records import Evaluation
from detection.runs import Run
from detection.training.trainer import Batches

if TYPE_CHECKING:
    from detection.tasks.predictions import AnyPrediction

Split = Literal["train", "val"]


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


class Deployable:
    """The part of a network that goes into a file, and what it takes and gives.

    Args:
        network: images (N, 3, H, W), RGB in [0, 1], as the file will be given them -> a tensor or a tuple of them.
        outputs: what each of them means, by the name that it has in the file.
        size: height and width of the images, by the recipe.
        stride: of the last feature map, in pixels: the least height and width.
        meaning: of the images, in words.
        keep: parts of names of layers that stay in floating point over spikes too.
    """

    def __init__(
        self,
        network: nn.Module,
        outputs: Mapping[str, str],
        *,
        size: tuple[int, int],
        stride: int,
        meaning: str,
        keep: tuple[str, ...] = (),
    ) -> None:
        self.network, self.outputs, self.size, self.stride = network, dict(outputs), size, stride
        self.meaning, self.keep = meaning, keep


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
        num_calibration: images that 8-bit thresholds are set on by default.
        prediction_layers: parts of names of the layers whose outputs are predictions: they stay in floating point in
            8-bit files, and Muon leaves them to AdamW.
    """

    recipe: ClassVar[type[Recipe]]
    headline: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]]
    best_by: ClassVar[str]
    words: ClassVar[Mapping[str, str]] = {}
    num_calibration: ClassVar[int] = 64
    prediction_layers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Recipe) -> None:
        self.config = config

    @property
    def name(self) -> str:
        """Value of `task` in its recipes."""
        return self.config.task

    def with_classes(self, classes: Sequence[str]) -> Self:
        """Return the task of the recipe with the class names filled in."""
        data = self.config.data.model_copy(update={"classes": list(classes)})
        return type(self)(self.config.model_copy(update={"data": data}))

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
        """Return what run.json should have of the data."""
        return {}

    # Training

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return the network; its class names are filled in."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Return the scalar losses of a batch by name."""

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
        """Return the module whose input are the features and whose output are the class predictions."""
        raise self.refusal("learns from no teacher (distillation.teacher)")

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

    def deployable(self, model: nn.Module) -> Deployable:
        """Return the part of the network that goes into a file."""
        raise self.refusal("cannot be exported")

    def calibration_images(self, model: nn.Module, number: int) -> Tensor:
        """Return training images without augmentation, as `deployable` takes them: drawn at random, always the same."""
        raise self.refusal("cannot be exported")

    def model_around(self, run: Callable[[Tensor], dict[str, Tensor]]) -> Callable[[Any], Any]:
        """Return what behaves like the network in evaluation, around outputs by name that a file computes.

        Args:
            run: images as `deployable` takes them, on the CPU -> outputs by name.
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
        layers = sum_activity(gather_object([activity]))
        if not layers:
            return {}
        rates = {name: layer.firing_rate for name, layer in layers.items()}
        return {"activity": spike_activity(layers), "activity_per_layer": rates, "potentials": potentials}

    with record_activity(model) as activity, record_potentials(model) as potentials:
        yield found
