"""Signs that a spiking network is falling silent, or fires everywhere, or learns nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import nn

from backbones import spike_layers
from detection.records import EpochLog, Values

LOW, HIGH = 0.01, 0.60  # of a layer's neurons that fire
FALLING = 4  # evaluations in a row, each with less activity than the one before ...
FALLEN = 0.5  # ... until it is at most this part of the first of them
REMEDY = {
    "low": "a lower hoyer.weight, hoyer.reduction network, or a longer hoyer.warmup_epochs lets it fire",
    "high": "a higher hoyer.weight, or BatchNorm in front of it (norm_first, head normalised), lets it fire less",
    "falling": "a lower hoyer.weight or a longer hoyer.warmup_epochs holds it",
    "chance": "a lower optimizer.lr or hoyer.weight, or a longer warm-up, may help",
}


def warnings_of(
    history: Sequence[EpochLog], is_at_chance: Callable[[Values], bool], warmup_epochs: float
) -> dict[str, str]:
    """Return what is worth a warning after the last epoch of a log, a sentence by kind: "low", "high", ...

    Args:
        history: the epochs so far.
        is_at_chance: whether metrics are no better than guessing.
        warmup_epochs: of learning rate and regulariser, within which nothing is said of the accuracy.
    """
    evaluated = [line for line in history if line.evaluation is not None]
    if not evaluated or evaluated[-1] is not history[-1]:
        return {}
    line, found = history[-1], {}
    rates = line.evaluation.activity_per_layer
    low = sorted((rate, name) for name, rate in rates.items() if rate < LOW)
    high = sorted(((rate, name) for name, rate in rates.items() if rate > HIGH), reverse=True)
    for kind, layers, limit in (("low", low, f"under {LOW:.0%}"), ("high", high, f"over {HIGH:.0%}")):
        if layers:
            rate, name = layers[0]
            more = f" and {len(layers) - 1} more {limit}" if len(layers) > 1 else ""
            found[kind] = f"spike layer {name} fires at {rate:.2%} of its neurons ({limit}){more}"
    activity = [entry.evaluation.activity for entry in evaluated[-FALLING:]]
    if len(activity) == FALLING and None not in activity:
        falls = all(later < earlier for earlier, later in itertools.pairwise(activity))
        if falls and activity[-1] <= FALLEN * activity[0]:
            found["falling"] = f"spike activity falls, from {activity[0]:.2%} to {activity[-1]:.2%} in {FALLING} epochs"
    if line.epoch > warmup_epochs + 1 and is_at_chance(line.evaluation.metrics):
        values = ", ".join(f"{key} {value:.4f}" for key, value in list(line.evaluation.metrics.items())[:2])
        found["chance"] = f"the network is no better than chance after epoch {line.epoch}: {values}"
    return {kind: f"{sentence}; {REMEDY[kind]}" for kind, sentence in found.items()}


def ask_gradient_shares(model: nn.Module) -> None:
    """Let the spike layers find, in the next backward pass, how much of their gradients the regulariser has."""
    for layer in spike_layers(model).values():
        layer.gradient_shares = {}


def take_gradient_shares(model: nn.Module) -> dict[str, Values]:
    """Return what the spike layers found, by quantity and layer, and ask no longer."""
    found: dict[str, Values] = {}
    for name, layer in spike_layers(model).items():
        for quantity, share in (layer.gradient_shares or {}).items():
            found.setdefault(f"hoyer_share_of_{quantity}", {})[name] = share
        layer.gradient_shares = None
    return found
