"""torchvision's RetinaNet over a spiking backbone and neck, with its own head or a spiking one."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead

from backbones import SpikeFactory
from detection.config.schema import Model
from detection.models.heads import ForegroundOnly, SpikingTower, norm_layer, resize_and_normalise
from detection.models.inference import AnyShape
from detection.models.neck import BackboneWithNeck


class ForegroundRetinaNet(ForegroundOnly, AnyShape, RetinaNet):
    """A RetinaNet for labels 1 to K."""


class SpikingRetinaNetHead(RetinaNetHead):
    """RetinaNet's head in which every convolution sees spikes, those of prediction included.

    Shape: [(N, channels, H_i, W_i)] -> {"cls_logits": (N, A, num_classes), "bbox_regression": (N, A, 4)}, where A is
    num_anchors times the cells of all levels.
    """

    def __init__(
        self, channels: int, num_anchors: int, num_classes: int, *, num_convs: int, num_levels: int, spike: SpikeFactory
    ) -> None:
        super().__init__(channels, num_anchors, num_classes)
        self.classification_head.conv = nn.Sequential()  # the towers take their place
        self.regression_head.conv = nn.Sequential()
        self.classification_tower = SpikingTower(channels, num_convs, num_levels, spike)
        self.regression_tower = SpikingTower(channels, num_convs, num_levels, spike)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {
            "cls_logits": self.classification_head(self.classification_tower(x)),
            "bbox_regression": self.regression_head(self.regression_tower(x)),
        }


def build_retinanet(config: Model, backbone: BackboneWithNeck, num_classes: int, spike: SpikeFactory) -> RetinaNet:
    """A RetinaNet for labels 1 to `num_classes`.

    Three anchor sizes (2^0, 2^1/3, 2^2/3 times `head.anchor_scale` strides) in three aspect ratios per cell, as
    published (Lin et al., arXiv:1708.02002).
    """
    scale = config.head.anchor_scale or 4.0
    sizes = tuple(
        tuple(round(scale * stride * 2 ** (octave / 3)) for octave in range(3)) for stride in backbone.strides
    )
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    channels, num_anchors = backbone.out_channels, anchors.num_anchors_per_location()[0]
    if config.head.spiking:
        head: RetinaNetHead = SpikingRetinaNetHead(
            channels,
            num_anchors,
            num_classes + 1,
            num_convs=config.head.num_convs,
            num_levels=len(sizes),
            spike=spike,
        )
    else:
        head = RetinaNetHead(channels, num_anchors, num_classes + 1, norm_layer(config.head.norm or "none", channels))
        for tower in (head.classification_head, head.regression_head):
            tower.conv = tower.conv[: config.head.num_convs]
    return ForegroundRetinaNet(
        backbone,
        num_classes + 1,
        anchor_generator=anchors,
        head=head,
        score_thresh=config.head.score_threshold,
        nms_thresh=config.head.nms_threshold,
        detections_per_img=config.head.max_detections,
        **resize_and_normalise(config),
    )
