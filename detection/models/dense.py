"""The dense and the spiking part of a torchvision detector, and the detector around something that computes it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import resize_boxes

from detection.models.inference import pad_for, within
from detection.models.neck import BackboneWithNeck
from detection.models.quick import MOST_SIZES, KeptAnchors, PlainBatch


class DensePredictions(nn.Module):
    """A RetinaNet, FCOS or SSD up to what its head says of every anchor: without images' sizes and boxes.

    Shape: (N, 3, H, W) in [0, 1], which it normalises -> (N, A, num_classes), (N, A, 4) and, for FCOS, (N, A, 1),
    anchors in the order of torchvision's, finest level first; see `outputs`.

    Raises:
        ValueError: the detector pools regions, which depend on what it found before.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.kind = next((kind for kind in (RetinaNet, FCOS, SSD) if isinstance(detector, kind)), None)
        if self.kind is None:
            raise ValueError(
                f"a {type(detector).__name__} cannot be exported: it pools regions, whose number depends on the image "
                "(allowed: retinanet, fcos, ssd, and classifiers)"
            )
        transform = detector.transform
        self.register_buffer("mean", torch.tensor(transform.image_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(transform.image_std).view(-1, 1, 1), persistent=False)
        self.backbone, self.head = detector.backbone, detector.head
        self.outputs = ["cls_logits", "bbox_regression"] + (["bbox_ctrness"] if self.kind is FCOS else [])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = list(self.backbone((images - self.mean) / self.std).values())
        rows = self._of_layers(maps) if self.kind is SSD else self._of_towers(maps)
        return tuple(torch.cat(levels, dim=1) for levels in rows)

    def _of_towers(self, maps: list[Tensor]) -> list[list[Tensor]]:
        head, is_fcos = self.head, self.kind is FCOS
        classification, regression = head.classification_head, head.regression_head
        if hasattr(head, "classification_tower"):
            classes, boxes = head.classification_tower(maps), head.regression_tower(maps)
        else:
            classes, boxes = [classification.conv(x) for x in maps], [regression.conv(x) for x in maps]

        def offsets(x: Tensor) -> Tensor:
            return F.relu(regression.bbox_reg(x)) if is_fcos else regression.bbox_reg(x)

        rows = [
            [_rows(classification.cls_logits(x), classification.num_classes) for x in classes],
            [_rows(offsets(x), 4) for x in boxes],
        ]
        return [*rows, [_rows(regression.bbox_ctrness(x), 1) for x in boxes]] if is_fcos else rows

    def _of_layers(self, maps: list[Tensor]) -> list[list[Tensor]]:
        return [
            [_rows(layer(x), head.num_columns) for layer, x in zip(head.module_list, maps, strict=True)]
            for head in (self.head.classification_head, self.head.regression_head)
        ]


class EnteringSpikes(nn.Module):
    """A detector's backbone up to what enters its neck, spikes by its recipe's default.

    Shape: (N, 3, H, W) normalised -> {level: (N, C, H / stride, W / stride)}.
    """

    def __init__(self, backbone: BackboneWithNeck) -> None:
        super().__init__()
        self.body, self.levels, parts = backbone.body, backbone.levels, backbone.parts()
        self.entering = nn.ModuleList(parts[f"neck {level}"] for level in self.levels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        return {level: layer(maps[level]) for level, layer in zip(self.levels, self.entering, strict=True)}


def _rows(x: Tensor, columns: int) -> Tensor:
    """(N, A * columns, H, W) -> (N, H * W * A, columns), as torchvision's heads order them."""
    return x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, columns))


class DetectorOf(nn.Module):
    """A torchvision detector whose backbone and head are another network: sizes, anchors and boxes stay its own.

    Args:
        detector: a RetinaNet, FCOS or SSD of this project; changed: it loses its weights.
        predict: (N, 3, H, W), RGB in [0, 1], padded with the mean colour -> the head's outputs by name.

    Shape: [(3, H_i, W_i)] in [0, 1] -> [{"boxes": (M, 4), "scores": (M,), "labels": (M,)}], as torchvision's.
    """

    def __init__(self, detector: nn.Module, predict: Callable[[Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        bridge = _Bridge(detector.backbone.to("meta").eval(), predict)
        detector.backbone, detector.head = bridge, _BridgeHead(bridge)
        detector.transform = PlainBatch(detector.transform)
        detector.anchor_generator = KeptAnchors(detector.anchor_generator)
        self.detector = detector.eval()

    @torch.no_grad()
    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        return self.detector(list(images))


class _Bridge(nn.Module):
    """In the place of a backbone: empty maps of its shapes, and the head's outputs for `_BridgeHead` to take.

    What gives the shapes is no submodule: it holds no values that could be measured, moved or saved.
    """

    def __init__(self, shapes: nn.Module, predict: Callable[[Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        # On the meta device nothing is computed but shapes.
        self.shapes = lru_cache(MOST_SIZES)(
            lambda size: [x.shape for x in shapes(torch.empty(size, device="meta")).values()]
        )
        self.predict = predict
        self.outputs: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        self.outputs = self.predict(images)
        shapes = enumerate(self.shapes(images.shape))
        return OrderedDict((str(level), images.new_zeros(()).expand(shape)) for level, shape in shapes)


class _BridgeHead(nn.Module):
    def __init__(self, bridge: _Bridge) -> None:
        super().__init__()
        self.take: Callable[[], dict[str, Tensor]] = lambda: bridge.outputs

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        return self.take()


class DetectorOfBoxes(nn.Module):
    """A detector whose boxes another program finds in each image, resized: that, and the scaling back, are left to do.

    Args:
        detector: a RetinaNet, FCOS or SSD of this project; changed: it loses its weights.
        find: (1, 3, H, W), RGB in [0, 1] -> its "boxes", "scores" and "labels".

    Shape: [(3, H_i, W_i)] in [0, 1] -> [{"boxes": (M, 4), "scores": (M,), "labels": (M,)}], as torchvision's.
    """

    def __init__(self, detector: nn.Module, find: Callable[[Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        detector.backbone = detector.head = nn.Identity()
        self.detector, self.find = detector.eval(), find
        self.limits = detector.score_thresh, detector.nms_thresh

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Return the detections of each image.

        Raises:
            ValueError: thresholds that the other program cannot have used.
        """
        wanted = self.detector.score_thresh, self.detector.nms_thresh
        if wanted[0] < self.limits[0] or wanted[1] != self.limits[1]:
            raise ValueError(
                f"score_threshold {wanted[0]:g}, nms_threshold {wanted[1]:g}: this file has chosen its boxes with "
                f"{self.limits[0]:g} and {self.limits[1]:g}; only a higher score_threshold is possible"
            )
        return [self._one(image, wanted[0]) for image in images]

    def _one(self, image: Tensor, least: float) -> dict[str, Tensor]:
        padded = pad_for(self.detector.transform, image)
        resized = self.detector.transform.resize(padded)[0]
        found = self.find(resized[None])
        found = {name: value[found["scores"] > least] for name, value in found.items()}
        found["boxes"] = resize_boxes(found["boxes"], resized.shape[1:], padded.shape[1:])
        return found if padded is image else within(found, image)


def resize_and_pad(transform: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """Images of any size as a batch for an exported detector: in [0, 1], padded with the mean colour.

    Args:
        transform: of a torchvision detector.
        images: (3, H_i, W_i) in [0, 1].
    """
    return PlainBatch(transform)([pad_for(transform, image) for image in images])[0].tensors
