"""One-time-step spiking MobileNetV1: depthwise and pointwise convolutions, spikes in front of each."""

from __future__ import annotations

from torch import nn

from ..spiking import SpikeFactory
from .base import Backbone, FeatureInfo, Stem, conv, register_backbone, scale_channels

NAMES = ("mobilenetv1",)
STEM_CHANNELS = 32
# Output channels of the blocks, by stage; the first block of every stage but the first halves the size.
STAGES = ((64,), (128, 128), (256, 256), (512,) * 6, (1024, 1024))


class SeparableConv(nn.Sequential):
    """spike -> depthwise 3x3 -> BN -> spike -> pointwise 1x1 -> BN.

    Shape: (N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, channels_in: int, channels: int, stride: int, spike: SpikeFactory) -> None:
        super().__init__(
            spike(channels_in),
            conv(channels_in, channels_in, 3, stride=stride, groups=channels_in),
            nn.BatchNorm2d(channels_in),
            spike(channels_in),
            conv(channels_in, channels, 1),
            nn.BatchNorm2d(channels),
        )


@register_backbone(*NAMES)
class MobileNetV1(Backbone):
    """Membrane potentials c2 ... c5 at the end of each stage, after its last BN and before the next spike.

    Every convolution but the first sees spikes. The network has no pooling, strided convolutions halve the size. The
    published recipe takes the extremum per channel.

    Args:
        name: "mobilenetv1".
        spike: makes the activation layers.
        in_channels: channels of the image.
        stem: "imagenet" starts with a convolution of stride 2 (strides 4, 8, 16, 32 for c2 ... c5), "cifar" with one
            of stride 1 (strides 2, 4, 8, 16).
        width: multiplier of all channel counts.

    Shape: (N, in_channels, H, W) -> {"c2": (N, 128 width, ceil(H / stride), ...), ..., "c5": (N, 1024 width, ...)}.
    """

    def __init__(
        self, name: str, spike: SpikeFactory, *, in_channels: int = 3, stem: Stem = "imagenet", width: float = 1.0
    ) -> None:
        super().__init__()
        self.make_spike = spike
        stride = 2 if stem == "imagenet" else 1
        channels_in = scale_channels(STEM_CHANNELS, width)
        self.stem = nn.Sequential(conv(in_channels, channels_in, 3, stride=stride), nn.BatchNorm2d(channels_in))
        self.stages = nn.ModuleList()
        info = []
        for index, stage in enumerate(STAGES):
            blocks = []
            for position, channels in enumerate(scale_channels(channels, width) for channels in stage):
                block_stride = 2 if index and position == 0 else 1
                blocks.append(SeparableConv(channels_in, channels, block_stride, spike))
                channels_in = channels
                stride *= block_stride
            self.stages.append(nn.Sequential(*blocks))
            info.append(FeatureInfo(f"c{index + 1}", channels_in, stride))
        self.feature_info = tuple(info[1:])
