"""The feature pyramid between a spiking backbone and a torchvision head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from backbones import Backbone, SpikeFactory


class SpikingFPN(nn.Module):
    """torchvision's feature pyramid whose lateral convolutions see spikes.

    With source "spikes" each level is BN -> spike -> 1x1 convolution, as the method's own shortcuts are, so that the
    maps which leave the backbone are 0/1; with "membrane" the real-valued maps enter the laterals as they are, the
    way of the method's authors. The pyramid behind the laterals is analogue in both.

    Args:
        in_channels: channels of each level, finest first.
        out_channels: channels of every pyramid map.
        spike: makes the spike layers ("spikes" only).
        source: "spikes" or "membrane".
        extra_levels: 0, or 2 for RetinaNet's p6 and p7, made from the coarsest pyramid map.

    Shape: {name: (N, in_channels[i], H_i, W_i)} -> the same names with out_channels, then "p6" and "p7".
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        spike: SpikeFactory,
        *,
        source: Literal["spikes", "membrane"] = "spikes",
        extra_levels: Literal[0, 2] = 2,
    ) -> None:
        super().__init__()
        self.source = source
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(channels), spike(channels)) if source == "spikes" else nn.Identity()
            for channels in in_channels
        )
        extra = LastLevelP6P7(out_channels, out_channels) if extra_levels else None
        self.fpn = FeaturePyramidNetwork(list(in_channels), out_channels, extra_blocks=extra)

    def forward(self, maps: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
        entering = zip(maps.items(), self.laterals, strict=True)
        return self.fpn(OrderedDict((name, lateral(x)) for (name, x), lateral in entering))


class BackboneWithNeck(nn.Module):
    """What torchvision's detectors call their backbone: `body` (a `Backbone`) and `neck` (a pyramid).

    Shape: (N, 3, H, W) -> {name: (N, out_channels, H_i, W_i)}, finest first.

    Attributes:
        out_channels: channels of every map, read by torchvision.
        strides: pixels per cell of every map, finest first.
    """

    def __init__(
        self,
        body: Backbone,
        spike: SpikeFactory,
        *,
        levels: Sequence[str],
        out_channels: int,
        source: Literal["spikes", "membrane"] = "spikes",
        extra_levels: Literal[0, 2] = 2,
    ) -> None:
        super().__init__()
        info = {entry.name: entry for entry in body.feature_info}
        unknown = [name for name in levels if name not in info]
        if unknown or list(levels) != [name for name in info if name in levels]:
            raise ValueError(f"neck.levels must name some of {', '.join(info)}, finest first; got {', '.join(levels)}")
        self.levels = tuple(levels)
        self.out_channels = out_channels
        self.strides = tuple(info[name].stride for name in levels)
        self.strides += tuple(self.strides[-1] * 2**step for step in range(1, extra_levels + 1))
        self.body = body
        self.neck = SpikingFPN(
            [info[name].channels for name in levels], out_channels, spike, source=source, extra_levels=extra_levels
        )

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body(x)
        return self.neck({name: maps[name] for name in self.levels})
