"""The work of a network's layers with weights: inputs, synaptic operations and MACs, counted exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.weak import WeakTensorKeyDictionary

from ..activations import SeveralThresholds
from ..arithmetic import ArithmeticConv2d, Sign
from ..multistep import RepeatSteps
from ..spiking import spike_layers
from .counts import Counts, count, fanout_of, geometry
from .flow import TRANSPARENT, Flow
from .record import LayerActivity, add_up, hook_layers


@dataclass
class WeightedLayer:
    """Counts of one convolution or linear layer over all recorded passes and calls.

    A shared head is called once per level of a pyramid: its calls add up here.

    Attributes:
        name: module name.
        kind: "conv" or "linear".
        num_weights: numbers in the weight.
        num_biases: numbers in the bias, 0 without one.
        num_calls: forward calls.
        num_images: images of the passes in which it ran.
        time_steps: in which it runs for each image, all of them in the counts; 1 in front of the first spike layer.
        num_inputs: input neurons, padding left out.
        num_active: those that were not zero.
        num_synops: synaptic operations, that is pairs of an active input and an output that it reaches. Exact at the
            borders: what falls into the padding, or between the steps of a stride, is not counted. Of several neurons
            for each potential that of the highest threshold reached alone counts (`deploy.highest`).
        num_exact_macs: the same with every input active.
        num_macs: in the usual convention, outputs * C_in / groups * kernel area, padding included.
        num_outputs: output neurons.
        example: an input that was neither 0 nor 1; None if there was none.
        spikes_from: spike layers whose output enters this layer, those left out that entered another one before.
        spikes_to: spike layers that take its output straight, through pooling, normalisation, dropout and flattening.
        output_bits: that leave per output neuron: one for each neuron, or `Sign`, that takes it, more for a graded
            spike, and from a layer in front of the time steps as many for each of those; None where the output is
            needed as a real value: none takes it, or something else does too, such as a residual sum.
        thresholds: neurons of each potential whose spikes enter it; those of the network where that cannot be seen.
        arithmetic, accumulates, weight_bits: of an `ArithmeticConv2d`.
        num_signs: calls in which every input was exactly -1 or 1.
        active_in_steps, synops_in_steps: `num_active` and `num_synops` step by step; empty before the first call.
    """

    name: str
    kind: Literal["conv", "linear"]
    num_weights: int
    num_biases: int
    num_calls: int = 0
    num_images: int = 0
    time_steps: int = 1
    num_inputs: int = 0
    num_active: int = 0
    num_synops: int = 0
    num_exact_macs: int = 0
    num_macs: int = 0
    num_outputs: int = 0
    example: float | None = None
    spikes_from: list[str] = field(default_factory=list)
    spikes_to: list[str] = field(default_factory=list)
    output_bits: float | None = None
    thresholds: int = 1
    arithmetic: str = "float"
    accumulates: int = 0
    weight_bits: int = 32
    num_signs: int = 0
    shares_signs: bool = False
    active_in_steps: list[int] = field(default_factory=list)
    synops_in_steps: list[int] = field(default_factory=list)

    @property
    def is_binary(self) -> bool:
        """Whether it ran and every input was exactly 0 or 1."""
        return self.num_calls > 0 and self.example is None

    @property
    def is_sign(self) -> bool:
        """Whether it ran and every input was exactly -1 or 1, as behind a `Sign`."""
        return self.num_calls == self.num_signs > 0 and self.example is not None

    @property
    def own_signs(self) -> int:
        """Its inputs, if they were signs that no other layer counts."""
        return self.num_inputs if self.is_sign and not self.shares_signs else 0

    @property
    def input_rate(self) -> float:
        """Share of its inputs that were not zero, in [0, 1]; 0 before the first pass."""
        return self.num_active / self.num_inputs if self.num_inputs else 0.0

    @property
    def rate_times_macs(self) -> float:
        """The literature's estimate of the synaptic operations; it counts padding, so it is wrong on small maps."""
        return self.input_rate * self.num_macs

    def stopped(self, steps: int, all_steps: int) -> WeightedLayer:
        """Return the counts of the first `steps` of `all_steps` time steps of the network."""
        if self.time_steps == 1:  # in front of the steps, for which it makes spikes
            return replace(self, output_bits=self.output_bits and self.output_bits * steps / all_steps)
        whole = ("num_inputs", "num_exact_macs", "num_macs", "num_outputs")
        counts = {key: getattr(self, key) * steps // self.time_steps for key in whole}
        active, synops = self.active_in_steps[:steps], self.synops_in_steps[:steps]
        counts |= {"num_active": sum(active), "num_synops": sum(synops)}
        return replace(self, time_steps=steps, active_in_steps=active, synops_in_steps=synops, **counts)


@dataclass
class Measurement:
    """The work of a network over the recorded passes.

    Attributes:
        layers: every `nn.Conv2d` and `nn.Linear` by module name, in the order of definition.
        spikes: every `SpikeLayer` by module name; its neurons are its comparisons.
        unhandled: class by name of every other module with weights (a parameter of two dimensions or more): a
            transposed convolution, say, and products outside of all layers. Nothing is counted for those.
        num_images: images that the model was given.
        ran: names of the layers and spike layers that ran, in the order of their first call.
    """

    layers: dict[str, WeightedLayer]
    spikes: dict[str, LayerActivity]
    unhandled: dict[str, str]
    num_images: int = 0
    ran: list[str] = field(default_factory=list)

    @property
    def stem(self) -> str | None:
        """The first convolution that ran, in a network without convolutions the first linear layer; None: none ran."""
        ran = [self.layers[name] for name in self.ran if name in self.layers]
        return next((layer.name for kind in ("conv", "linear") for layer in ran if layer.kind == kind), None)

    @property
    def time_steps(self) -> int:
        """Time steps of the network, the most of any spike layer."""
        return max((layer.time_steps for layer in self.spikes.values()), default=1)

    @property
    def thresholds(self) -> int:
        """Neurons of each potential, the most of any spike layer."""
        return max((layer.thresholds for layer in self.spikes.values()), default=1)

    def stopped(self, steps: int) -> Measurement:
        """Return what a network that is stopped after its first `steps` time steps would have been measured to do.

        The kinds of inputs (0/1 or not) and the connections are those of all steps, and several thresholds are counted
        as in several steps. What ran in front of the steps is whole from the first on.

        Raises:
            ValueError: it has not so many steps.
        """
        if not 1 <= steps <= self.time_steps:
            raise ValueError(f"steps {steps}: expected 1 to the {self.time_steps} time steps of the network")
        spikes = {}
        for name, layer in self.spikes.items():
            own = min(steps, layer.time_steps)
            fired, neurons = layer.spikes_in_steps[:own], layer.num_neurons * own // layer.time_steps
            spikes[name] = replace(
                layer, num_spikes=sum(fired), num_neurons=neurons, time_steps=own, spikes_in_steps=fired
            )
        layers = {name: layer.stopped(steps, self.time_steps) for name, layer in self.layers.items()}
        return replace(self, layers=layers, spikes=spikes)

    def input_bits(self, layer: WeightedLayer) -> int | None:
        """Return the bits of a layer's inputs where they are spikes, graded ones too, or signs; None: real values."""
        if layer.is_binary or layer.is_sign:
            return 1
        graded = [each for each in map(self.spikes.get, layer.spikes_from) if each.levels > 2]
        levels = [(layer.example or 0.0) * (each.levels - 1) for each in graded]  # a mean of spikes is none of them
        whole = all(abs(level - round(level)) < 0.1 for level in levels)
        return max((each.bits for each in graded), default=None) if whole else None

    def comparisons(self, layer: WeightedLayer) -> int:
        """Return the comparisons that make a layer's inputs: one per neuron of its spike layers, or per sign."""
        return layer.own_signs + sum(self.spikes[name].num_neurons for name in layer.spikes_from)


@torch.no_grad()
def measure_activity(model: nn.Module, batches: Iterable[Any]) -> Measurement:
    """Return the counts of every convolution, linear and spike layer of `model` in evaluation mode, over all batches.

    Args:
        model: a classifier, a detector, any module; left in the mode that it was in.
        batches: what the model takes as its one argument, a tensor (N, ...) or a list of N images, on its device. Of a
            tuple, such as (images, targets), and of a list that begins with (N, C, H, W), the first item is taken.

    Raises:
        ValueError: there are no batches.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with record_layers(model) as measured:
            for batch in batches:
                several = isinstance(batch, list) and len(batch) and getattr(batch[0], "ndim", 0) == 4
                model(batch[0] if several or isinstance(batch, tuple) else batch)
    finally:
        for module, training in modes.items():
            module.training = training
    if not measured.num_images:
        raise ValueError("no images to measure: there are no batches, or they are empty")
    return measured


@contextmanager
def record_layers(model: nn.Module) -> Iterator[Measurement]:
    """Count, while the context is open, what every convolution, linear and spike layer of `model` does.

    Passes must go through `model` itself, whose images are counted: a tensor (N, ...) or a list of N images.
    """
    modules = dict(model.named_modules())
    counted = {name: module for name, module in modules.items() if isinstance(module, (nn.Conv2d, nn.Linear))}
    measured = Measurement(
        layers={
            name: WeightedLayer(
                name,
                "conv" if isinstance(module, nn.Conv2d) else "linear",
                module.weight.numel(),
                module.bias.numel() if module.bias is not None else 0,
                **_arithmetic_of(module),
            )
            for name, module in counted.items()
        },
        spikes={
            name: LayerActivity(name, levels=layer.levels, time_steps=layer.time_steps)
            for name, layer in spike_layers(model).items()
        },
        unhandled={
            name: type(module).__name__
            for name, module in modules.items()
            if name not in counted
            # Norms' weights scale, they do not connect; a parametrisation's are those of the layer that it belongs to.
            and not isinstance(module, (nn.LayerNorm, nn.RMSNorm, ParametrizationList))
            and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        },
    )
    for name, module in _several_thresholds(modules).items():
        measured.spikes[name].thresholds = module.thresholds
    with _Recorder(measured).watch(model, modules):
        yield measured


class _Recorder:
    """The hooks of `record_layers`, and what they have to remember between two layers."""

    def __init__(self, measured: Measurement) -> None:
        self.measured = measured
        self.images_in_pass = 0
        self.signs: set[str] = set()  # names of activations that give -1 and 1
        self.time_steps = 1  # of the layer that runs
        self.flow: Flow | None = None  # there in the first pass only
        self.followed = False
        self.seen_in_pass: set[str] = set()
        self.fanout = cache(fanout_of)
        self.nested: set[str] = set()  # spike layers of which one spike for each potential says everything
        self.sets = WeakTensorKeyDictionary()  # their spikes -> neurons of each potential
        self.latest: tuple[Tensor, int, Counts] | None = None  # for the next layer, which asks for them again

    @contextmanager
    def watch(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Count while the context is open."""
        watched = {
            name: module
            for name, module in modules.items()
            if name in self.measured.layers or name in self.measured.spikes or isinstance(module, (Sign, *TRANSPARENT))
        }
        self.signs = {name for name, module in watched.items() if isinstance(module, Sign)}
        self.nested = {name for name, each in _several_thresholds(modules).items() if each.is_nested}
        try:
            # In front of hooks that were there before: what those do to a tensor must not pass for a use of it. Those
            # of the whole model come around the others, should it be one layer.
            with (
                hook_layers(watched, before=self.enter, after=self.leave, prepend=True),
                hook_layers({"": model}, before=self.start_pass, after=self.end_pass, prepend=True),
            ):
                yield
        finally:
            self.stop_following()

    def start_pass(self, name: str, model: nn.Module, images: Any) -> None:
        if not isinstance(images, (Tensor, list, tuple)):
            what = f"{type(model).__name__} was given {type(images).__name__}"
            raise ValueError(f"{what}; images are counted in a tensor (N, ...) or a list of N, its first argument")
        self.images_in_pass, self.time_steps = len(images), 1
        self.measured.num_images += len(images)
        self.seen_in_pass.clear()
        self.stop_following()  # of a pass that failed
        if not self.followed:
            bits = {name: each.bits for name, each in self.measured.spikes.items()} | dict.fromkeys(self.signs, 1)
            unhandled = [model.get_submodule(name) for name in self.measured.unhandled]
            self.flow = Flow(self.measured.layers, bits, unhandled)
            self.flow.__enter__()

    def end_pass(self, name: str, model: nn.Module, images: Any, output: Any) -> None:
        self.latest = None
        if self.flow is not None:
            layers = self.measured.layers
            for name, (takers, bits) in self.flow.finish(output).items():
                layers[name].spikes_to = [taker for taker in takers if taker not in self.signs]
                layers[name].output_bits = bits and bits * self.time_steps / layers[name].time_steps
            for name, layer in layers.items():
                taken = self.flow.takes.get(name, "")
                layer.thresholds = self.measured.spikes.get(taken, self.measured).thresholds
                layer.shares_signs = taken in self.signs and self.flow.feeds[taken] != name
            for spikes, layer in self.flow.feeds.items():
                if spikes not in self.signs:
                    layers[layer].spikes_from.append(spikes)
            self.measured.unhandled |= dict.fromkeys(sorted(self.flow.products), "product outside of the layers")
            self.stop_following()
            self.followed = True

    def stop_following(self) -> None:
        if self.flow is not None:
            self.flow.__exit__(None, None, None)
            self.flow = None

    def enter(self, name: str, module: nn.Module, x: Tensor) -> None:
        if self.flow is not None:
            self.flow.enter(name, x)
        if isinstance(module, RepeatSteps):
            self.time_steps = module.time_steps
        if name in self.measured.layers:
            self.count_inputs(self.measured.layers[name], module, x)

    def leave(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        if name in self.measured.layers:
            layer = self.measured.layers[name]
            layer.num_outputs += output.numel()
            layer.num_macs += output.numel() * (module.weight.numel() // module.weight.shape[0])
        elif name in self.measured.spikes:
            activity = self.measured.spikes[name]
            if not activity.num_neurons:
                self.measured.ran.append(name)
            activity.add(self.count(output, activity.time_steps).active, output.numel())
            if name in self.nested:
                self.sets[output] = activity.thresholds
        if self.flow is not None:
            self.flow.leave(name, x, output)

    def count_inputs(self, layer: WeightedLayer, module: nn.Conv2d | nn.Linear, x: Tensor) -> None:
        if not layer.num_calls:
            self.measured.ran.append(layer.name)
        if layer.name not in self.seen_in_pass:
            self.seen_in_pass.add(layer.name)
            layer.num_images += self.images_in_pass
        counts = self.count(x, self.time_steps)
        layer.num_calls += 1
        layer.time_steps = self.time_steps
        layer.num_inputs += x.numel()
        layer.num_active += sum(counts.active)
        layer.active_in_steps = add_up(layer.active_in_steps, counts.active)
        layer.num_signs += counts.is_sign
        if not counts.is_binary and layer.example is None:
            layer.example = float(x[(x != 0) & (x != 1)][0])
        if isinstance(module, nn.Linear):
            synops = [number * module.out_features for number in counts.active]
            layer.num_exact_macs += x.numel() * module.out_features
        else:
            # Outputs per output channel that each input position reaches, (height, width): rows times columns.
            fanout = torch.outer(*(self.fanout(x.shape[axis - 2], *geometry(module, axis)) for axis in (0, 1)))
            outputs_per_input = module.out_channels // module.groups
            planes = x.numel() // max(1, x.shape[-2] * x.shape[-1])  # of all images and channels
            if x in self.sets and module.groups == 1:
                counts = count(x.unflatten(1, (self.sets[x], -1)).amax(1), self.time_steps)
            synops = [outputs_per_input * int((each * fanout).sum()) for each in counts.per_position]
            layer.num_exact_macs += outputs_per_input * planes * int(fanout.sum())
        layer.num_synops += sum(synops)
        layer.synops_in_steps = add_up(layer.synops_in_steps, synops)

    def count(self, x: Tensor, steps: int) -> Counts:
        latest = self.latest
        if latest is not None and latest[0] is x and latest[1] == x._version and len(latest[2].active) == steps:
            return latest[2]
        counts = count(x, steps)
        if not x.is_inference():  # such a tensor does not say whether it was changed since
            self.latest = (x, x._version, counts)
        return counts


def _several_thresholds(modules: Mapping[str, nn.Module]) -> dict[str, SeveralThresholds]:
    """Return the layers of several thresholds by the names of the spike layers in them."""
    return {f"{name}.2".lstrip("."): each for name, each in modules.items() if isinstance(each, SeveralThresholds)}


def _arithmetic_of(module: nn.Module) -> dict[str, Any]:
    keys = ("arithmetic", "accumulates", "weight_bits")
    return {key: getattr(module, key) for key in keys} if isinstance(module, ArithmeticConv2d) else {}
