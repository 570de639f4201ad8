"""One-time-step spiking VGG: conv -> (max-pool) -> BN -> spike, the pool before the normalisation."""

from __future__ import annotations

from typing import Literal

from torch import nn

from ..spiking import SpikeFactory
from .base import Backbone, FeatureInfo, Stem, conv, pool_and_norm, register_backbone, scale_channels

# Convolutions per stage; a stage is what lies between two poolings. Channels double from 64 up to 512.
DEPTHS = {
    "vgg9": (1, 1, 2, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
CHANNELS = (64, 128, 256, 512, 512)


@register_backbone(*DEPTHS)
class VGG(Backbone):
    """Membrane potentials c2 ... c5 at the end of each stage, after its pooling and BN and before its spike.

    Every convolution but the first sees spikes. The last stage's own spike belongs to the classification head,
    where it is used (a detector's neck thresholds c5 itself).

    Args:
        name: "vgg9", "vgg11", "vgg13", "vgg16" or "vgg19".
        spike: makes the activation layers.
        in_channels: channels of the image.
        stem: "imagenet" pools after all five stages (strides 4, 8, 16, 32 for c2 ... c5); "cifar" does not pool
            after the last (strides 4, 8, 16, 16).
        width: multiplier of all channel counts, the head's hidden layers included.
        pool_first: False: BN before the pooling.
        pooling: "max", or "stride": the last convolution of a stage has stride 2, and nothing is pooled.
        head: of a classifier: "linear" as published, "normalised" with a BN in front of the spikes of the hidden
            layers, "pooled" with global average pooling and one linear layer, as a ResNet's.

    Shape: (N, in_channels, H, W) -> {"c2": (N, 128 width, H // 4, W // 4), ...}, rounded up by strides; H and W at
    least the last stride.
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
        pooling: Literal["max", "stride"] = "max",
        head: Literal["linear", "normalised", "pooled"] = "linear",
    ) -> None:
        super().__init__()
        if head not in ("linear", "normalised", "pooled"):
            raise ValueError(f"head must be 'linear', 'normalised' or 'pooled', got {head!r}")
        if pooling not in ("max", "stride"):
            raise ValueError(f"pooling must be 'max' or 'stride', got {pooling!r}")
        self.width, self._head_side, self._head = width, 2 if stem == "cifar" else 7, head
        self.make_spike = spike
        self.stages = nn.ModuleList()
        info, channels_in, stride = [], in_channels, 1
        for index, (depth, channels) in enumerate(zip(DEPTHS[name], CHANNELS, strict=True)):
            channels = scale_channels(channels, width)
            pooled = stem == "imagenet" or index < len(CHANNELS) - 1
            stride *= 2 if pooled else 1
            layers: list[nn.Module] = []
            for position in range(depth):
                if index or position:
                    layers.append(spike(channels_in))
                    channels_in = spike.outputs(channels_in)
                last = pooled and position == depth - 1
                layers.append(conv(channels_in, channels, 3, stride=2 if last and pooling == "stride" else 1))
                if last and pooling == "max":
                    layers += pool_and_norm(nn.MaxPool2d(2), channels, pool_first=pool_first)
                else:
                    layers.append(nn.BatchNorm2d(channels))
                channels_in = channels
            self.stages.append(nn.Sequential(*layers))
            info.append(FeatureInfo(f"c{index + 1}", channels, stride))
        self.feature_info = tuple(info[1:])

    @property
    def stem(self) -> nn.Module:
        """The first convolution, which is part of the first stage."""
        return self.stages[0][0]

    def make_head(self, num_classes: int, dropout: float) -> nn.Module:
        """Return spike -> three linear layers without bias, spikes and dropout between them; see `head` for others.

        The size is pooled to 2x2 ("cifar") or 7x7 ("imagenet") before the first spike, which leaves the nominal
        input sizes 32 and 224 as they are. While training, dropout scales the spikes that it keeps by 1 / (1 - p):
        the linear layers see exactly 0/1 in evaluation only, unless dropout is 0.
        """
        if self._head == "pooled":
            return super().make_head(num_classes, dropout)
        if self.make_spike.thresholds > 1:
            raise ValueError(f"several thresholds need head 'pooled': the hidden layers of {self._head!r} have one")
        side = self._head_side
        channels, hidden = self.feature_info[-1].channels, scale_channels(4096, self.width)
        layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(side), self.make_spike(channels), nn.Flatten()]
        for inputs in (channels * side * side, hidden):
            norm = [nn.BatchNorm1d(hidden)] if self._head == "normalised" else []
            layers += [nn.Dropout(dropout), nn.Linear(inputs, hidden, bias=False), *norm, self.make_spike(hidden)]
        return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(hidden, num_classes, bias=False))
