"""Accuracy of saved runs under noise: on the membrane potentials, on the thresholds, and on the images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from detection.robustness.kinds import (
    ALL_LAYERS,
    IMAGE_KINDS,
    KINDS,
    NEAR,
    RANDOM_KINDS,
    SEVERITIES,
    SPIKE_KINDS,
    UNITS,
)

if TYPE_CHECKING:
    from detection.robustness.corruptions import CorruptedBatches, corrupt
    from detection.robustness.noise import LayerMargin, potential_noise, record_margins, sum_margins
    from detection.robustness.studies import curves_of, study
    from detection.robustness.subject import Subject, open_runs, prepare

# Imported when they are asked for: the kinds alone do not load torch.
_PLACES = {
    **dict.fromkeys(("CorruptedBatches", "corrupt"), "corruptions"),
    **dict.fromkeys(("LayerMargin", "potential_noise", "record_margins", "sum_margins"), "noise"),
    **dict.fromkeys(("curves_of", "study"), "studies"),
    **dict.fromkeys(("Subject", "open_runs", "prepare"), "subject"),
}

__all__ = [
    "ALL_LAYERS",
    "IMAGE_KINDS",
    "KINDS",
    "NEAR",
    "RANDOM_KINDS",
    "SEVERITIES",
    "SPIKE_KINDS",
    "UNITS",
    "CorruptedBatches",
    "LayerMargin",
    "Subject",
    "corrupt",
    "curves_of",
    "open_runs",
    "potential_noise",
    "prepare",
    "record_margins",
    "study",
    "sum_margins",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
