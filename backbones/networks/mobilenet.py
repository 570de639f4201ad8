"""One-time-step spiking MobileNets: depthwise and pointwise convolutions, spikes in front of each."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..spiking import SpikeFactory
from .base import Backbone, FeatureInfo, Stem, conv, pooled_head, register_backbone, scale_channels

STEM_CHANNELS = 32


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


class InvertedResidual(nn.Module):
    """(u +) a linear bottleneck: spike -> pointwise 1x1 to `expansion` times the channels -> BN -> `SeparableConv`.

    The stream u is real-valued, and added where its shape stays. With an expansion of 1 the first convolution is left
    out.

    Shape: (N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, channels_in: int, channels: int, stride: int, spike: SpikeFactory, expansion: int) -> None:
        super().__init__()
        hidden = expansion * channels_in
        expand = [spike(channels_in), conv(channels_in, hidden, 1), nn.BatchNorm2d(hidden)] if expansion > 1 else []
        self.branch = nn.Sequential(*expand, *SeparableConv(hidden, channels, stride, spike))
        self.is_residual = stride == 1 and channels_in == channels

    def forward(self, u: Tensor) -> Tensor:
        return u + self.branch(u) if self.is_residual else self.branch(u)


class MobileNet(Backbone):
    """Base of both versions: a convolution and BN, then blocks in five stages, of which some begin by halving.

    Attributes:
        channels: of the blocks' outputs, by stage.
        strides: of each stage, by stem.
    """

    channels: tuple[tuple[int, ...], ...]
    strides: ClassVar[dict[Stem, tuple[int, ...]]] = {"imagenet": (1, 2, 2, 2, 2), "cifar": (1, 2, 2, 2, 2)}

    def __init__(
        self, name: str, spike: SpikeFactory, *, in_channels: int = 3, stem: Stem = "imagenet", width: float = 1.0
    ) -> None:
        super().__init__()
        if spike.thresholds > 1:
            raise ValueError(
                f"thresholds must be 1 for {name}, whose convolutions are depthwise, got {spike.thresholds}"
            )
        self.make_spike, self.width = spike, width
        stride = 2 if stem == "imagenet" else 1
        channels_in = scale_channels(STEM_CHANNELS, width)
        self.stem = nn.Sequential(conv(in_channels, channels_in, 3, stride=stride), nn.BatchNorm2d(channels_in))
        self.stages = nn.ModuleList()
        info = []
        for index, stage in enumerate(self.channels):
            blocks = []
            for position, channels in enumerate(scale_channels(channels, width) for channels in stage):
                block_stride = 1 if position else self.strides[stem][index]
                blocks.append(self.make_block(index, channels_in, channels, block_stride))
                channels_in = channels
                stride *= block_stride
            self.stages.append(nn.Sequential(*blocks))
            info.append(FeatureInfo(f"c{index + 1}", channels_in, stride))
        self.feature_info = tuple(info[1:])

    def make_block(self, stage: int, channels_in: int, channels: int, stride: int) -> nn.Module:
        """Return a block of a stage, counted from 0."""
        raise NotImplementedError


@register_backbone("mobilenetv1")
class MobileNetV1(MobileNet):
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

    channels = ((64,), (128,) * 2, (256,) * 2, (512,) * 6, (1024,) * 2)

    def make_block(self, stage: int, channels_in: int, channels: int, stride: int) -> nn.Module:
        return SeparableConv(channels_in, channels, stride, self.make_spike)


@register_backbone("mobilenetv2")
class MobileNetV2(MobileNet):
    """The residual stream c2 ... c5 at the end of each stage: sums of linear bottlenecks (arXiv:1801.04381).

    Every convolution but the first sees spikes; no spike cuts the stream itself. The network has no pooling, strided
    convolutions halve the size. Spikes and BN stand in the blocks as in those that the authors of arXiv:2212.10170
    publish, with the extremum per channel. Their network is for images of 32x32 alone: the "cifar" stem's strides are
    theirs. It differs in two points: its first block has a pointwise convolution more (32 to 32 channels), and its
    head takes the maximum of each map.

    Args:
        name: "mobilenetv2".
        spike: makes the activation layers.
        in_channels: channels of the image.
        stem: "imagenet" starts with a convolution of stride 2 (strides 4, 8, 16, 32 for c2 ... c5), "cifar" with one
            of stride 1, and only the stages of 64 and of 160 channels halve (strides 1, 1, 2, 4).
        width: multiplier of all channel counts, that of the head's 1280 included.

    Shape: (N, in_channels, H, W) -> {"c2": (N, 24 width, ceil(H / stride), ...), "c3": 32, "c4": 96, "c5": 320 width}.
    """

    channels = ((16,), (24,) * 2, (32,) * 3, (64,) * 4 + (96,) * 3, (160,) * 3 + (320,))
    strides = MobileNet.strides | {"cifar": (1, 1, 1, 2, 2)}

    def make_block(self, stage: int, channels_in: int, channels: int, stride: int) -> nn.Module:
        return InvertedResidual(channels_in, channels, stride, self.make_spike, expansion=6 if stage else 1)

    def make_head(self, num_classes: int, dropout: float) -> nn.Module:
        """Return the head: spike -> pointwise 1x1 to 1280 width -> BN, then what every network has (`Backbone`)."""
        channels, hidden = self.feature_info[-1].channels, scale_channels(1280, self.width)
        expand = [self.make_spike(channels), conv(channels, hidden, 1), nn.BatchNorm2d(hidden)]
        return nn.Sequential(*expand, *pooled_head(self.make_spike, hidden, num_classes, dropout))
