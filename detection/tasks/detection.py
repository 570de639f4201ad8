"""Detection: boxes with classes, by torchvision's detectors, counted by COCO's and VOC's average precision."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from backbones import Backbone
from detection.data import DetectionDataset, build_loader, formats, read_split
from detection.data.download import download
from detection.data.pictures import pixels_of, unit
from detection.data.report import DataReport, report, shared_images
from detection.evaluation import CocoEvaluator, Detections, import_backend, mean_average_precision, precision_recall
from detection.models import build_detector, colours_of, describe_backbone
from detection.models.decoding import describe_decoding
from detection.models.dense import DensePredictions, DetectorOf, DetectorOfBoxes, EnteringSpikes, resize_and_pad
from detection.models.detectors import class_outputs
from detection.models.inference import check_unit_interval, padded_size, thresholds
from detection.records import Evaluation
from detection.runs import Run
from detection.sections import Examination, Section
from detection.tasks import register_task
from detection.tasks.base import Split, Task, record_spikes
from detection.tasks.checks import PADDED, few_boxes, small_objects
from detection.tasks.parts import Deployable, SpikingPart
from detection.tasks.predictions import Prediction, in_batches, read_category_ids
from detection.tasks.recipes import DetectionRecipe
from detection.training.distillation import detection_distance, require_same_input

# Their outputs are scores and boxes, where 8 bits would show: they stay in floating point, over spikes too.
PREDICTION_LAYERS = ("cls_logits", "bbox_reg", "bbox_pred", "bbox_ctrness", "module_list")
NAMES = {"retinanet": "RetinaNet", "fasterrcnn": "Faster R-CNN", "fcos": "FCOS", "ssd": "SSD"}
OUTPUTS = {
    "cls_logits": "(N, A, K + 1) float32: for each anchor, finest level first, background and classes",
    "bbox_regression": "(N, A, 4) float32: offsets from the anchors as torchvision encodes them",
    "bbox_ctrness": "(N, A, 1) float32: centredness logits",
}


@register_task
class DetectionTask(Task):
    """Detectors over spiking backbones, on VOC, COCO or other boxes."""

    recipe = DetectionRecipe
    config: DetectionRecipe
    headline = ("AP50", "AP")
    metrics = ("AP50", "AP", "AP75")
    best_by = "AP"
    score = "Average precision"
    words = {"AP50_11point": "VOC AP50 (11 points)", "AP50_area": "VOC AP50 (area)"}  # noqa: RUF012
    prediction_layers = PREDICTION_LAYERS
    windows = True

    def __init__(self, config: DetectionRecipe) -> None:
        super().__init__(config)
        self.category_ids = tuple(range(1, len(config.data.classes) + 1))
        self.category_source: Path | None = None

    def named(self) -> Iterator[tuple[str, str, list[str]]]:
        yield from super().named()
        yield "data.format", self.config.data.format, list(formats.READERS)

    def describe(self) -> str:
        model = self.config.model
        spiking = [part for part in ("neck", "head") if getattr(model, part).spiking]
        too = f", {' and '.join(spiking)} too" if spiking else ""
        return f"{NAMES[model.detector]}, {super().describe()}{too}"

    def describe_data(self) -> str:
        return super().describe_data().replace("synthetic data", "drawn scenes")

    def download(self) -> None:
        """Fetch VOC or COCO."""
        download(self.config.data)

    def read(self, split: Split) -> DetectionDataset:
        import_backend(self.config.evaluation.backend)  # a package that is missing is said before the data are read
        return read_split(self.config.data, split)

    def training_batches(self, dataset: DetectionDataset, accelerator: Accelerator) -> Any:
        from detection.data.transforms import build_mixture, build_transform  # half a second that training alone needs

        data, train = self.config.data, self.config.train
        mixture = build_mixture(data.augment)
        plain_epochs = math.ceil(round(data.augment.plain_share * train.epochs, 6))
        return build_loader(
            DetectionDataset(dataset.annotations, build_transform(data.augment), mixture),
            batch_size=train.batch_size,
            workers=data.workers,
            shuffle=True,
            seed=train.seed,
            aspect_groups=data.aspect_groups,
            share=(accelerator.process_index, accelerator.num_processes),
            mixed_epochs=train.epochs - plain_epochs if mixture else 0,
        )

    def evaluation_batches(self, dataset: DetectionDataset, accelerator: Accelerator) -> Iterable[Any]:
        """Each image goes to exactly one process."""
        return build_loader(
            dataset,
            batch_size=self.config.train.batch_size,
            workers=self.config.data.workers,
            shuffle=False,
            share=(accelerator.process_index, accelerator.num_processes),
        )

    def facts(self, dataset: DetectionDataset) -> dict[str, Any]:
        return describe_backbone(self.config) | {"category_ids": list(dataset.annotations.category_ids)}

    def data_report(self, dataset: DetectionDataset) -> DataReport:
        return report(dataset.annotations)

    def warnings(self, dataset: DetectionDataset, *, data_alone: bool = False) -> list[str]:
        """Return also classes with few objects, and objects smaller than the finest cell of the network."""
        found = few_boxes(dataset.annotations)
        if not data_alone:
            found += super().warnings(dataset) + small_objects(self.config, dataset.annotations)
        return found

    def shared_images(self, train: DetectionDataset, val: DetectionDataset) -> tuple[str, ...]:
        return shared_images(train.annotations, val.annotations)

    def example(self) -> list[Tensor]:
        """Return noise as large as images get: the shorter side min_size, the longer one max_size."""
        config = self.config.model
        return [torch.rand(self.config.data.channels, min(config.min_size[-1], config.max_size), config.max_size)]

    # Training

    def build_model(self) -> nn.Module:
        return build_detector(self.config)

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return model(*batch)

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        heads = ("rpn", "roi_heads") if self.config.model.detector == "fasterrcnn" else ("head",)
        return {"backbone": ("backbone.body",), "neck": ("backbone.neck",), "head": heads}

    def class_outputs(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        return class_outputs(model)

    def describe_batch(self, batch: Any) -> str:
        return f"image ids {', '.join(str(target['image_id']) for target in batch[1])}"

    def learn_from(self, teacher: Task) -> None:
        ours, theirs = self.config.model, teacher.config.model
        if theirs.detector != ours.detector:
            raise ValueError(f"is a {theirs.detector}, this recipe a {ours.detector}")
        require_same_input(self.config, teacher.config)
        # The teacher is given the pixels as the student's recipe has normalised them.
        for key in ("mean", "std"):
            if getattr(theirs, key) != getattr(ours, key):
                raise ValueError(
                    f"its images were normalised with {key} {getattr(theirs, key)}, this recipe's are with "
                    f"{getattr(ours, key)}"
                )

    def head_of(self, model: nn.Module) -> nn.Module:
        return model.head.classification_head

    def receiver_of(self, model: nn.Module) -> nn.Module:
        return model.head

    def teacher_pass(self, student: nn.Module) -> Callable[[nn.Module, Any], None]:
        seen: dict[str, Tensor] = {}
        student.transform.register_forward_hook(lambda module, inputs, output: seen.update(images=output[0].tensors))
        return lambda teacher, batch: teacher.head(list(teacher.backbone(seen["images"]).values()))

    def distance(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return detection_distance(student, teacher, temperature)

    def finish(self, model: nn.Module, dataset: DetectionDataset, run: Run) -> None:
        """Leave predictions.png, a contact sheet of the first images with predicted and true boxes."""
        from detection.tasks.detection_page import save_sheet  # which brings matplotlib, slow to import

        save_sheet(model, dataset, run.folder / "predictions.png")

    # Evaluation

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        dataset: DetectionDataset,
        accelerator: Accelerator,
        *,
        save: Path | None = None,
    ) -> Evaluation:
        """Return COCO's 12 numbers, "per_class" AP, and VOC's AP50 under "voc".

        "voc" has the mean over the classes of VOC's average precision at IoU 0.5, "AP50_11point" and "AP50_area".
        `save` gets predictions.json (COCO results) and precision_recall.png.
        """
        evaluation, evaluator, curves = self._evaluate(model, batches, dataset, accelerator)
        if save is not None and accelerator.is_main_process:
            save.mkdir(parents=True, exist_ok=True)
            evaluator.save_results(save / "predictions.json")
            from detection.curves import draw_precision_recall
            from detection.figures import save_png

            save_png(draw_precision_recall(curves), save / "precision_recall.png")
        return evaluation

    def _evaluate(
        self, model: nn.Module, batches: Iterable[Any], dataset: DetectionDataset, accelerator: Accelerator
    ) -> tuple[Evaluation, CocoEvaluator, dict[str, Any]]:
        """Return also all detections, in the evaluator, and precision over recall by class."""
        ground_truth, category_ids = dataset.ground_truth(), dataset.annotations.category_ids
        evaluator = CocoEvaluator(ground_truth, category_ids, self.config.evaluation.backend)
        device = next(model.parameters()).device
        with record_spikes(model) as spikes:
            for images, targets in batches:
                with accelerator.autocast():
                    predictions = model([image.to(device) for image in images])
                evaluator.update([target["image_id"] for target in targets], send_to_device(predictions, "cpu"))
        # VOC ranks equal scores in order of arrival, which must not depend on the number of processes.
        evaluator.detections = Detections.join(gather_object([evaluator.detections])).sorted_by_image()
        metrics = evaluator.compute()
        curves = precision_recall(ground_truth, evaluator.detections, category_ids)
        voc = {
            "AP50_11point": mean_average_precision(curves, "11-point"),
            "AP50_area": mean_average_precision(curves, "area"),
        }
        tables = {"per_class": evaluator.per_class(), "voc": voc}
        return Evaluation(metrics=metrics, tables=tables, **spikes()), evaluator, curves

    def sections(self, logged: Evaluation | None, found: Examination | None) -> list[Section]:
        from detection.tasks.detection_page import class_sections

        return class_sections(logged, None if found is None else found.parts)

    @torch.no_grad()
    def examine(
        self,
        model: nn.Module,
        dataset: DetectionDataset,
        batches: Iterable[Any],
        accelerator: Accelerator,
        num_images: int,
    ) -> Examination:
        evaluation, evaluator, curves = self._evaluate(model, batches, dataset, accelerator)
        from detection.tasks.detection_page import image_parts, precision_parts

        images = image_parts(model, dataset, evaluator.results, num_images)
        return Examination(evaluation, {"precision": precision_parts(curves), "images": images})

    def analogue_parts(self, model: nn.Module) -> dict[str, str]:
        """None in an SSD; else the head, unless head.spiking, and the pyramid's output convolutions and extra maps.

        The latter unless neck.spiking; never the backbone or the lateral convolutions.
        """
        config = self.config.model
        if config.detector == "ssd":
            return {}
        parts = {}
        if not config.head.spiking:
            parts |= dict.fromkeys(self.parts["head"], "analogue head")
        if not config.neck.spiking:
            pyramid = ("backbone.neck.fpn.layer_blocks", "backbone.neck.fpn.extra_blocks")
            parts |= dict.fromkeys(pyramid, "analogue neck")
        weighted = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        # A pyramid may have no extra maps, or make them by pooling.
        return {part: why for part, why in parts.items() if any(name.startswith(f"{part}.") for name in weighted)}

    # Predictions and files

    @torch.no_grad()
    def predict(
        self,
        model: nn.Module,
        pictures: Sequence[Tensor],
        *,
        batch_size: int,
        precision: AbstractContextManager,
        score_threshold: float = 0.3,
        nms_threshold: float | None = None,
    ) -> list[Prediction]:
        """Return what the detector finds.

        Images are batched only with those of equal padded size, so that an image's boxes do not depend on the others
        of its batch.

        Args:
            model: the detector.
            pictures: (3, H, W), uint8 or float in [0, 1].
            batch_size: images at a time; fewer where they are large.
            precision: context of the passes.
            score_threshold: only detections with a higher score; it may be lower than the recipe's.
            nms_threshold: of two boxes of a class whose IoU is above it the weaker one is dropped; None: the recipe's.

        Raises:
            ValueError: a threshold out of range.
        """
        check_unit_interval("score_threshold", score_threshold)
        if nms_threshold is not None:
            check_unit_interval("nms_threshold", nms_threshold)
        device, detector = next(model.parameters()).device, getattr(model, "detector", model)
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        # Once for each shape: torch computes it in Python, which takes longer than to resize the image.
        shapes = {picture.shape: picture for picture in pictures}
        sizes = {shape: padded_size(detector.transform, picture) for shape, picture in shapes.items()}
        for index, picture in enumerate(pictures):
            groups[sizes[picture.shape]].append(index)
        results: dict[int, Prediction] = {}
        with thresholds(detector, score_threshold, nms_threshold):
            for members in groups.values():
                for chosen in in_batches(members, batch_size, lambda index: pictures[index][0].numel()):
                    with precision:
                        found = model([self.prepare(model, pictures[index]).to(device) for index in chosen])
                    for index, detections in zip(chosen, found, strict=True):
                        results[index] = self._prediction(send_to_device(detections, "cpu"), pictures[index])
        return [results[index] for index in range(len(pictures))]

    def prepare(self, model: nn.Module, picture: Tensor) -> Tensor:
        return unit(picture)

    def _prediction(self, found: dict[str, Tensor], picture: Tensor) -> Prediction:
        return Prediction(
            image=pixels_of(picture),
            class_names=tuple(self.config.data.classes),
            path=None,
            boxes=found["boxes"].float(),
            scores=found["scores"].float(),
            labels=found["labels"],
            category_ids=self.category_ids,
        )

    def attach(self, run: Run) -> None:
        """Take COCO's category of each label, those that the evaluation of the run used."""
        self.category_ids, self.category_source = read_category_ids(run)

    def describe_labels(self, run: Run) -> dict[str, Any]:
        """Return the head of a COCO file without annotations."""
        pairs = zip(self.category_ids, self.config.data.classes, strict=True)
        return {
            "category_ids": str(self.category_source or "1..K, in the order of the run's data.classes"),
            "annotations": [],
            "categories": [{"id": category_id, "name": name} for category_id, name in pairs],
        }

    @property
    def input_size(self) -> tuple[int, int]:
        config = self.config.model
        if config.detector == "ssd":
            return config.max_size, config.max_size
        height, width = (math.ceil(side / PADDED) * PADDED for side in (config.min_size[-1], config.max_size))
        return height, width

    def backbone_of(self, model: nn.Module) -> Backbone:
        return model.backbone.body

    def deployable(self, model: nn.Module) -> Deployable:
        config, dense = self.config.model, DensePredictions(model)
        return Deployable(
            dense,
            {name: OUTPUTS[name] for name in dense.outputs},
            meaning=f"{self.config.data.colours} in [0, 1], normalised inside; resized (shorter side "
            f"{list(config.min_size)}, longer at most {config.max_size}) and padded at the right and below with the "
            f"mean colour {list(colours_of(self.config)[0])} to multiples of {PADDED}, which "
            "detection.exporters.OnnxDetector does",
            keep=PREDICTION_LAYERS,
            decoding=describe_decoding(model),
        )

    def spiking_part(self, model: nn.Module) -> SpikingPart:
        """Return the backbone up to the spikes that enter the neck."""
        return SpikingPart(EnteringSpikes(model.backbone), model.backbone.body, *colours_of(self.config))

    def calibration_images(self, model: nn.Module, number: int) -> Tensor:
        dataset = self.read("train")
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:number].tolist()
        return resize_and_pad(model.transform, [dataset[index][0] for index in chosen])

    def model_around(self, run: Callable[[Tensor], dict[str, Tensor]], *, boxes: bool = False) -> Callable[[Any], Any]:
        return (DetectorOfBoxes if boxes else DetectorOf)(self.build_model(), run)
