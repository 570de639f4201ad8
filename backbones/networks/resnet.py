"""One-time-step spiking ResNet: a real-valued residual stream, from which every convolution takes spikes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..spiking import SpikeFactory
from .base import Backbone, FeatureInfo, Stem, conv, pool_and_norm, register_backbone, scale_channels

# Blocks per stage. A basic block is one convolution with its own shortcut, a bottleneck is three with one.
BASIC = {"resnet18": (4, 4, 4, 4), "resnet20": (4, 4, 4, 4), "resnet34": (6, 8, 12, 6)}
BOTTLENECK = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
CHANNELS = (64, 128, 256, 512)


class Shortcut(nn.Sequential):
    """The residual stream in another shape: (max-pool ->) BN -> spike -> 1x1 convolution.

    The pool is there for a stride of 2 and rounds odd sizes up, as the 3x3 convolution beside it does. BN comes before
    it where `pool_first` is False.

    Shape: (N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, channels_in: int, channels: int, stride: int, spike: SpikeFactory, *, pool_first: bool) -> None:
        if stride == 2:
            layers = pool_and_norm(nn.MaxPool2d(2, ceil_mode=True), channels_in, pool_first=pool_first)
        else:
            layers = [nn.BatchNorm2d(channels_in)]
        super().__init__(*layers, spike(channels_in), conv(spike.outputs(channels_in), channels, 1))


