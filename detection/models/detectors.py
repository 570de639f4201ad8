"""torchvision's four detectors over a spiking backbone and neck, with torchvision's own heads or spiking ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

from backbones import Backbone, SpikeFactory, average_steps
from backbones.deploy.events.vision import has_vision
from backbones.networks.base import conv
from detection.config.schema import Model
from detection.models.inference import AnyShape
from detection.models.neck import BackboneWithNeck, normalised_spikes
from detection.models.quick import retinanet_boxes

POOLED_SIDE = 7  # cells of a pooled region
MakeTower = Callable[[], "SpikingTower"]


class SpikingTower(nn.Module):
    """Spikes of every pyramid level: (BN -> spike -> 3x3 convolution) num_convs times -> BN -> spike.

    The convolutions are shared by all levels, as in any dense head; BN and spike are each level's own. Levels differ
    in their statistics, and the running averages that evaluation uses fit a level only if no other feeds them.

    Args:
        channels: of every map, kept.
        num_convs: convolutions.
        num_levels: maps of the pyramid.
        spike: makes the spike layers.

    Shape: [(N, channels, H_i, W_i)] -> the same shapes, 0/1.
    """

    def __init__(self, channels: int, num_convs: int, num_levels: int, spike: SpikeFactory) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(spike.outputs(channels), channels, 3) for _ in range(num_convs))
        self.spikes = nn.ModuleList(
            nn.ModuleList(normalised_spikes(channels, spike) for _ in range(num_convs + 1)) for _ in range(num_levels)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self._one_level(x, spikes) for x, spikes in zip(maps, self.spikes, strict=True)]

    def _one_level(self, x: Tensor, spikes: nn.ModuleList) -> Tensor:
        first, *others = spikes
        x = first(x)
        for layer, spike in zip(self.convs, others, strict=True):
            x = spike(layer(x))
        return x


class SpikingRetinaNetHead(RetinaNetHead):
    """RetinaNet's head in which every convolution sees spikes, those of prediction included.

    Shape: [(N, channels, H_i, W_i)] -> {"cls_logits": (N, A, num_classes), "bbox_regression": (N, A, 4)}, where A is
    num_anchors times the cells of all levels.
    """

    def __init__(self, channels: int, num_anchors: int, num_classes: int, make_tower: MakeTower) -> None:
        super().__init__(channels, num_anchors, num_classes)
        self.classification_head.conv = nn.Sequential()  # the towers take their place
        self.regression_head.conv = nn.Sequential()
        self.classification_tower, self.regression_tower = make_tower(), make_tower()

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {
            "cls_logits": self.classification_head(self.classification_tower(x)),
            "bbox_regression": self.regression_head(self.regression_tower(x)),
        }


class SpikingFCOSHead(FCOSHead):
    """FCOS's head in which every convolution sees spikes, those of prediction included.

    Shape: [(N, channels, H_i, W_i)] -> {"cls_logits": (N, A, num_classes), "bbox_regression": (N, A, 4),
    "bbox_ctrness": (N, A, 1)}, where A counts the cells of all levels.
    """

    def __init__(self, channels: int, num_classes: int, make_tower: MakeTower) -> None:
        super().__init__(channels, 1, num_classes, num_convs=0)
        self.classification_tower, self.regression_tower = make_tower(), make_tower()

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        cls_logits = self.classification_head(self.classification_tower(x))
        bbox_regression, bbox_ctrness = self.regression_head(self.regression_tower(x))
        return {"cls_logits": cls_logits, "bbox_regression": bbox_regression, "bbox_ctrness": bbox_ctrness}


class ForegroundOnly:
    """Mixin of torchvision's dense detectors, whose heads keep a logit for label 0, the background: never returned."""

    def postprocess_detections(
        self, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Return torchvision's detections, the logit of the background set so low that it wins nowhere."""
        background = anchors[0][0].new_zeros(1).long()
        foreground = [logits.index_fill(-1, background, float("-inf")) for logits in head_outputs["cls_logits"]]
        return super().postprocess_detections(head_outputs | {"cls_logits": foreground}, anchors, image_shapes)


class AnyShapeFasterRCNN(AnyShape, FasterRCNN):
    """A Faster R-CNN for images of any shape."""


class ForegroundRetinaNet(ForegroundOnly, AnyShape, RetinaNet):
    """A RetinaNet for labels 1 to K."""

    def postprocess_detections(
        self, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Return torchvision's detections without those of the background."""
        logits, regression = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        if not all(map(has_vision, (*logits, *regression))):
            return super().postprocess_detections(head_outputs, anchors, image_shapes)
        return [
            retinanet_boxes(self, [x[i] for x in logits], [x[i] for x in regression], anchors[i], size)
            for i, size in enumerate(image_shapes)
        ]


class ForegroundFCOS(ForegroundOnly, AnyShape, FCOS):
    """An FCOS for labels 1 to K."""


class AnyShapeSSD(AnyShape, SSD):
    """An SSD for images of any shape."""


def build_fasterrcnn(config: Model, backbone: BackboneWithNeck, num_classes: int, spike: SpikeFactory) -> FasterRCNN:
    """A Faster R-CNN for labels 1 to `num_classes`; its RPN and box head stay analogue.

    One anchor size per level (`head.anchor_scale` strides) in three aspect ratios, as published for pyramids (Lin et
    al., arXiv:1612.03144). Regions are pooled from the levels of the backbone, not from the extra one.

    Raises:
        ValueError: the strides of the levels do not double from one to the next, which the pooling takes for granted.
    """
    strides = backbone.strides[: len(backbone.levels)]
    if any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
        raise ValueError(
            f"neck.levels {', '.join(backbone.levels)} have the strides {', '.join(map(str, strides))}: "
            "fasterrcnn needs levels whose strides double from one to the next"
        )
    sizes = tuple((round(config.anchor_scale * stride),) for stride in backbone.strides)
    features = config.head.representation_size
    return AnyShapeFasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(list(backbone.levels), output_size=POOLED_SIDE, sampling_ratio=2),
        box_head=TwoMLPHead(backbone.out_channels * POOLED_SIDE**2, features),
        box_predictor=FastRCNNPredictor(features, num_classes + 1),
        box_batch_size_per_image=config.head.num_regions,
        **_sizes(config),
        **_colours_and_limits(config, "box_"),
    )


def retinanet_anchors(strides: Sequence[int], scale: float) -> AnchorGenerator:
    """Return the anchors of a RetinaNet whose levels have these strides; `scale` is `head.anchor_scale`."""
    sizes = tuple(tuple(round(scale * stride * 2 ** (octave / 3)) for octave in range(3)) for stride in strides)
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))


