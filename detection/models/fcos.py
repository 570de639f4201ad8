"""torchvision's FCOS over a spiking backbone and neck, with its own head or a spiking one."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead

from backbones import SpikeFactory
from detection.config.schema import Model
from detection.models.heads import ForegroundOnly, SpikingTower, norm_layer, resize_and_normalise
from detection.models.inference import AnyShape
from detection.models.neck import BackboneWithNeck


class ForegroundFCOS(ForegroundOnly, AnyShape, FCOS):
    """An FCOS for labels 1 to K."""


class SpikingFCOSHead(FCOSHead):
    """FCOS's head in which every convolution sees spikes, those of prediction included.

    Shape: [(N, channels, H_i, W_i)] -> {"cls_logits": (N, A, num_classes), "bbox_regression": (N, A, 4),
    "bbox_ctrness": (N, A, 1)}, where A counts the cells of all levels.
    """

    def __init__(
        self, channels: int, num_classes: int, *, num_convs: int, num_levels: int, spike: SpikeFactory
    ) -> None:
        super().__init__(channels, 1, num_classes, num_convs=0)
        self.classification_tower = SpikingTower(channels, num_convs, num_levels, spike)
        self.regression_tower = SpikingTower(channels, num_convs, num_levels, spike)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        cls_logits = self.classification_head(self.classification_tower(x))
        bbox_regression, bbox_ctrness = self.regression_head(self.regression_tower(x))
        return {"cls_logits": cls_logits, "bbox_regression": bbox_regression, "bbox_ctrness": bbox_ctrness}


def build_fcos(config: Model, backbone: BackboneWithNeck, num_classes: int, spike: SpikeFactory) -> FCOS:
    """An FCOS for labels 1 to `num_classes`.

    Which level an object belongs to follows from the strides, as published (Tian et al., arXiv:1904.01355): the
    finest takes all up to 8 strides from cell to border, each further one 4 to 8 of its own, the coarsest the rest.
    """
    settings, channels = config.head, backbone.out_channels
    if settings.spiking:
        head: FCOSHead = SpikingFCOSHead(
            channels,
            num_classes + 1,
            num_convs=settings.num_convs,
            num_levels=len(backbone.strides),
            spike=spike,
        )
    else:
        # torchvision's own construction has 32 groups, which small pyramids do not divide into.
        norm = norm_layer(settings.norm or "group", channels) or nn.Identity
        head = FCOSHead(channels, 1, num_classes + 1, num_convs=0)
        head.classification_head = FCOSClassificationHead(
            channels, 1, num_classes + 1, settings.num_convs, norm_layer=norm
        )
        head.regression_head = FCOSRegressionHead(channels, 1, settings.num_convs, norm_layer=norm)
    return ForegroundFCOS(
        backbone,
        num_classes + 1,
        anchor_generator=AnchorGenerator(
            tuple((stride,) for stride in backbone.strides), ((1.0,),) * len(backbone.strides)
        ),
        head=head,
        score_thresh=settings.score_threshold,
        nms_thresh=settings.nms_threshold,
        detections_per_img=settings.max_detections,
        **resize_and_normalise(config),
    )
