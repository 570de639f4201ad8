"""The contract of a backbone, the registry of backbones, and the classifier built on top of one."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..multistep import FramesToSteps, RepeatSteps, average_steps
from ..spiking import SpikeFactory, require_same_object, spike_layers

Stem = Literal["imagenet", "cifar"]


class FeatureInfo(NamedTuple):
    """Name, channels and stride (input pixels per cell) of one feature map of a backbone."""

    name: str
    channels: int
    stride: int


class Backbone(nn.Module):
    """Base of all backbones: feature maps by name, finest first, real-valued (membrane potentials) for every neuron.

    A family declares `stem`, `stages` and `feature_info` and is registered by `register_backbone`. Its constructor
    takes (name, spike, *, in_channels, stem, width) and options of its own; `spike(channels)` makes its activation
    layers.

    Shape: (N, in_channels, H, W) -> {name: (N, channels, ceil or floor of H / stride, W / stride)}; in T time steps
    (T N, channels, ...), step by step, see `backbones.multistep`; with a frame per step of (N, T in_channels, H, W).

    Attributes:
        stem: what sees pixels.
        stages: the parts between the maps; the last ones end in the maps of `feature_info`. A family whose stem is no
            module of its own has it at the beginning of the first stage.
        feature_info: one `FeatureInfo` for each map of the output, in its order.
        make_spike: maker of the activation layers, for heads and necks of the same neurons.
    """

    stem: nn.Module
    stages: nn.ModuleList
    feature_info: tuple[FeatureInfo, ...]
    make_spike: SpikeFactory

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if "frames" in self._modules:
            x = self.frames(x)
        maps, wanted, waiting = {}, [info.name for info in self.feature_info], "repeat" in self._modules
        for name, part in self.parts().items():
            if waiting and spike_layers(part):
                x, waiting = self.repeat.within(part, x), False
            else:
                x = part(x)
            if name in wanted:
                maps[name] = self.repeat(x) if waiting else x
        return maps

    def run_in_steps(self, time_steps: int, *, frames: bool = False) -> None:
        """Let the network, whose spike layers have so many time steps, repeat what comes in front of the first.

        With `frames` an image has a frame for each step, and all of the network is computed in steps.
        """
        if frames:
            self.frames = FramesToSteps(time_steps)
        else:
            self.repeat = RepeatSteps(time_steps)

    @property
    def time_steps(self) -> int:
        """Steps that the maps of an image have."""
        steps = self._modules.get("repeat") or self._modules.get("frames")
        return 1 if steps is None else steps.time_steps

    @property
    def stage_names(self) -> list[str]:
        """Names of the stages' last maps, "c1" or "c2" first; those of `feature_info` are the last ones."""
        names = [info.name for info in self.feature_info]
        return [*(f"c{index}" for index in range(1, 1 + len(self.stages) - len(names))), *names]

    def parts(self) -> dict[str, nn.Module]:
        """Return "stem", if it is a module of its own, and each stage by the name of its last map, in their order."""
        own = {"stem": self.stem} if "stem" in self._modules else {}
        return own | dict(zip(self.stage_names, self.stages, strict=True))

    def truncate(self, name: str) -> None:
        """Remove what comes after the map `name`: its time, its weights and its Hoyer terms are saved.

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
        """Return the classification head, `pooled_head` over the last map. A family may have a head of its own."""
        return pooled_head(self.make_spike, self.feature_info[-1].channels, num_classes, dropout)


_FAMILIES: dict[str, type[Backbone]] = {}
SHAPE = ("in_channels", "stem", "width")  # what every family takes


def register_backbone(*names: str) -> Callable[[type[Backbone]], type[Backbone]]:
    """Decorate a subclass of `Backbone`, so that `create` and recipes know it by `names`.

    Example:
        >>> @register_backbone("tiny")
        ... class Tiny(Backbone):
        ...     def __init__(self, name, spike, *, in_channels=3, stem="imagenet", width=1.0): ...

    Raises:
        ValueError: a name is taken by another family.
    """

    def register(family: type[Backbone]) -> type[Backbone]:
        for name in names:
            require_same_object(f"backbone {name!r}", _FAMILIES.get(name, family), family)
            _FAMILIES[name] = family
        return family

    return register


def names() -> list[str]:
    """Return all names that `create` knows, sorted, numbers in them by value."""
    return sorted(
        _FAMILIES, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    )


def find_family(name: str) -> tuple[type[Backbone], dict[str, Any]]:
    """Return the class of a registered backbone, and the options that it has beside `SHAPE` with their defaults.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in _FAMILIES:
        raise ValueError(f"unknown backbone {name!r} (allowed: {', '.join(names())})")
    return _FAMILIES[name], _options_of(_FAMILIES[name])


def family_options() -> dict[str, Any]:
    """Return the options of all families with their defaults."""
    return {option: default for family in _FAMILIES.values() for option, default in _options_of(family).items()}


def _options_of(family: type[Backbone]) -> dict[str, Any]:
    parameters = inspect.signature(family).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in SHAPE}


class Normalise(nn.Module):
    """(x - mean) / std per channel, for images in [0, 1].

    Computed as (255 x - 255 mean) / (255 std): 255 x is exact for images of 8 bits.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (255 * x - self.mean) / self.std


class Classifier(nn.Module):
    """Logits (N, num_classes) of a backbone's last feature map, by the head of the backbone's family.

    In several time steps the logits are the mean of those of each.

    Args:
        backbone: kept as `self.backbone`, so that its weights move to a detector under the same names.
        num_classes: number of logits.
        dropout: probability between the layers of a VGG's head, or before a ResNet's linear layer; training only.
        mean, std: per channel, of images in [0, 1], which are normalised by them; None: images come normalised.

    Shape: (N, in_channels, H, W) -> (N, num_classes).
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        dropout: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError("mean and std belong together: give both, or neither")
        self.normalise = nn.Identity() if mean is None else Normalise(mean, std)
        self.backbone = backbone
        self.head = backbone.make_head(num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.backbone(self.normalise(x))[self.backbone.feature_info[-1].name])
        return average_steps(logits, self.backbone.time_steps)


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


def pooled_head(spike: SpikeFactory, channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Global average pool -> spike -> linear: (N, channels, H, W) -> (N, num_classes).

    While training, dropout scales the spikes that it keeps by 1 / (1 - p).
    """
    linear = nn.Linear(spike.outputs(channels), num_classes)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), spike(channels), nn.Flatten(), nn.Dropout(dropout), linear)


def pool_and_norm(pool: nn.Module, channels: int, *, pool_first: bool) -> list[nn.Module]:
    """A pooling and a BatchNorm, in the published order or the other way round."""
    layers = [pool, nn.BatchNorm2d(channels)]
    return layers if pool_first else layers[::-1]
