"""The part between a spiking backbone and a torchvision head: a feature pyramid, or SSD's stack of maps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from backbones import Backbone, FeatureInfo, SpikeFactory

Source = Literal["spikes", "membrane"]
Extra = Literal["pool", "conv"]


def normalised_spikes(channels: int, spike: SpikeFactory) -> nn.Sequential:
    """BN -> spike, as in the method's own shortcuts: a real-valued map becomes 0/1."""
    return nn.Sequential(nn.BatchNorm2d(channels), spike(channels))


class SpikingFPN(nn.Module):
    """torchvision's feature pyramid whose convolutions see spikes.

    With source "spikes" each level is BN -> spike -> 1x1 convolution, so that the maps which leave the backbone are
    0/1; with "membrane" the real-valued maps enter these lateral convolutions as they are, the way of the method's
    authors. The top-down sums are real-valued, as a residual stream is. With `spiking` the 3x3 output convolutions and
    the extra maps take spikes from them too; without, that part is torchvision's analogue pyramid.

    Args:
        in_channels: channels of each level, finest first.
        out_channels: channels of every pyramid map.
        spike: makes the spike layers.
        source: "spikes" or "membrane".
        spiking: spikes in front of the output convolutions and the extra maps.
        num_extra: coarser maps on top of the coarsest.
        extra: "conv" by 3x3 convolutions of stride 2 (RetinaNet's p6 and p7), "pool" by one max-pooling, which gives
            one map at most (Faster R-CNN's).

    Shape: {name: (N, in_channels[i], H_i, W_i)} -> the same names, then the extra maps', all with out_channels.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        spike: SpikeFactory,
        *,
        source: Source = "spikes",
        spiking: bool = False,
        num_extra: int = 2,
        extra: Extra = "conv",
    ) -> None:
        super().__init__()
        if extra == "pool" and num_extra > 1:
            raise ValueError(f"extra 'pool' gives 0 or 1 map, got num_extra {num_extra}")
        self.source, self.num_extra, self.out_channels = source, num_extra, out_channels
        self.laterals = nn.ModuleList(
            normalised_spikes(channels, spike) if source == "spikes" else nn.Identity() for channels in in_channels
        )
        blocks: ExtraFPNBlock | None = None
        if num_extra:
            convs = ExtraConvs(out_channels, num_extra, spike if spiking else None) if extra == "conv" else None
            blocks = convs or LastLevelMaxPool()
        entering = [spike.outputs(channels) if source == "spikes" else channels for channels in in_channels]
        self.fpn = FeaturePyramidNetwork(entering, out_channels, extra_blocks=blocks)
        if spiking:
            self.fpn.layer_blocks = nn.ModuleList(
                nn.Sequential(normalised_spikes(out_channels, spike), output) for output in self.fpn.layer_blocks
            )
            if spike.thresholds > 1:
                for _, output in self.fpn.layer_blocks:
                    output[0] = _conv3x3(spike.outputs(out_channels), out_channels)

    def forward(self, maps: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
        entering = zip(maps.items(), self.laterals, strict=True)
        return self.fpn(OrderedDict((name, lateral(x)) for (name, x), lateral in entering))


class ExtraConvs(ExtraFPNBlock):
    """Coarser pyramid maps: each a 3x3 convolution of stride 2 over the one before, the first over the coarsest map.

    In front of each convolution stands BN -> spike, or, without `spike`, a ReLU from the second on, as in RetinaNet.

    Shape: appends (N, channels, ceil(H / 2), ceil(W / 2)), ... to the maps, "p6", "p7", ... to the names after "c5".
    """

    def __init__(self, channels: int, num: int, spike: SpikeFactory | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for step in range(num):
            before = normalised_spikes(channels, spike) if spike else nn.ReLU() if step else nn.Identity()
            inputs = spike.outputs(channels) if spike else channels
            self.blocks.append(nn.Sequential(before, _conv3x3(inputs, channels, stride=2)))

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        maps = list(results)
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps, [*names, *names_behind(names, len(self.blocks))]


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A convolution with torchvision's initialisation of a pyramid's."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    nn.init.zeros_(conv.bias)
    return conv


class SpikingMaps(nn.Module):
    """SSD's maps: the backbone's and coarser ones made from the last of them, all as spikes.

    Each map passes BN -> spike on its way out (source "spikes"; with "membrane" it leaves as it is). A coarser map is
    made from the one that left before it: 1x1 convolution to half of out_channels -> BN -> spike -> 3x3 convolution
    of stride 2.

    Args:
        in_channels: channels of each backbone map, finest first.
        extra_channels: channels of each coarser map.
        spike: makes the spike layers.
        source: "spikes" or "membrane".
        num_extra: coarser maps.

    Shape: {name: (N, in_channels[i], H_i, W_i)} -> the same names and shapes, then "p6", ... after "c5", each
    (N, extra_channels, ceil(H / 2), ceil(W / 2)) of the one before.

    Attributes:
        out_channels: channels of each map, a list, read by torchvision.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        extra_channels: int,
        spike: SpikeFactory,
        *,
        source: Source = "spikes",
        num_extra: int = 3,
    ) -> None:
        super().__init__()
        self.num_extra = num_extra
        potentials = [*in_channels, *[extra_channels] * num_extra]
        self.out_channels = [spike.outputs(channels) for channels in potentials] if source == "spikes" else potentials
        self.leaving = nn.ModuleList(
            normalised_spikes(channels, spike) if source == "spikes" else nn.Identity() for channels in potentials
        )
        middle = max(1, extra_channels // 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, middle, 1, bias=False),
                normalised_spikes(middle, spike),
                nn.Conv2d(spike.outputs(middle), extra_channels, 3, stride=2, padding=1, bias=False),
            )
            for channels in self.out_channels[len(in_channels) - 1 : -1]
        )
        for module in self.blocks.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
        names, first_extra = list(maps), len(maps)
        leaving = OrderedDict((name, layer(x)) for (name, x), layer in zip(maps.items(), self.leaving, strict=False))
        x = leaving[names[-1]]
        extra = names_behind(names, len(self.blocks))
        for name, block, layer in zip(extra, self.blocks, self.leaving[first_extra:], strict=True):
            leaving[name] = x = layer(block(x))
        return leaving