class RealShortcut(nn.Module):
    """The residual stream in another shape, without parameters and without a spike that would cut it to one bit.

    An average over 2x2 for a stride of 2, odd sizes rounded up; channels repeated one after the other, as Bi-Real
    (arXiv:1808.00278) and ReActNet (arXiv:2003.03488) do for binary networks.

    Shape: (N, C, H, W) -> (N, k C, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: the channels do not multiply by a whole number.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        if channels % channels_in:
            raise ValueError(f"shortcut 'real': {channels} channels are no multiple of {channels_in}; change the width")
        self.repeats = channels // channels_in
        # Cells beyond the border are left out of the mean.
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()

    def forward(self, u: Tensor) -> Tensor:
        u = self.pool(u)
        return torch.cat([u] * self.repeats, dim=1) if self.repeats > 1 else u


class BlockOptions(NamedTuple):
    """Choices for the blocks of a ResNet.

    Attributes:
        pool_first: the spiking shortcut's max-pool comes before its BN, as published.
        shortcut: "spiking" as published, or "real", see `RealShortcut`, where the shape of the stream changes.
        norm_first: a BN in front of the spike of a basic block, as a bottleneck has it.
    """

    pool_first: bool = True
    shortcut: Literal["spiking", "real"] = "spiking"
    norm_first: bool = False

    def make_shortcut(self, channels_in: int, channels: int, stride: int, spike: SpikeFactory) -> nn.Module:
        """Return the identity where the shape stays, else a `Shortcut` or `RealShortcut`."""
        if stride == 1 and channels_in == channels:
            return nn.Identity()
        if self.shortcut == "real":
            return RealShortcut(channels_in, channels, stride)
        return Shortcut(channels_in, channels, stride, spike, pool_first=self.pool_first)


class BasicBlock(nn.Module):
    """shortcut(u) + BN(conv3x3(spike(u))), with the option of a BN in front of the spike.

    Shape: (N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride)).
    """

    expansion = 1

    def __init__(
        self, channels_in: int, channels: int, stride: int, spike: SpikeFactory, options: BlockOptions
    ) -> None:
        super().__init__()
        self.shortcut = options.make_shortcut(channels_in, channels, stride, spike)
        first = [nn.BatchNorm2d(channels_in)] if options.norm_first else []
        self.branch = nn.Sequential(
            *first,
            spike(channels_in),
            conv(spike.outputs(channels_in), channels, 3, stride=stride),
            nn.BatchNorm2d(channels),
        )

    def forward(self, u: Tensor) -> Tensor:
        return self.shortcut(u) + self.branch(u)


class Bottleneck(nn.Module):
    """shortcut(u) + three times BN -> spike -> conv (1x1, 3x3 with the stride, 1x1 to 4 * channels).

    Shape: (N, C, H, W) -> (N, 4 C', ceil(H / stride), ceil(W / stride)).
    """

    expansion = 4

    def __init__(
        self, channels_in: int, channels: int, stride: int, spike: SpikeFactory, options: BlockOptions
    ) -> None:
        super().__init__()
        self.shortcut = options.make_shortcut(channels_in, channels * self.expansion, stride, spike)
        layers: list[nn.Module] = []
        for c_in, c_out, kernel_size, conv_stride in (
            (channels_in, channels, 1, 1),
            (channels, channels, 3, stride),
            (channels, channels * self.expansion, 1, 1),
        ):
            layers += [nn.BatchNorm2d(c_in), spike(c_in)]
            layers.append(conv(spike.outputs(c_in), c_out, kernel_size, stride=conv_stride))
        self.branch = nn.Sequential(*layers)

    def forward(self, u: Tensor) -> Tensor:
        return self.shortcut(u) + self.branch(u)


@register_backbone(*BASIC, *BOTTLENECK)
class ResNet(Backbone):
    """The residual stream at the end of each stage, c2 ... c5, real-valued.

    Every convolution but the first sees spikes.

    Args:
        name: "resnet18" ... "resnet152". "resnet20" has the stages of "resnet18"; its name counts the three
            convolutions of the "cifar" stem, with which it is meant to be used.
        spike: makes the activation layers.
        in_channels: channels of the image.
        stem: "imagenet" is conv 7x7 stride 2 -> max-pool 3x3 stride 2 -> BN (strides 4, 8, 16, 32 for c2 ... c5);
            "cifar" is three 3x3 convolutions, BN and spike between -> max-pool -> BN (strides 2, 4, 8, 16).
        width: multiplier of all channel counts.
        pool_first: False: BN before the pooling, in the stem and in the shortcuts.
        shortcut: "spiking" as published, or "real": a parameter-free real-valued shortcut where the shape changes.
        norm_first: a BN in front of the spike of every basic block.

    Shape: (N, in_channels, H, W) -> {"c2": (N, 64 width expansion, ceil(H / stride), ...), ...}; expansion is 4
    from resnet50 on, else 1.
    """

    def __init__(
        self,
        name: str,
        spike: SpikeFactory,
        *,
        in_channels: int = 3,
        stem: Stem = "imagenet",
        width: float = 1.0,
        pool_first: bool = True,
        shortcut: Literal["spiking", "real"] = "spiking",
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        if shortcut not in ("spiking", "real"):
            raise ValueError(f"shortcut must be 'spiking' or 'real', got {shortcut!r}")
        self.make_spike = spike
        options = BlockOptions(pool_first, shortcut, norm_first)
        block = BasicBlock if name in BASIC else Bottleneck
        channels_in = scale_channels(CHANNELS[0], width)
        if stem == "imagenet":
            layers = [conv(in_channels, channels_in, 7, stride=2)]
            pool, stride = nn.MaxPool2d(3, stride=2, padding=1), 4
        else:
            layers = [conv(in_channels, channels_in, 3)]
            for _ in range(2):
                layers += [nn.BatchNorm2d(channels_in), spike(channels_in)]
                layers.append(conv(spike.outputs(channels_in), channels_in, 3))
            pool, stride = nn.MaxPool2d(2, ceil_mode=True), 2
        self.stem = nn.Sequential(*layers, *pool_and_norm(pool, channels_in, pool_first=pool_first))
        self.stages = nn.ModuleList()
        info = []
        for index, (depth, channels) in enumerate(zip((BASIC | BOTTLENECK)[name], CHANNELS, strict=True)):
            channels = scale_channels(channels, width)
            blocks = []
            for position in range(depth):
                block_stride = 2 if index > 0 and position == 0 else 1
                blocks.append(block(channels_in, channels, block_stride, spike, options))
                channels_in = channels * block.expansion
                stride *= block_stride
            self.stages.append(nn.Sequential(*blocks))
            info.append(FeatureInfo(f"c{index + 2}", channels_in, stride))
        self.feature_info = tuple(info)
