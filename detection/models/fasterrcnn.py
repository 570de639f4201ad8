"""torchvision's Faster R-CNN over a spiking backbone and neck; its RPN and box head stay analogue."""

from __future__ import annotations

from itertools import pairwise

from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from backbones import SpikeFactory
from detection.config.schema import Model
from detection.models.heads import resize_and_normalise
from detection.models.inference import AnyShape
from detection.models.neck import BackboneWithNeck

POOLED_SIDE = 7  # cells of a pooled region


class AnyShapeFasterRCNN(AnyShape, FasterRCNN):
    """A Faster R-CNN for images of any shape."""


def build_fasterrcnn(config: Model, backbone: BackboneWithNeck, num_classes: int, spike: SpikeFactory) -> FasterRCNN:
    """A Faster R-CNN for labels 1 to `num_classes`.

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
    scale = config.head.anchor_scale or 8.0
    sizes = tuple((round(scale * stride),) for stride in backbone.strides)
    features = config.head.representation_size
    return AnyShapeFasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(list(backbone.levels), output_size=POOLED_SIDE, sampling_ratio=2),
        box_head=TwoMLPHead(backbone.out_channels * POOLED_SIDE**2, features),
        box_predictor=FastRCNNPredictor(features, num_classes + 1),
        box_batch_size_per_image=config.head.num_regions,
        box_score_thresh=config.head.score_threshold,
        box_nms_thresh=config.head.nms_threshold,
        box_detections_per_img=config.head.max_detections,
        **resize_and_normalise(config),
    )