def build_retinanet(config: Model, backbone: BackboneWithNeck, num_classes: int, spike: SpikeFactory) -> RetinaNet:
    """A RetinaNet for labels 1 to `num_classes`.

    Three anchor sizes (2^0, 2^1/3, 2^2/3 times `head.anchor_scale` strides) in three aspect ratios per cell, as
    published (Lin et al., arXiv:1708.02002).
    """
    settings, channels = config.head, backbone.out_channels
    anchors = retinanet_anchors(backbone.strides, config.anchor_scale)
    shape = anchors.num_anchors_per_location()[0], num_classes + 1
    if settings.spiking:
        make_tower = partial(SpikingTower, channels, settings.num_convs, len(backbone.strides), spike)
        head: RetinaNetHead = SpikingRetinaNetHead(spike.outputs(channels), *shape, make_tower)
    else:
        head = RetinaNetHead(channels, *shape, norm_layer(settings.norm or "none", channels))
        for tower in (head.classification_head, head.regression_head):
            tower.conv = tower.conv[: settings.num_convs]
    options = {"anchor_generator": anchors, "head": head, **_sizes(config), **_colours_and_limits(config)}
    return ForegroundRetinaNet(backbone, num_classes + 1, **options)


def build_fcos(config: Model, backbone: BackboneWithNeck, num_classes: int, spike: SpikeFactory) -> FCOS:
    """An FCOS for labels 1 to `num_classes`.

    Which level an object belongs to follows from the strides, as published (Tian et al., arXiv:1904.01355): the
    finest takes all up to 8 strides from cell to border, each further one 4 to 8 of its own, the coarsest the rest.
    """
    settings, channels, strides = config.head, backbone.out_channels, backbone.strides
    if settings.spiking:
        make_tower = partial(SpikingTower, channels, settings.num_convs, len(strides), spike)
        head: FCOSHead = SpikingFCOSHead(spike.outputs(channels), num_classes + 1, make_tower)
    else:
        # torchvision's own construction has 32 groups, which small pyramids do not divide into.
        norm = norm_layer(settings.norm or "group", channels) or nn.Identity
        head = FCOSHead(channels, 1, num_classes + 1, num_convs=0)
        head.classification_head = FCOSClassificationHead(
            channels, 1, num_classes + 1, settings.num_convs, norm_layer=norm
        )
        head.regression_head = FCOSRegressionHead(channels, 1, settings.num_convs, norm_layer=norm)
    anchors = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
    options = {"anchor_generator": anchors, "head": head, **_sizes(config), **_colours_and_limits(config)}
    return ForegroundFCOS(backbone, num_classes + 1, **options)


