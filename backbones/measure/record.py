"""The hook system, one for everything that watches a network, and how much and how near the threshold it fires."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ..spiking import SpikeLayer, spike_layers

Before = Callable[[str, nn.Module, Any], Any]
After = Callable[[str, nn.Module, Any, Any], None]


@contextmanager
def hook_layers(
    layers: Mapping[str, nn.Module], *, before: Before | None = None, after: After | None = None, prepend: bool = False
) -> Iterator[None]:
    """Call functions around every forward pass of some modules while the context is open.

    Compiled parts run uncompiled meanwhile, since compiled code may skip hooks.

    Args:
        layers: modules by the names that the functions are given.
        before: (name, module, first argument); what it returns takes the argument's place, unless it is None.
        after: (name, module, first argument, output).
        prepend: call `before` in front of the hooks that are there already.
    """

    def enter(name: str, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        changed = before(name, module, _first(inputs, named))
        return None if changed is None else ((changed, *inputs[1:]), named)

    def leave(name: str, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        after(name, module, _first(inputs, named), output)

    with ExitStack() as handles:
        for name, module in layers.items():
            if before is not None:
                handle = module.register_forward_pre_hook(partial(enter, name), prepend=prepend, with_kwargs=True)
                handles.callback(handle.remove)
            if after is not None:
                handle = module.register_forward_hook(partial(leave, name), with_kwargs=True)
                handles.callback(handle.remove)
        handles.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _first(inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
    return next(iter((*inputs, *named.values())), None)


@dataclass
class LayerActivity:
    """Spikes of one layer over the recorded passes.

    Attributes:
        name: module name of the spike layer.
        num_spikes: neurons that fired, summed over passes and images.
        num_neurons: neurons that could have.
        levels: number of values that a spike can take.
        time_steps: in which each neuron can fire; all of them are in the counts.
        thresholds: neurons of each potential.
        spikes_in_steps: `num_spikes` step by step; empty before the first pass.
    """

    name: str
    num_spikes: int = 0
    num_neurons: int = 0
    levels: int = 2
    time_steps: int = 1
    thresholds: int = 1
    spikes_in_steps: list[int] = field(default_factory=list)

    def add(self, spikes_in_steps: Sequence[int], num_neurons: int) -> None:
        """Count further passes."""
        self.num_spikes += sum(spikes_in_steps)
        self.num_neurons += num_neurons
        self.spikes_in_steps = add_up(self.spikes_in_steps, spikes_in_steps)

    @property
    def bits(self) -> int:
        """Bits of a spike: 1 of two levels, 4 of sixteen."""
        return (self.levels - 1).bit_length()

    @property
    def firing_rate(self) -> float:
        """Spikes per neuron, image and time step, in [0, 1]; 0 before the first pass."""
        return self.num_spikes / self.num_neurons if self.num_neurons else 0.0


@contextmanager
def record_activity(model: nn.Module) -> Iterator[dict[str, LayerActivity]]:
    """Count, while the context is open, the spikes of every spike layer in `model`, by module name."""
    layers = spike_layers(model)
    activity = {
        name: LayerActivity(name, levels=layer.levels, time_steps=layer.time_steps) for name, layer in layers.items()
    }

    def count(name: str, layer: nn.Module, u: Tensor, spikes: Tensor) -> None:
        counts = [torch.count_nonzero(each) for each in spikes.tensor_split(activity[name].time_steps)]
        activity[name].add(torch.stack(counts).tolist(), spikes.numel())

    with hook_layers(layers, after=count):
        yield activity


def sum_activity(shares: Sequence[Mapping[str, LayerActivity]]) -> dict[str, LayerActivity]:
    """Return the spikes of several recordings of one network, such as those of several processes, counted together."""
    found: dict[str, LayerActivity] = {}
    for share in shares:
        for name, layer in share.items():
            total = found.setdefault(name, LayerActivity(name, levels=layer.levels, time_steps=layer.time_steps))
            total.add(layer.spikes_in_steps, layer.num_neurons)
    return found


def add_up(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Return the sums of counts step by step; an empty sequence counts as zeros."""
    return [sum(counts) for counts in zip_longest(one, other, fillvalue=0)]


def spike_activity(activity: Mapping[str, LayerActivity]) -> float:
    """Return the share of all neurons of a network that fire per image and step, in [0, 1]; 0 without spike layers."""
    num_neurons = sum(layer.num_neurons for layer in activity.values())
    return sum(layer.num_spikes for layer in activity.values()) / num_neurons if num_neurons else 0.0


@contextmanager
def record_potentials(model: nn.Module) -> Iterator[dict[str, list[float]]]:
    """Record where the potentials of every spike layer lie around its threshold, by module name, in the next pass only.

    A histogram over u / threshold: shares of the layer's neurons in the 40 bins of width 0.1 from -1 to 3; what is
    further away is in none of them. A neuron from bin 20 on fires. For a pass in evaluation mode.
    """
    histograms: dict[str, list[float]] = {}

    def count(name: str, layer: SpikeLayer, u: Tensor) -> None:
        if name not in histograms:
            ratio = layer.membrane(u).float() / layer.broadcast(layer.threshold.float(), u)
            histograms[name] = (torch.histc(ratio, 40, -1, 3) / u.numel()).tolist()

    with hook_layers(spike_layers(model), before=count):
        yield histograms
