"""Classification: one class per image, such as to pretrain a detector's backbone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageOps
from torch import Tensor, nn

from backbones import Backbone, average_so_far, hook_layers, time_steps
from detection.data import build_loader
from detection.data import images as image_data
from detection.data.image_batches import FolderImages, MemoryBatches, evaluation_transform
from detection.data.images import ImageFiles, Images, read_image_split
from detection.data.pictures import pixels_of, unit
from detection.models import build_classifier, colours_of, describe_backbone
from detection.records import Evaluation
from detection.sections import Examination, Section, Table, Words, count, percent
from detection.tasks import register_task
from detection.tasks.base import Dataset, Split, Task, record_spikes
from detection.tasks.parts import Deployable, SpikingPart
from detection.tasks.predictions import ClassPrediction
from detection.tasks.recipes import ClassificationRecipe
from detection.training.distillation import require_same_input, softened_distance


@register_task
class ClassificationTask(Task):
    """Classifiers over spiking backbones, on CIFAR or on a folder of images per class."""

    recipe = ClassificationRecipe
    config: ClassificationRecipe
    headline = ("top1", "top5")
    metrics = ("top1", "top5")
    best_by = "top1"
    score = "Accuracy"
    words = {"top1": "top-1 accuracy", "top5": "top-5 accuracy"}  # noqa: RUF012
    num_calibration = 256

    def __init__(self, config: ClassificationRecipe) -> None:
        super().__init__(config)
        self._may_download = False

    def named(self) -> Iterator[tuple[str, str, list[str]]]:
        yield from super().named()
        yield "data.format", self.config.data.format, list(image_data.READERS)

    def download(self) -> None:
        """Fetch CIFAR when it is read."""
        self._may_download = True

    def read(self, split: Split) -> Images | ImageFiles:
        return read_image_split(self.config.data, split, download=self._may_download)

    def training_batches(self, dataset: Images | ImageFiles, accelerator: Accelerator) -> Any:
        data, train = self.config.data, self.config.train
        share = (accelerator.process_index, accelerator.num_processes)
        if isinstance(dataset, Images):
            return MemoryBatches(
                dataset,
                accelerator.device,
                batch_size=train.batch_size,
                augment=data.augment,
                seed=train.seed,
                share=share,
            )
        items = FolderImages(dataset, data, train=True)
        options = {"batch_size": train.batch_size, "workers": data.workers, "seed": train.seed, "share": share}
        return build_loader(items, shuffle=True, collate=None, **options)

    def evaluation_batches(self, dataset: Images | ImageFiles, accelerator: Accelerator) -> Iterable[Any]:
        data, batch_size = self.config.data, self.config.train.batch_size
        share = (accelerator.process_index, accelerator.num_processes)
        if isinstance(dataset, Images):
            return MemoryBatches(dataset, accelerator.device, batch_size=batch_size, share=share)
        items = FolderImages(dataset, data, train=False)
        options = {"batch_size": batch_size, "workers": data.workers, "share": share}
        return build_loader(items, shuffle=False, collate=None, **options)

    def example(self) -> Tensor:
        return torch.rand(1, self.config.data.channels, self.config.data.size, self.config.data.size)

    # Training

    def build_model(self) -> nn.Module:
        return build_classifier(self.config)

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        images, labels = batch
        return {"classification": F.cross_entropy(model(images), labels, label_smoothing=self.config.label_smoothing)}

    def class_outputs(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """The last layer of the head alone."""
        *_, last = (name for name, module in model.head.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
        return {f"head.{last}".rstrip("."): (0, 1)}

    def facts(self, dataset: Dataset) -> dict[str, Any]:
        return describe_backbone(self.config)

    def warnings(self, dataset: Dataset, *, data_alone: bool = False) -> list[str]:
        """Return also that there is one class alone."""
        found = [f"one class alone, {dataset.classes[0]}: any network is right"] if len(dataset.classes) < 2 else []
        return found + super().warnings(dataset, data_alone=data_alone)

    def shared_images(self, train: Dataset, val: Dataset) -> tuple[str, ...]:
        """Return the folder, once for each image, where one is both splits."""
        data = self.config.data
        folders = {(data.root / folder).resolve() for folder in (data.train, data.val)}
        one = data.format in ("folder", "events") and len(folders) == 1 and data.train != ""  # "": parts of one set
        return tuple(map(str, folders)) * len(val) if one else ()

    def is_at_chance(self, metrics: Mapping[str, float]) -> bool:
        """Up to half as much again as the share of one class, and at most 0.1 more."""
        share = 1 / len(self.config.data.classes)
        return metrics["top1"] < min(1.5 * share, share + 0.1)

    def learn_from(self, teacher: Task) -> None:
        """Any classifier of these classes and images will do: each normalises them by itself."""
        require_same_input(self.config, teacher.config, "data.size")

    def head_of(self, model: nn.Module) -> nn.Module:
        return model.head

    def teacher_pass(self, student: nn.Module) -> Callable[[nn.Module, Any], None]:
        return lambda teacher, batch: teacher(batch[0])

    def distance(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return softened_distance(student, teacher, temperature)

    # Evaluation

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        dataset: Images | ImageFiles,
        accelerator: Accelerator,
        *,
        save: Path | None = None,
    ) -> Evaluation:
        """Return accuracy "top1" and "top5" in [0, 1], and "val_loss", the mean cross entropy.

        With fewer than five classes "top5" takes as many as there are. In several time steps "anytime" has the top-1 of
        the network stopped after fewer.

        Raises:
            ValueError: `save`: a classifier has no boxes to save.
        """
        if save is not None:
            raise ValueError(f"--save {save}: a classifier has no boxes to save")
        return self._evaluate(model, batches, accelerator)

    def _evaluate(
        self, model: nn.Module, batches: Iterable[Any], accelerator: Accelerator, confusion: Tensor | None = None
    ) -> Evaluation:
        """Return the evaluation; `confusion` (K, K), images by true class (row) and answer (column), is added to."""
        counts, steps, so_far = [], time_steps(model), []
        heads = {"head": model.head} if steps > 1 else {}

        def keep(name: str, head: nn.Module, x: Tensor, logits: Tensor) -> None:
            so_far[:] = average_so_far(logits.float(), steps)

        with record_spikes(model) as spikes, hook_layers(heads, after=keep):
            for images, labels in batches:
                images, labels = images.to(accelerator.device), labels.to(accelerator.device)
                with accelerator.autocast():
                    logits = model(images)
                early = [_count(each, labels)[1] for each in so_far[:-1]]
                counts.append(torch.stack([*_count(logits.float(), labels), *early]))
                if confusion is not None:
                    confusion += _count_answers(logits.float(), labels).cpu()
        # Batch b is the b // n-th of process b % n: summed in their order, for the same digits with any number of them.
        shares = gather_object([torch.stack(counts).tolist() if counts else []])
        in_order = [count for row in itertools.zip_longest(*shares) for count in row if count is not None]
        number, top1, top5, loss, *early = (sum(column) for column in zip(*in_order, strict=True))
        metrics = {"top1": top1 / number, "top5": top5 / number, "val_loss": loss / number}
        after = {f"top1 after {step} of {steps} steps": count / number for step, count in enumerate(early, start=1)}
        return Evaluation(metrics=metrics, tables={"anytime": after} if after else {}, **spikes())

    def sections(self, logged: Evaluation | None, found: Examination | None) -> list[Section]:
        parts = [] if found is None else found.parts["classes"]
        return [Section("classes", "Classes", "Accuracy per class and confusions", parts)]

    @torch.no_grad()
    def examine(
        self,
        model: nn.Module,
        dataset: Images | ImageFiles,
        batches: Iterable[Any],
        accelerator: Accelerator,
        num_images: int,
    ) -> Examination:
        classes = self.config.data.classes
        confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
        evaluation = self._evaluate(model, batches, accelerator, confusion)
        return Examination(evaluation, {"classes": confusion_parts(confusion, classes)})

    # Predictions and files

    @torch.no_grad()
    def predict(
        self, model: nn.Module, pictures: Sequence[Tensor], *, batch_size: int, precision: AbstractContextManager
    ) -> list[ClassPrediction]:
        """Return class probabilities; images are cut and resized as in the evaluation of the run."""
        device, classes = next(model.parameters()).device, tuple(self.config.data.classes)
        results = []
        for start in range(0, len(pictures), batch_size):
            chosen = pictures[start : start + batch_size]
            batch = torch.stack([self.prepare(model, picture) for picture in chosen]).to(device)
            with precision:
                logits = model(batch)
            rows = logits.float().softmax(1).cpu()
            results += [
                ClassPrediction(pixels_of(picture), classes, None, row)
                for row, picture in zip(rows, chosen, strict=True)
            ]
        return results

    def prepare(self, model: nn.Module, picture: Tensor) -> Tensor:
        data = self.config.data
        if data.channels != 3:
            return unit(picture)
        pixels = pixels_of(picture)
        if data.format == "folder" and not data.in_memory:
            return evaluation_transform(data.size)(torch.from_numpy(pixels).permute(2, 0, 1))
        image = ImageOps.fit(Image.fromarray(pixels), (data.size, data.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    @property
    def input_size(self) -> tuple[int, int]:
        return self.config.data.size, self.config.data.size

    def backbone_of(self, model: nn.Module) -> Backbone:
        return model.backbone

    def deployable(self, model: nn.Module) -> Deployable:
        outputs = {"logits": "(N, K) float32, in the order of classes"}
        return Deployable(model, outputs, meaning=f"{self.config.data.colours} in [0, 1], normalised inside")

    def spiking_part(self, model: nn.Module) -> SpikingPart:
        """Return all but the normalisation."""
        model.normalise = nn.Identity()
        return SpikingPart(model, model.backbone, *colours_of(self.config))

    def calibration_images(self, model: nn.Module, number: int) -> Tensor:
        dataset = self.read("train")
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:number]
        if isinstance(dataset, Images):
            return dataset.pixels[chosen].float() / 255
        images = FolderImages(dataset, self.config.data, train=False)
        return torch.stack([images[index][0] for index in chosen.tolist()])

    def model_around(self, run: Callable[[Tensor], dict[str, Tensor]], *, boxes: bool = False) -> Callable[[Any], Any]:
        return lambda images: run(images)["logits"]


def _count(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Images, right answers, right answers among the first five, and summed cross entropy of a batch, in float64."""
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    return [
        torch.tensor(len(labels), device=loss.device).double(),
        best[:, 0].sum().double(),
        best.sum().double(),
        loss,
    ]


