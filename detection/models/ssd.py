"""torchvision's SSD over a spiking backbone: its head consists of prediction convolutions alone."""

from __future__ import annotations

import numpy as np
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

from backbones import SpikeFactory
from detection.config.schema import Model
from detection.models.inference import AnyShape
from detection.models.neck import BackboneWithNeck


class AnyShapeSSD(AnyShape, SSD):
    """An SSD for images of any shape."""


def build_ssd(config: Model, backbone: BackboneWithNeck, num_classes: int, spike: SpikeFactory) -> SSD:
    """An SSD for labels 1 to `num_classes`, on images resized to squares of `max_size` pixels.

    Default boxes as in torchvision's SSD300, whatever the number of maps: sides of 0.07, then 0.15 to 1.05 in equal
    steps, relative to the image; aspect ratios 1, 2 and 1/2, on the inner maps 3 and 1/3 too.
    """
    num_maps = len(backbone.strides)
    aspect_ratios = [[2, 3] if 0 < index < num_maps - 2 else [2] for index in range(num_maps)]
    scales = [0.07, *np.linspace(0.15, 1.05, num_maps).round(4).tolist()]
    return AnyShapeSSD(
        backbone,
        DefaultBoxGenerator(aspect_ratios, scales=scales),
        (config.max_size, config.max_size),
        num_classes + 1,
        image_mean=list(config.mean),
        image_std=list(config.std),
        score_thresh=config.head.score_threshold,
        nms_thresh=config.head.nms_threshold,
        detections_per_img=config.head.max_detections,
    )
