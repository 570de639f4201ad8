"""What every backbone promises, and the classifier built on top of one."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from torch import Tensor, nn

from .hoyer import HoyerSpike

Activation = Literal["hoyer", "relu", "fixed"]
Stem = Literal["imagenet", "cifar"]


class FeatureInfo(NamedTuple):
    """Name, channels and stride (input pixels per cell) of one feature map of a backbone."""

    name: str
    channels: int
    stride: int


class Backbone(nn.Module):
    """Feature maps by name, finest first, real-valued (membrane potentials) whatever the activation.

    Shape: (N, in_channels, H, W) -> {name: (N, channels, ceil or floor of H / stride, W / stride)}.

    Attributes:
        feature_info: one `FeatureInfo` for each map of the output, in its order.
        stages: the parts between the maps; the last ones end in the maps of `feature_info`.
    """

    feature_info: tuple[FeatureInfo, ...]
    stages: nn.ModuleList
    _spike: SpikeFactory

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def truncate(self, name: str) -> None:
        """Removes what comes after the map `name`: its time, its weights and its Hoyer terms are saved.

        Raises:
            ValueError: there is no such map.
        """
        names = [info.name for info in self.feature_info]
        if name not in names:
            raise ValueError(f"no map {name!r} (allowed: {', '.join(names)})")
        num_removed = len(names) - 1 - names.index(name)
        self.stages = self.stages[: len(self.stages) - num_removed]
        self.feature_info = self.feature_info[: names.index(name) + 1]

    def make_head(self, num_classes: int, dropout: float) -> nn.Module:
        """The classification head: last feature map -> global average pool -> spike -> linear -> (N, num_classes).

        While training, dropout scales the spikes that it keeps by 1 / (1 - p). A family may have a head of its own.
        """
        channels = self.feature_info[-1].channels
        return nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            self._spike(channels),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(channels, num_classes),
        )


class Classifier(nn.Module):
    """Logits (N, num_classes) of a backbone's last feature map, by the head of the backbone's family.

    Args:
        backbone: kept as `self.backbone`, so that its weights move to a detector under the same names.
        num_classes: number of logits.
        dropout: probability between the layers of a VGG's head, or before a ResNet's linear layer; training only.

    Shape: (N, in_channels, H, W) -> (N, num_classes).
    """

    def __init__(self, backbone: Backbone, num_classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = backbone.make_head(num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[self.backbone.feature_info[-1].name])


class SpikeFactory:
    """Makes the activation layers of one network: `spike(channels)` gives a `HoyerSpike` or, for the twin, a ReLU.

    Args:
        activation: "hoyer" (the method), "relu" (the analogue twin), "fixed" (threshold v_th without extremum).
        extremum: "layer" or "channel".
        momentum: of the extremum's running average.
    """

    def __init__(
        self,
        activation: Activation = "hoyer",
        *,
        extremum: Literal["layer", "channel"] = "layer",
        momentum: float = 0.1,
    ) -> None:
        if activation not in ("hoyer", "relu", "fixed"):
            raise ValueError(f"activation must be 'hoyer', 'relu' or 'fixed', got {activation!r}")
        if extremum not in ("layer", "channel"):
            raise ValueError(f"extremum must be 'layer' or 'channel', got {extremum!r}")
        self.activation, self.per_channel, self.momentum = activation, extremum == "channel", momentum

    def __call__(self, channels: int) -> nn.Module:
        if self.activation == "relu":
            return nn.ReLU()
        fixed = self.activation == "fixed"
        return HoyerSpike(channels, per_channel=self.per_channel, momentum=self.momentum, fixed=fixed)


def scale_channels(channels: int, width: float) -> int:
    """`channels * width` rounded to a multiple of 8, at least 8."""
    return max(8, round(channels * width / 8) * 8)


def conv(in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Convolution without bias, padded so that a stride of 1 keeps the size; He initialisation over its fan-out."""
    layer = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups, bias=False
    )
    fan_out = out_channels // groups * kernel_size**2
    nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
    return layer


def pool_and_norm(pool: nn.Module, channels: int, *, pool_first: bool) -> list[nn.Module]:
    """A pooling and a BatchNorm, in the published order or the other way round."""
    layers = [pool, nn.BatchNorm2d(channels)]
    return layers if pool_first else layers[::-1]