def _count_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Images of a batch by true class (row) and answer (column), the answer being the one that counts for top-1.

    argmax would choose another one of equals, as a silent network's logits are.
    """
    number = logits.shape[1]
    answers = logits.topk(min(5, number)).indices[:, 0]
    return torch.bincount(labels * number + answers, minlength=number**2).view(number, number)


def confusion_parts(confusion: Tensor, classes: Sequence[str]) -> list[Any]:
    """Return the share of right answers per class, the lowest first, and the ten most frequent mistakes.

    Args:
        confusion: (K, K) images by true class (row) and answer (column).
        classes: names of the K classes.
    """
    totals = confusion.sum(1).tolist()
    shares = {index: int(confusion[index, index]) / totals[index] for index in range(len(classes)) if totals[index]}
    rows = [
        (classes[index], percent(share, bar=True), count(totals[index]))
        for index, share in sorted(shares.items(), key=lambda item: item[1])
    ]
    parts: list[Any] = [Table("Accuracy per class", ("class", "right answers", "images"), rows)]
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    pairs = []
    for place in wrong.argsort(descending=True, stable=True)[:10].tolist():
        truth, answer = divmod(place, len(classes))
        number = int(wrong[place])
        if number:
            pairs.append((classes[truth], classes[answer], count(number), percent(number / totals[truth])))
    if pairs:
        columns = ("true class", "answer", "images", "share of the class")
        title = "Most frequent mistakes"
        parts += [Words(title, "heading"), Table(title, columns, pairs)]
    return parts
