"""The networks by name, and how one is made."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import zoo
from ..arithmetic import convert, find_arithmetic
from ..multistep import check_count
from ..spiking import SpikeFactory, neurons
from ..weights import load_weights
from . import mobilenet, resnet, vgg  # noqa: F401, they register themselves
from .base import (
    Backbone,
    Classifier,
    FeatureInfo,
    Normalise,
    Stem,
    family_options,
    find_family,
    names,
    register_backbone,
)

__all__ = ["Backbone", "Classifier", "FeatureInfo", "Normalise", "Stem", "create", "names", "register_backbone"]
USUAL = {"extremum": "layer", "thresholds": 1, "levels": 4, "reset": "subtract"}  # of which no shape tells all


def create(
    name: str,
    *,
    in_channels: int = 3,
    frames: int = 1,
    activation: str | None = None,
    arithmetic: str = "float",
    stem: Stem = "imagenet",
    width: float = 1.0,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Backbone:
    """Return a backbone: (N, in_channels, H, W) -> {"c2": ..., ..., "c5": ...}, real-valued maps, finest first.

    Args:
        name: one of `names()`.
        in_channels: channels of the image, of all its frames together.
        frames: that lie in the channels of an image, frame by frame, as of an event camera. In as many time steps each
            sees its own; one frame is the same in every step, and in one time step all are one image.
        activation: one of `neurons()`: "hoyer" (the method), "relu" (the analogue twin: same topology), "fixed"
            (threshold v_th without the extremum: the ablation), "graded" (spikes of several levels), "sign" (of a
            binary network); None: that of the arithmetic, "hoyer", "sign" and "relu".
        arithmetic: one of `ARITHMETICS`, of the convolutions: "float", "binary" or "adder", see `backbones.arithmetic`.
        stem: "imagenet" for large images, "cifar" for 32x32.
        width: multiplier of every channel count, rounded to multiples of 8.
        weights: "zoo:NAME", one of `zoo.names()`, or a run folder (`zoo.settings` has the other arguments that either
            takes, `zoo.normalisation` says how it wants images normalised); a .safetensors file; or a state dict.
            Loaded strictly by `load_weights`.
        options: of the family: pool_first=False puts BN before the pooling (VGG, ResNet), shortcut="real" and
            norm_first=True (ResNet), pooling="stride", head="normalised" or "pooled" (VGG); of the neuron:
            extremum="channel", momentum=0.1, threshold="channel", window=(0.0, 2.0), levels=4, time_steps=4,
            reset="zero", thresholds=3.

    Raises:
        ValueError: an unknown name, activation, arithmetic, stem or option, a value that is not allowed, an option that
            this family does not have, weights that do not fit, or depthwise convolutions in an arithmetic without.
    """
    family, own = find_family(name)
    activation = find_arithmetic(arithmetic).activation if activation is None else activation
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}")
    if isinstance(width, bool) or not isinstance(width, Real) or not 0 < width < math.inf:
        raise ValueError(f"width must be positive and finite, got {width!r}")
    given = {key: value for key, value in options.items() if key in own}
    others = family_options()
    _check_options(options, others, own, name)
    spike = SpikeFactory(activation, **{key: value for key, value in options.items() if key not in others})
    channels = _channels_of_a_step(in_channels, frames, spike.time_steps)
    backbone = family(name, spike, in_channels=channels, stem=stem, width=width, **given)
    if spike.time_steps > 1 and arithmetic != "float":
        raise ValueError(f"arithmetic {arithmetic!r} takes one time step, got time_steps {spike.time_steps}")
    convert(backbone, arithmetic)
    if spike.time_steps > 1:
        backbone.run_in_steps(spike.time_steps, frames=frames > 1)
    if weights is not None:
        wanted = {"name": name, "width": width, "stem": stem, "activation": activation, "arithmetic": arithmetic}
        if isinstance(weights, (str, Path)):
            zoo.require_same(weights, USUAL | others | wanted | options)
        load_weights(backbone, weights)
    return backbone


def _check_options(
    options: Mapping[str, Any], of_families: Mapping[str, Any], own: Mapping[str, Any], name: str
) -> None:
    for key, default in of_families.items():
        value = options.get(key, default)
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"{key} must be True or False, got {value!r}")
        if key not in own and value != default:
            raise ValueError(f"{key} must be {default!r} for {name}, which has no other, got {value!r}")
    known = {*of_families, *(option for neuron in neurons().values() for option in neuron.options)}
    if unknown := sorted(options.keys() - known):
        taken = [key for key in inspect.signature(create).parameters if key != "options"]
        raise ValueError(f"create has no option {unknown[0]!r} (allowed: {', '.join([*taken, *sorted(known)])})")


def _channels_of_a_step(in_channels: int, frames: int, time_steps: int) -> int:
    check_count("in_channels", in_channels)
    check_count("frames", frames)
    if in_channels % frames:
        raise ValueError(f"in_channels {in_channels} are no {frames} frames of as many channels")
    if 1 not in (frames, time_steps) and frames != time_steps:
        raise ValueError(f"{frames} frames for {time_steps} time steps: each step takes one, or all the same one")
    return in_channels // frames if time_steps > 1 else in_channels
