"""Entries of torch.hub: a backbone by its name, such as "resnet18", and each trained network of the zoo by its own."""

from __future__ import annotations

import functools as _functools
from typing import TYPE_CHECKING

import backbones

if TYPE_CHECKING:  # what is public here and can be called is an entry
    from collections.abc import Callable
    from typing import Any

    from torch import nn

dependencies = [
    "torch",
    "torchvision",
    "PIL",
    "accelerate",
    "albumentations",
    "cv2",
    "numpy",
    "pycocotools",
    "pydantic",
    "rich",
    "safetensors",
    "yaml",
]


def _backbone(name: str, pretrained: str | None = None, **options: Any) -> backbones.Backbone:
    """Return a backbone: (N, 3, H, W) -> {"c2": ..., ..., "c5": ...}, real-valued maps, finest first.

    Args:
        name: of the entry.
        pretrained: a network of the zoo whose backbone has this name, such as "cifar10_vgg11"; it says the options.
            Its images are in [0, 1], normalised by `backbones.zoo.normalisation(pretrained)`.
        options: of `backbones.create`, such as width=0.5 or activation="relu".

    Raises:
        ValueError: no such network, or its backbone is another one.
    """
    if pretrained is None or pretrained is False:
        return backbones.create(name, **options)
    known = {} if pretrained is True else backbones.zoo.settings(pretrained)
    if known.get("name") != name:
        fitting = [each for each in backbones.zoo.names() if backbones.zoo.settings(each)["name"] == name]
        allowed = ", ".join(fitting) or "none"
        why = f"its backbone is a {known['name']}, not a {name}" if known else "which network of the zoo"
        raise ValueError(f"pretrained={pretrained!r}: {why} (allowed: {allowed})")
    return backbones.create(**known | options, weights=f"zoo:{pretrained}")


def _trained(name: str) -> nn.Module:
    """Return a trained network of the zoo in evaluation mode, images in [0, 1].

    A detector, as torchvision's: [(3, H_i, W_i)] -> [{"boxes": ..., "scores": ..., "labels": ...}]; a classifier:
    (N, 3, H, W) -> logits (N, K).
    """
    from detection.runs import Run
    from detection.tasks.run import load_model

    return load_model(Run.open(f"zoo:{name}"))


def _entry(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    entry = _functools.partial(function, name)
    entry.__doc__ = function.__doc__
    return entry


globals().update({name: _entry(_backbone, name) for name in backbones.names()})
globals().update({name: _entry(_trained, name) for name in backbones.zoo.names()})