def build_ssd(config: Model, backbone: BackboneWithNeck, num_classes: int, spike: SpikeFactory) -> SSD:
    """An SSD for labels 1 to `num_classes`, on images resized to squares of `max_size` pixels.

    Its head consists of prediction convolutions alone. Default boxes as in torchvision's SSD300, whatever the number
    of maps: sides of 0.07, then 0.15 to 1.05 in equal steps, relative to the image; aspect ratios 1, 2 and 1/2, on the
    inner maps 3 and 1/3 too.
    """
    num_maps = len(backbone.strides)
    aspect_ratios = [[2, 3] if 0 < index < num_maps - 2 else [2] for index in range(num_maps)]
    scales = [0.07, *np.linspace(0.15, 1.05, num_maps).round(4).tolist()]
    boxes, size = DefaultBoxGenerator(aspect_ratios, scales=scales), (config.max_size, config.max_size)
    return AnyShapeSSD(backbone, boxes, size, num_classes + 1, **_colours_and_limits(config))


def class_outputs(detector: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (1, outputs of each class) for each layer that has outputs for the background and every class, by name.

    Within the outputs of an anchor those of the background come first, then those of label 1, 2, ...
    """
    each = {"cls_logits": 1, "cls_score": 1, "bbox_pred": 4}
    found = {}
    for name, module in detector.named_modules():
        parent, _, last = name.rpartition(".")
        if isinstance(module, nn.Conv2d | nn.Linear) and "rpn" not in name:
            if last in each:
                found[name] = (1, each[last])
            elif parent.endswith("classification_head.module_list"):  # an SSD's
                found[name] = (1, 1)
    return found


def average_over_steps(detector: nn.Module, body: Backbone) -> None:
    """Let a detector's heads, which see the maps of all time steps, give the mean of their outputs over the steps.

    So losses and detections are those of the means. The regions of a Faster R-CNN, found in the means of its RPN, are
    pooled from the maps of each step. `body` is its backbone, which has the number of steps.

    Shape: what a head gives, (T N, ...), step by step -> (N, ...).
    """

    def average(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return average_steps(output, body.time_steps)
        if isinstance(output, dict):
            return {name: average(module, inputs, value) for name, value in output.items()}
        return type(output)(average(module, inputs, value) for value in output)

    def repeat(module: nn.Module, inputs: tuple[Any, list[Tensor], list[tuple[int, int]]]) -> tuple[Any, ...]:
        maps, regions, sizes = inputs
        return maps, regions * body.time_steps, sizes * body.time_steps

    heads = [detector.head] if hasattr(detector, "head") else [detector.rpn.head, detector.roi_heads.box_predictor]
    for head in heads:
        head.register_forward_hook(average)
    if hasattr(detector, "roi_heads"):
        detector.roi_heads.box_roi_pool.register_forward_pre_hook(repeat)


def norm_layer(norm: str, channels: int) -> Callable[[int], nn.Module] | None:
    """The norm of an analogue head as torchvision takes it: "none", or "group" of up to 32 groups of two channels."""
    if norm == "none":
        return None
    # A group of one channel could not be normalised on a map of a single cell.
    groups = next(groups for groups in (32, 16, 8, 4, 2, 1) if groups == 1 or channels % (2 * groups) == 0)
    return partial(nn.GroupNorm, groups)


def _sizes(config: Model) -> dict[str, Any]:
    return {"min_size": tuple(config.min_size), "max_size": config.max_size}


def _colours_and_limits(config: Model, prefix: str = "") -> dict[str, Any]:
    """Return torchvision's arguments for the colours of images and for the choice of detections."""
    settings = config.head
    return {
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        f"{prefix}score_thresh": settings.score_threshold,
        f"{prefix}nms_thresh": settings.nms_threshold,
        f"{prefix}detections_per_img": settings.max_detections,
    }