def names_behind(levels: Sequence[str], number: int) -> list[str]:
    """Return the names of so many maps behind the coarsest one: p6 and p7 behind c5."""
    coarsest = int(levels[-1].removeprefix("c"))
    return [f"p{coarsest + step}" for step in range(1, number + 1)]


class BackboneWithNeck(nn.Module):
    """The `backbone` of torchvision's detectors: `body` (a `Backbone`) and `neck`.

    Args:
        body: gives the maps; what it has after the last of `levels` is removed from it.
        neck: a `SpikingFPN` or `SpikingMaps` made for the channels of `levels`.
        levels: names of the body's maps that enter the neck, finest first.

    Shape: (N, 3, H, W) -> {name: (N, C_i, H_i, W_i)}, finest first.

    Attributes:
        out_channels: of every map (pyramid), or a list of them (SSD), read by torchvision.
        strides: pixels per cell of every map, finest first.
    """

    def __init__(self, body: Backbone, neck: SpikingFPN | SpikingMaps, levels: Sequence[str]) -> None:
        super().__init__()
        strides = [info.stride for info in check_levels(body, levels)]
        self.levels = tuple(levels)
        self.out_channels = neck.out_channels
        self.strides = (*strides, *(strides[-1] * 2**step for step in range(1, neck.num_extra + 1)))
        body.truncate(levels[-1])
        self.body = body
        self.neck = neck

    def parts(self) -> dict[str, nn.Module]:
        """Return the body's parts, and "neck c3", ...: what turns the maps that leave for the neck into spikes."""
        leaving = self.neck.laterals if isinstance(self.neck, SpikingFPN) else self.neck.leaving
        levels = [*self.levels, *names_behind(self.levels, self.neck.num_extra)]
        return self.body.parts() | {f"neck {level}": layer for level, layer in zip(levels, leaving, strict=False)}

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body(x)
        return self.neck({name: maps[name] for name in self.levels})


def check_levels(body: Backbone, levels: Sequence[str]) -> list[FeatureInfo]:
    """The `FeatureInfo` of each level.

    Raises:
        ValueError: a level that `body` does not have, or not finest first.
    """
    info = {entry.name: entry for entry in body.feature_info}
    if not levels or list(levels) != [name for name in info if name in levels]:
        raise ValueError(f"neck.levels must name some of {', '.join(info)}, finest first; got {', '.join(levels)}")
    return [info[name] for name in levels]
