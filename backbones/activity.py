"""How much a spiking network fires."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .hoyer import HoyerSpike


@dataclass
class LayerActivity:
    """Spikes of one layer over the recorded passes.

    Attributes:
        name: module name of the `HoyerSpike` layer.
        num_spikes: neurons that fired, summed over passes and images.
        num_neurons: neurons that could have.
    """

    name: str
    num_spikes: int = 0
    num_neurons: int = 0

    @property
    def firing_rate(self) -> float:
        """Spikes per neuron and image, in [0, 1]; 0 before the first pass."""
        return self.num_spikes / self.num_neurons if self.num_neurons else 0.0


@contextmanager
def record_activity(model: nn.Module) -> Iterator[dict[str, LayerActivity]]:
    """Counts, while the context is open, the spikes of every `HoyerSpike` in `model`, by module name.

    Under torch.compile wrap the passes in `torch.compiler.set_stance("force_eager")`: compiled code may skip the
    hooks that count.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HoyerSpike)}
    activity = {name: LayerActivity(name) for name in layers}

    def count(entry: LayerActivity, spikes: Tensor) -> None:
        entry.num_spikes += int(torch.count_nonzero(spikes))
        entry.num_neurons += spikes.numel()

    def hook(entry: LayerActivity):  # one closure per layer
        return lambda module, inputs, output: count(entry, output)

    handles = [layer.register_forward_hook(hook(activity[name])) for name, layer in layers.items()]
    try:
        yield activity
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_potentials(model: nn.Module) -> Iterator[dict[str, list[float]]]:
    """Where the potentials of every `HoyerSpike` lie around its threshold, by module name, in the next pass only.

    A histogram over u / threshold: shares of the layer's neurons in the 40 bins of width 0.1 from -1 to 3; what is
    further away is in none of them. A neuron from bin 20 on fires. For a pass in evaluation mode; under torch.compile
    see `record_activity`.
    """
    histograms: dict[str, list[float]] = {}
    handles: dict[str, RemovableHandle] = {}

    def count(name: str, layer: HoyerSpike, u: Tensor) -> None:
        u = u.float()
        ratio = u / layer._broadcast(layer.threshold, u)
        histograms[name] = (torch.histc(ratio, 40, -1, 3) / u.numel()).tolist()
        handles.pop(name).remove()

    def hook(name: str):  # one closure per layer
        return lambda layer, inputs: count(name, layer, inputs[0])

    for name, module in model.named_modules():
        if isinstance(module, HoyerSpike):
            handles[name] = module.register_forward_pre_hook(hook(name))
    try:
        yield histograms
    finally:
        for handle in handles.values():
            handle.remove()


def spike_activity(activity: dict[str, LayerActivity]) -> float:
    """Share of all neurons of the network that fire per image, in [0, 1]; 0 for a network without spike layers."""
    num_neurons = sum(layer.num_neurons for layer in activity.values())
    return sum(layer.num_spikes for layer in activity.values()) / num_neurons if num_neurons else 0.0
