"""Object detection with one-time-step spiking networks, on torchvision."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from detection.api import evaluate, export, load, train
    from detection.config import load_config
    from detection.evaluation import CocoEvaluator
    from detection.models import build_detector
    from detection.training.callbacks import Callback
    from detection.training.signals import CallbackError

# Imported when they are asked for: `import detection` alone loads neither torch nor matplotlib.
_PLACES = {
    "Callback": "detection.training.callbacks",
    "CallbackError": "detection.training.signals",
    "CocoEvaluator": "detection.evaluation",
    "build_detector": "detection.models",
    "evaluate": "detection.api",
    "export": "detection.api",
    "load": "detection.api",
    "load_config": "detection.config",
    "train": "detection.api",
}

__all__ = [
    "Callback",
    "CallbackError",
    "CocoEvaluator",
    "build_detector",
    "evaluate",
    "export",
    "load",
    "load_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
