"""The networks by name, and how one is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..spiking import SpikeFactory
from . import mobilenet, resnet, vgg  # noqa: F401, they register themselves
from .base import (
    Backbone,
    Classifier,
    FeatureInfo,
    Normalise,
    Stem,
    find_family,
    names,
    register_backbone,
)

__all__ = ["Backbone", "Classifier", "FeatureInfo", "Normalise", "Stem", "create", "names", "register_backbone"]


def create(
    name: str,
    *,
    in_channels: int = 3,
    activation: str = "hoyer",
    stem: Stem = "imagenet",
    width: float = 1.0,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    pool_first: bool = True,
    **options: Any,
) -> Backbone:
    """Return a backbone: (N, in_channels, H, W) -> {"c2": ..., ..., "c5": ...}, real-valued maps, finest first.

    Args:
        name: one of `names()`.
        in_channels: channels of the image.
        activation: one of `neurons()`: "hoyer" (the method), "relu" (the analogue twin: same topology), "fixed"
            (threshold v_th without the extremum: the ablation), "graded" (spikes of several levels).
        stem: "imagenet" for large images, "cifar" for 32x32.
        width: multiplier of every channel count, rounded to multiples of 8.
        weights: "zoo:NAME", one of `zoo.names()` (`zoo.settings(NAME)` has the other arguments that it takes); a
            .safetensors file; or a state dict. Loaded strictly by `load_weights`.
        pool_first: False: BN before the pooling (VGG, ResNet).
        options: of the family or of the neuron: extremum="layer" or "channel", momentum=0.1, levels=4.

    Raises:
        ValueError: an unknown name, activation, stem or option, a value that is not allowed, a width that is not
            positive, weights that do not fit, or `pool_first` False for a network without pooling.
    """
    family, own = find_family(name)
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}")
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    given = {key: value for key, value in options.items() if key in own}
    if "pool_first" in own:
        given["pool_first"] = pool_first
    elif not pool_first:
        raise ValueError(f"pool_first must be True for {name}: it has no pooling")
    spike = SpikeFactory(activation, **{key: value for key, value in options.items() if key not in own})
    backbone = family(name, spike, in_channels=in_channels, stem=stem, width=width, **given)
    if weights is not None:
        from ..weights import load_weights  # which knows the class of a backbone
        from ..zoo import is_entry, require_same

        if is_entry(weights):
            wanted = {"name": name, "width": width, "stem": stem, "activation": activation, "pool_first": pool_first}
            require_same(weights, wanted | {"extremum": options.get("extremum", "layer")})
        load_weights(backbone, weights)
    return backbone
