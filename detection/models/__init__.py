"""Detectors: torchvision's, over spiking backbones and necks."""

from __future__ import annotations

from pathlib import Path

from torch import nn

import backbones
from detection.config import Config
from detection.models.fasterrcnn import build_fasterrcnn
from detection.models.fcos import build_fcos
from detection.models.neck import BackboneWithNeck, SpikingFPN, SpikingMaps, check_levels
from detection.models.retinanet import build_retinanet
from detection.models.ssd import build_ssd

__all__ = ["BackboneWithNeck", "SpikingFPN", "SpikingMaps", "build_detector"]

BUILDERS = {"fasterrcnn": build_fasterrcnn, "retinanet": build_retinanet, "fcos": build_fcos, "ssd": build_ssd}
NUM_EXTRA = {"fasterrcnn": 1, "retinanet": 2, "fcos": 2, "ssd": 3}


def build_detector(config: Config) -> nn.Module:
    """The detector of a recipe, with torchvision's interface.

    In training `model(images, targets)` gives a dict of losses, in evaluation `model(images)` a list of dicts with
    boxes (N, 4) in pixels of each original image, scores (N,) and labels (N,) in 1..K. Images are float tensors
    (3, H, W) in [0, 1]; targets hold boxes (M, 4) float32 x1 y1 x2 y2 with 0 <= x1 < x2 <= W, and labels (M,) int64
    in 1..K, where label k is `config.data.classes[k - 1]`.

    Raises:
        ValueError: `config.data.classes` is empty, the backbone's weights do not fit, or the backbone's maps do not
            suit the detector.
    """
    if not config.data.classes:
        raise ValueError("data.classes is empty: a detector needs the class names; reading the data fills them in")
    model, settings = config.model, config.model.backbone
    spike_options = {"extremum": settings.extremum, "momentum": settings.momentum}
    body = backbones.create(
        settings.name,
        activation=settings.activation,
        stem=settings.stem,
        width=settings.width,
        weights=weights_file(settings.weights),
        **spike_options,
    )
    spike = backbones.SpikeFactory(settings.activation, **spike_options)
    levels = model.neck.levels or (["c2", "c3", "c4", "c5"] if model.detector == "fasterrcnn" else ["c3", "c4", "c5"])
    channels = [info.channels for info in check_levels(body, levels)]
    num_extra = NUM_EXTRA[model.detector] if model.neck.extra_levels is None else model.neck.extra_levels
    neck: SpikingFPN | SpikingMaps
    if model.detector == "ssd":
        neck = SpikingMaps(channels, model.neck.out_channels, spike, source=model.neck.source, num_extra=num_extra)
    else:
        neck = SpikingFPN(
            channels,
            model.neck.out_channels,
            spike,
            source=model.neck.source,
            spiking=model.neck.spiking,
            num_extra=num_extra,
            extra="pool" if model.detector == "fasterrcnn" else "conv",
        )
    return BUILDERS[model.detector](model, BackboneWithNeck(body, neck, levels), len(config.data.classes), spike)


def weights_file(path: str | None) -> Path | None:
    """The file that `model.backbone.weights` means: itself, or the last weights of a run folder."""
    if path is None:
        return None
    return Path(path) / "last.safetensors" if Path(path).is_dir() else Path(path)
