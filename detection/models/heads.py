"""Parts of the detectors' heads: a spiking tower, and labels that never are the background."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from backbones import SpikeFactory
from backbones.networks.base import conv
from detection.models.neck import normalised_spikes


class SpikingTower(nn.Module):
    """Spikes of every pyramid level: (BN -> spike -> 3x3 convolution) num_convs times -> BN -> spike.

    The convolutions are shared by all levels, as in any dense head; BN and spike are each level's own. Levels differ
    in their statistics, and the running averages that evaluation uses fit a level only if no other feeds them.

    Args:
        channels: of every map, kept.
        num_convs: convolutions.
        num_levels: maps of the pyramid.
        spike: makes the spike layers.

    Shape: [(N, channels, H_i, W_i)] -> the same shapes, 0/1.
    """

    def __init__(self, channels: int, num_convs: int, num_levels: int, spike: SpikeFactory) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(channels, channels, 3) for _ in range(num_convs))
        self.spikes = nn.ModuleList(
            nn.ModuleList(normalised_spikes(channels, spike) for _ in range(num_convs + 1)) for _ in range(num_levels)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self._one_level(x, spikes) for x, spikes in zip(maps, self.spikes, strict=True)]

    def _one_level(self, x: Tensor, spikes: nn.ModuleList) -> Tensor:
        first, *others = spikes
        x = first(x)
        for layer, spike in zip(self.convs, others, strict=True):
            x = spike(layer(x))
        return x


class ForegroundOnly:
    """Mixin of torchvision's dense detectors, whose heads keep a logit for label 0, the background: never returned."""

    def postprocess_detections(
        self, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Return torchvision's detections, the logit of the background set so low that it wins nowhere."""
        background = anchors[0][0].new_zeros(1).long()
        foreground = [logits.index_fill(-1, background, float("-inf")) for logits in head_outputs["cls_logits"]]
        return super().postprocess_detections(head_outputs | {"cls_logits": foreground}, anchors, image_shapes)


def norm_layer(norm: Literal["none", "group"], channels: int) -> Callable[[int], nn.Module] | None:
    """The norm of an analogue head as torchvision takes it; GroupNorm has up to 32 groups of two channels or more."""
    if norm == "none":
        return None
    # A group of one channel could not be normalised on a map of a single cell.
    groups = next(groups for groups in (32, 16, 8, 4, 2, 1) if groups == 1 or channels % (2 * groups) == 0)
    return partial(nn.GroupNorm, groups)


def resize_and_normalise(config: Any) -> dict[str, Any]:
    """The arguments of torchvision's detectors for size and colour of the images."""
    return {
        "min_size": tuple(config.min_size),
        "max_size": config.max_size,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }
