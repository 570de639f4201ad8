"""Detectors: torchvision's, over spiking backbones and necks."""

from __future__ import annotations

from torch import nn

import backbones
from detection.config import Config
from detection.models.neck import BackboneWithNeck, SpikingFPN
from detection.models.retinanet import build_retinanet

__all__ = ["BackboneWithNeck", "SpikingFPN", "build_detector"]

BUILDERS = {"retinanet": build_retinanet}


def build_detector(config: Config) -> nn.Module:
    """The detector of a recipe, with torchvision's interface.

    In training `model(images, targets)` gives a dict of losses, in evaluation `model(images)` a list of dicts with
    boxes (N, 4) in pixels of each original image, scores (N,) and labels (N,) in 1..K. Images are float tensors
    (3, H, W) in [0, 1]; targets hold boxes (M, 4) float32 x1 y1 x2 y2 with 0 <= x1 < x2 <= W, and labels (M,) int64
    in 1..K, where label k is `config.data.classes[k - 1]`.

    Raises:
        ValueError: `config.data.classes` is empty, or the backbone's weights do not fit.
    """
    if not config.data.classes:
        raise ValueError("data.classes is empty: a detector needs the class names; reading the data fills them in")
    settings = config.model.backbone
    spike_options = {"extremum": settings.extremum, "momentum": settings.momentum}
    body = backbones.create(
        settings.name,
        activation=settings.activation,
        stem=settings.stem,
        width=settings.width,
        weights=settings.weights,
        **spike_options,
    )
    backbone = BackboneWithNeck(
        body,
        backbones.SpikeFactory(settings.activation, **spike_options),
        levels=config.model.neck.levels,
        out_channels=config.model.neck.out_channels,
        source=config.model.neck.source,
        extra_levels=config.model.neck.extra_levels,
    )
    return BUILDERS[config.model.detector](config.model, backbone, len(config.data.classes))
