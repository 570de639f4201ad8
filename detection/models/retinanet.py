"""torchvision's RetinaNet over a spiking backbone and neck."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead

from detection.config import Model
from detection.models.neck import BackboneWithNeck


class ForegroundRetinaNet(RetinaNet):
    """A RetinaNet that never returns label 0, the background, of which torchvision's keeps a logit."""

    def postprocess_detections(
        self, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        background = anchors[0][0].new_zeros(1).long()
        foreground = [logits.index_fill(-1, background, float("-inf")) for logits in head_outputs["cls_logits"]]
        return super().postprocess_detections(head_outputs | {"cls_logits": foreground}, anchors, image_shapes)


def build_retinanet(config: Model, backbone: BackboneWithNeck, num_classes: int) -> RetinaNet:
    """A RetinaNet for labels 1 to `num_classes`.

    Three anchor sizes (2^0, 2^1/3, 2^2/3 times `head.anchor_scale` strides) in three aspect ratios per cell, as
    published (Lin et al., arXiv:1708.02002).
    """
    sizes = tuple(
        tuple(round(config.head.anchor_scale * stride * 2 ** (octave / 3)) for octave in range(3))
        for stride in backbone.strides
    )
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    norm = partial(nn.GroupNorm, group_count(backbone.out_channels)) if config.head.norm == "group" else None
    head = RetinaNetHead(backbone.out_channels, anchors.num_anchors_per_location()[0], num_classes + 1, norm)
    for tower in (head.classification_head, head.regression_head):
        tower.conv = tower.conv[: config.head.num_convs]
    return ForegroundRetinaNet(
        backbone,
        num_classes + 1,
        min_size=tuple(config.min_size),
        max_size=config.max_size,
        image_mean=list(config.mean),
        image_std=list(config.std),
        anchor_generator=anchors,
        head=head,
        score_thresh=config.head.score_threshold,
        nms_thresh=config.head.nms_threshold,
        detections_per_img=config.head.max_detections,
    )


def group_count(channels: int) -> int:
    """Groups of a GroupNorm: 32 as published, fewer where the channels do not divide."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0)
