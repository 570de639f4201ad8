"""Networks of recipes: torchvision's detectors over spiking backbones and necks, classifiers."""

from __future__ import annotations

from typing import Any

from torch import nn

import backbones
from detection.config import Recipe, read_recipe, schema
from detection.models.detectors import average_over_steps, build_fasterrcnn, build_fcos, build_retinanet, build_ssd
from detection.models.neck import BackboneWithNeck, SpikingFPN, SpikingMaps, check_levels
from detection.runs import check_weights
from detection.text import shorten

__all__ = [
    "BackboneWithNeck",
    "SpikingFPN",
    "SpikingMaps",
    "build_backbone",
    "build_classifier",
    "build_detector",
    "check_origin",
    "colours_of",
    "describe_backbone",
]

BUILDERS = {"fasterrcnn": build_fasterrcnn, "retinanet": build_retinanet, "fcos": build_fcos, "ssd": build_ssd}
STEMS_DIFFER = (
    "; a stem for 32x32 images and one for large images differ in their layers and strides, so what one has learnt is "
    "of no use behind the other: pretrain with the stem that the detector has"
)
NUM_EXTRA = {"fasterrcnn": 1, "retinanet": 2, "fcos": 2, "ssd": 3}


def build_detector(config: Recipe) -> nn.Module:
    """The detector of a recipe, with torchvision's interface.

    In training `model(images, targets)` gives a dict of losses, in evaluation `model(images)` a list of dicts with
    boxes (N, 4) in pixels of each original image, scores (N,) and labels (N,) in 1..K. Images are float tensors
    (C, H, W) in [0, 1], C = `config.data.channels`; targets hold boxes (M, 4) float32 x1 y1 x2 y2 with
    0 <= x1 < x2 <= W, and labels (M,) int64 in 1..K, where label k is `config.data.classes[k - 1]`.

    Raises:
        ValueError: no detector's recipe, `config.data.classes` is empty, the backbone's weights do not fit, or the
            backbone's maps do not suit the detector.
    """
    _check(config, "detector", "detector")
    mean, std = colours_of(config)
    model = config.model.model_copy(update={"mean": mean, "std": std})
    body = build_backbone(model.backbone, len(mean), config.data.frames)
    spike = body.make_spike
    levels = model.neck.levels or (["c2", "c3", "c4", "c5"] if model.detector == "fasterrcnn" else ["c3", "c4", "c5"])
    channels = [info.channels for info in check_levels(body, levels)]
    num_extra = NUM_EXTRA[model.detector] if model.neck.extra_levels is None else model.neck.extra_levels
    shared = {"source": model.neck.source, "num_extra": num_extra}
    neck: SpikingFPN | SpikingMaps
    if model.detector == "ssd":
        neck = SpikingMaps(channels, model.neck.out_channels, spike, **shared)
    else:
        extra = "pool" if model.detector == "fasterrcnn" else "conv"
        spiking = model.neck.spiking
        neck = SpikingFPN(channels, model.neck.out_channels, spike, spiking=spiking, extra=extra, **shared)
    detector = BUILDERS[model.detector](model, BackboneWithNeck(body, neck, levels), len(config.data.classes), spike)
    detector.num_labels = len(config.data.classes)
    if body.time_steps > 1:
        average_over_steps(detector, body)
    return detector


def build_classifier(config: Recipe) -> backbones.Classifier:
    """The classifier of a recipe: images (N, C, size, size) -> logits (N, K), K = len(data.classes).

    Raises:
        ValueError: `config.data.classes` is empty, the images are too small for the backbone, or its weights do not
            fit.
    """
    _check(config, "classifier", "dropout")
    mean, std = colours_of(config)
    backbone = build_backbone(config.model.backbone, len(mean), config.data.frames)
    stride = backbone.feature_info[-1].stride
    if config.data.size < stride:
        raise ValueError(
            f"data.size {config.data.size}: smaller than a cell of the last feature map, whose stride is {stride} "
            f"({config.model.backbone.name} with the {config.model.backbone.stem} stem)"
        )
    return backbones.Classifier(backbone, len(config.data.classes), dropout=config.model.dropout, mean=mean, std=std)


def _check(config: Recipe, kind: str, key: str) -> None:
    """Raise ValueError for what is no recipe of that kind of network, which has such a key, or has no classes."""
    if not isinstance(config, Recipe) or not hasattr(config.model, key):
        expected = f"the recipe of a {kind}, as detection.load_config returns it"
        raise ValueError(f"config: expected {expected}, got {shorten(config)}")
    if not config.data.classes:
        raise ValueError(f"data.classes is empty: a {kind} needs the class names; reading the data fills them in")


def colours_of(config: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that images are normalised by: frames of events stay as they are."""
    channels = config.data.channels
    return (config.model.mean, config.model.std) if channels == 3 else ((0.0,) * channels, (1.0,) * channels)


def describe_backbone(config: Recipe) -> dict[str, dict[str, Any]]:
    """Return what run.json has for `backbones.zoo.settings` and `backbones.zoo.normalisation`."""
    mean, std = colours_of(config)
    settings = {"name": config.model.backbone.name} | config.model.backbone.arguments()
    if len(mean) != 3:
        settings |= {"in_channels": len(mean), "frames": config.data.frames}
    return {"backbone": settings, "normalisation": {"mean": list(mean), "std": list(std)}}


def build_backbone(settings: schema.Backbone, in_channels: int = 3, frames: int = 1) -> backbones.Backbone:
    """The backbone of a recipe for images of so many channels and frames, with its pretrained weights if it names any.

    Raises:
        FileNotFoundError: no such weights.
        ValueError: the weights do not fit; the message names what differs.
    """
    weights = None
    if settings.weights is not None:
        weights = backbones.zoo.locate(settings.weights)
        if weights.is_dir():
            weights = weights / "last.safetensors"
        check_origin(settings)
    shape = {"in_channels": in_channels, "frames": frames}
    backbone = backbones.create(settings.name, weights=weights, **shape, **settings.arguments())
    if weights is not None:
        check_weights(weights)
    return backbone


def check_origin(settings: schema.Backbone) -> None:
    """Raise ValueError if the weights come from a run, whose recipe says that its backbone was another one."""
    if settings.weights is None:
        return
    weights = backbones.zoo.locate(settings.weights)
    recipe = (weights if weights.is_dir() else weights.parent) / "config.yaml"
    if not recipe.is_file():
        return
    theirs, ours = vars(read_recipe(recipe).model.backbone), vars(settings)
    key = backbones.zoo.first_difference(theirs, ours)
    if key is not None:
        why = STEMS_DIFFER if key == "stem" else ""
        raise ValueError(
            f"model.backbone.weights {recipe.parent}: trained with {key} {theirs[key]!r}, "
            f"this recipe's model.backbone.{key} is {ours[key]!r}{why} (None: new weights)"
        )
