"""One-time-step spiking backbones with the Hoyer regulariser (arXiv:2212.10170). Needs torch, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import mobilenet, resnet, vgg, zoo
from .activity import (
    Certificate,
    Finding,
    LayerActivity,
    Measurement,
    WeightedLayer,
    certify,
    measure_activity,
    record_activity,
    record_layers,
    record_potentials,
    spike_activity,
)
from .base import Activation, Backbone, Classifier, FeatureInfo, SpikeFactory, Stem
from .energy import HOROWITZ_45NM, CostTable, EnergyReport, FirstLayer, NetworkEnergy, energy, read_costs
from .fold import ChannelThreshold, fold
from .hoyer import HoyerSpike, extremum, hoyer_penalties, hoyer_penalty, moments, regulariser, spike
from .integer import to_integers
from .memory import keep_less
from .weights import load_weights, read_tensors, tensors_to_bytes

__all__ = [
    "HOROWITZ_45NM",
    "Backbone",
    "Certificate",
    "ChannelThreshold",
    "Classifier",
    "CostTable",
    "EnergyReport",
    "FeatureInfo",
    "Finding",
    "FirstLayer",
    "HoyerSpike",
    "LayerActivity",
    "Measurement",
    "NetworkEnergy",
    "SpikeFactory",
    "WeightedLayer",
    "certify",
    "create",
    "energy",
    "extremum",
    "fold",
    "hoyer_penalties",
    "hoyer_penalty",
    "keep_less",
    "load_weights",
    "measure_activity",
    "moments",
    "names",
    "read_costs",
    "read_tensors",
    "record_activity",
    "record_layers",
    "record_potentials",
    "regulariser",
    "spike",
    "spike_activity",
    "tensors_to_bytes",
    "to_integers",
    "zoo",
]


def names() -> list[str]:
    """All names that `create` knows."""
    return [*vgg.DEPTHS, *resnet.BASIC, *resnet.BOTTLENECK, *mobilenet.NAMES]


def create(
    name: str,
    *,
    in_channels: int = 3,
    activation: Activation = "hoyer",
    stem: Stem = "imagenet",
    width: float = 1.0,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    pool_first: bool = True,
    **options: Any,
) -> Backbone:
    """A backbone: (N, in_channels, H, W) -> {"c2": ..., ..., "c5": ...}, real-valued maps, finest first.

    Args:
        name: one of `names()`.
        in_channels: channels of the image.
        activation: "hoyer" (the method), "relu" (the analogue twin: same topology), or "fixed" (threshold v_th
            without the extremum: the ablation).
        stem: "imagenet" for large images, "cifar" for 32x32.
        width: multiplier of every channel count, rounded to multiples of 8.
        weights: "zoo:NAME", one of `zoo.names()` (`zoo.settings(NAME)` has the other arguments that it takes); a
            .safetensors file; or a state dict. Loaded strictly by `load_weights`.
        pool_first: False: BN before the pooling (VGG, ResNet).
        options: of the spike layers: extremum="layer" or "channel", momentum=0.1.

    Raises:
        ValueError: an unknown name, activation, stem or extremum, a width that is not positive, weights
            that do not fit, or `pool_first` False for a network without pooling.
    """
    if name not in names():
        raise ValueError(f"unknown backbone {name!r} (allowed: {', '.join(names())})")
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}")
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    spike = SpikeFactory(activation, **options)
    shape: dict[str, Any] = {"in_channels": in_channels, "stem": stem, "width": width}
    if name in mobilenet.NAMES:
        if not pool_first:
            raise ValueError(f"pool_first must be True for {name}: it has no pooling")
        backbone: Backbone = mobilenet.MobileNetV1(name, spike, **shape)
    else:
        family = vgg.VGG if name in vgg.DEPTHS else resnet.ResNet
        backbone = family(name, spike, **shape, pool_first=pool_first)
    if weights is not None:
        if zoo.is_entry(weights):
            extremum = options.get("extremum", "layer")
            wanted = {"name": name, "width": width, "stem": stem, "activation": activation}
            zoo.require_same(weights, wanted | {"extremum": extremum, "pool_first": pool_first})
        load_weights(backbone, weights)
    return backbone
