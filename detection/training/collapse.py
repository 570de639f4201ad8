"""Signs that a spiking network is falling silent, or fires everywhere, or learns nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

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


def silent_layers(line: EpochLog) -> list[str]:
    """Return the spike layers that did not fire: no potential above 0 in training, or no spike in evaluation."""
    training = {name for name, value in line.layers.get("hoyer_per_layer", {}).items() if value == 0}
    rates = line.evaluation.activity_per_layer if line.evaluation else {}
    return sorted(training | {name for name, rate in rates.items() if rate == 0})


def warnings_of(
    history: Sequence[EpochLog], is_at_chance: Callable[[Values], bool], warmup_epochs: float
) -> dict[str, str]:
    """Return what is worth a warning after the last epoch of a log, a sentence by kind: "low", "high", ...

    Args:
        history: the epochs so far.
        is_at_chance: whether metrics are no better than guessing.
        warmup_epochs: of learning rate and regulariser, within which nothing is said of the accuracy.
    """
    line, found = history[-1], {}
    if line.evaluation is None:
        return {}
    rates = [(rate, name) for name, rate in line.evaluation.activity_per_layer.items()]
    low, high = sorted(each for each in rates if each[0] < LOW), sorted(each for each in rates if each[0] > HIGH)
    for kind, layers, limit in (("low", low, f"under {LOW:.0%}"), ("high", high[::-1], f"over {HIGH:.0%}")):
        if layers:
            more = f" and {len(layers) - 1} more {limit}" if len(layers) > 1 else ""
            rate, name = layers[0]
            found[kind] = f"spike layer {name} fires at {rate:.2%} of its neurons ({limit}){more}"
    activity = [entry.evaluation.activity for entry in history if entry.evaluation is not None][-FALLING:]
    if len(activity) == FALLING and None not in activity:
        falls = all(later < earlier for earlier, later in itertools.pairwise(activity))
        if falls and activity[-1] <= FALLEN * activity[0]:
            found["falling"] = (
                f"spike activity falls, from {activity[0]:.2%} to {activity[-1]:.2%} in {FALLING} evaluations"
            )
    if line.epoch > warmup_epochs + 1 and is_at_chance(line.evaluation.metrics):
        values = ", ".join(f"{key} {value:.4f}" for key, value in list(line.evaluation.metrics.items())[:2])
        found["chance"] = f"the network is no better than chance after epoch {line.epoch}: {values}"
    return {kind: f"{sentence}; {REMEDY[kind]}" for kind, sentence in found.items()}
