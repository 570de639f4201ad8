"""How much a spiking network fires, what its layers with weights do, and whether what they see is binary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from .hoyer import HoyerSpike

# What may lie between a layer with weights and the spike layer that takes its output: all of it is done on the way.
TRANSPARENT = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.GroupNorm,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Flatten,
    nn.Identity,
)


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
        num_inputs: input neurons, padding left out.
        num_active: those that were not zero.
        num_synops: synaptic operations, that is pairs of an active input and an output that it reaches. Exact at the
            borders: what falls into the padding, or between the steps of a stride, is not counted.
        num_exact_macs: the same with every input active.
        num_macs: in the usual convention, outputs * C_in / groups * kernel area, padding included.
        num_outputs: output neurons.
        example: an input that was neither 0 nor 1; None if there was none.
        spikes_from: spike layers whose output enters this layer, those left out that entered another one before.
        spikes_to: spike layers that take its output straight, through pooling, normalisation, dropout and flattening.
        output_bits: binary values that leave per output neuron, one for each spike layer that takes it; None where
            the output is needed as a real value: no spike layer takes it, or something else does too, such as a
            residual sum.
    """

    name: str
    kind: Literal["conv", "linear"]
    num_weights: int
    num_biases: int
    num_calls: int = 0
    num_images: int = 0
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

    @property
    def is_binary(self) -> bool:
        """Whether it ran and every input was exactly 0 or 1."""
        return self.num_calls > 0 and self.example is None

    @property
    def input_rate(self) -> float:
        """Share of its inputs that were not zero, in [0, 1]; 0 before the first pass."""
        return self.num_active / self.num_inputs if self.num_inputs else 0.0

    @property
    def rate_times_macs(self) -> float:
        """The literature's estimate of the synaptic operations; it counts padding, so it is wrong on small maps."""
        return self.input_rate * self.num_macs


@dataclass
class Measurement:
    """What a network did over the recorded passes.

    Attributes:
        layers: every `nn.Conv2d` and `nn.Linear` by module name, in the order of definition.
        spikes: every `HoyerSpike` by module name; its neurons are its comparisons.
        unhandled: class by name of every other module with weights (a parameter of two dimensions or more): a
            transposed convolution, say. Nothing is counted for those.
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


@torch.no_grad()
def measure_activity(model: nn.Module, batches: Iterable[Any]) -> Measurement:
    """Counts of every convolution, linear and spike layer of `model` in evaluation mode, over all batches.

    Args:
        model: a classifier, a detector, any module; left in the mode that it was in.
        batches: what the model takes as its one argument, a tensor (N, ...) or a list of N images, on its device. Of a
            tuple, such as (images, targets), the first item is taken.

    Raises:
        ValueError: there are no batches.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with record_layers(model) as measured:
            for batch in batches:
                model(batch[0] if isinstance(batch, tuple) else batch)
    finally:
        for module, training in modes.items():
            module.training = training
    if not measured.num_images:
        raise ValueError("no images to measure: there are no batches, or they are empty")
    return measured


@contextmanager
def record_layers(model: nn.Module) -> Iterator[Measurement]:
    """Counts, while the context is open, what every convolution, linear and spike layer of `model` does.

    Passes must go through `model` itself, whose images are counted: a tensor (N, ...) or a list of N images. Compiled
    parts run uncompiled meanwhile, since compiled code may skip the hooks that count.
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
            )
            for name, module in counted.items()
        },
        spikes={name: LayerActivity(name) for name, module in modules.items() if isinstance(module, HoyerSpike)},
        unhandled={
            name: type(module).__name__
            for name, module in modules.items()
            if name not in counted
            # Norms' weights scale, they do not connect; a parametrisation's are those of the layer that it belongs to.
            and not isinstance(module, (nn.LayerNorm, nn.RMSNorm, ParametrizationList))
            and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        },
    )
    recorder = _Recorder(measured)
    handles = recorder.watch(model, modules)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield measured
    finally:
        recorder.stop_following()
        for handle in handles:
            handle.remove()


class _Recorder:
    """The hooks of `record_layers`, and what they have to remember between two layers."""

    def __init__(self, measured: Measurement) -> None:
        self.measured = measured
        self.images_in_pass = 0
        self.flow: _Flow | None = None  # there in the first pass only
        self.followed = False
        self.seen_in_pass: set[str] = set()
        self.fanouts: dict[tuple[Any, ...], Tensor] = {}
        # A spike layer's output is counted once, though the next layer asks for it again.
        self.latest: tuple[Tensor, int, _Counts] | None = None

    def watch(self, model: nn.Module, modules: dict[str, nn.Module]) -> list[RemovableHandle]:
        handles = []
        for name, module in modules.items():
            if name in self.measured.layers:
                enter, leave = self.enter_layer, self.leave_layer
            elif name in self.measured.spikes:
                enter, leave = self.enter_spikes, self.leave_spikes
            elif isinstance(module, TRANSPARENT):
                enter, leave = None, self.leave_transparent
            else:
                continue
            # In front of hooks that were there before: what those do to a tensor must not pass for a use of it.
            handles.append(module.register_forward_pre_hook(partial(self._enter, enter, name), prepend=True))
            handles.append(module.register_forward_hook(partial(self._leave, leave, name)))
        # Around the others, should the model be one layer.
        handles.append(model.register_forward_pre_hook(self.start_pass, prepend=True, with_kwargs=True))
        handles.append(model.register_forward_hook(self.end_pass))
        return handles

    def start_pass(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        images = next(iter((*inputs, *named.values())), None)
        if not isinstance(images, (Tensor, list, tuple)):
            raise ValueError(
                f"{type(model).__name__} was given {type(images).__name__}; images are counted in a tensor (N, ...) "
                "or a list of N images, its first argument"
            )
        self.images_in_pass = len(images)
        self.measured.num_images += len(images)
        self.seen_in_pass.clear()
        self.stop_following()  # of a pass that failed
        if not self.followed:
            self.flow = _Flow()
            self.flow.__enter__()

    def end_pass(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.latest = None
        if self.flow is not None:
            self.flow.use_elsewhere(output)
            self.flow.describe(self.measured)
            self.stop_following()
            self.followed = True

    def stop_following(self) -> None:
        if self.flow is not None:
            self.flow.__exit__(None, None, None)
            self.flow = None

    def _enter(self, enter: Callable[..., None] | None, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.flow is not None:
            self.flow.inside += 1
        if enter is not None:
            enter(name, module, inputs[0])

    def _leave(
        self, leave: Callable[..., None], name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any
    ) -> None:
        leave(name, module, inputs[0], output)
        if self.flow is not None:
            self.flow.inside -= 1

    def enter_layer(self, name: str, module: nn.Conv2d | nn.Linear, x: Tensor) -> None:
        layer = self.measured.layers[name]
        if self.flow is not None:
            self.flow.enter_layer(layer, x)
        if not layer.num_calls:
            self.measured.ran.append(name)
        if name not in self.seen_in_pass:
            self.seen_in_pass.add(name)
            layer.num_images += self.images_in_pass
        counts = self.count(x)
        layer.num_calls += 1
        layer.num_inputs += x.numel()
        layer.num_active += counts.num_active
        if not counts.is_binary and layer.example is None:
            layer.example = float(x[(x != 0) & (x != 1)][0])
        if isinstance(module, nn.Linear):
            layer.num_synops += counts.num_active * module.out_features
            layer.num_exact_macs += x.numel() * module.out_features
            return
        fanout = self.fanout(module, x.shape[-2], x.shape[-1])
        outputs_per_input = module.out_channels // module.groups
        planes = x.numel() // max(1, x.shape[-2] * x.shape[-1])  # of all images and channels
        layer.num_synops += outputs_per_input * int((counts.per_position * fanout).sum())
        layer.num_exact_macs += outputs_per_input * planes * int(fanout.sum())

    def leave_layer(self, name: str, module: nn.Conv2d | nn.Linear, x: Tensor, output: Tensor) -> None:
        layer = self.measured.layers[name]
        layer.num_outputs += output.numel()
        layer.num_macs += output.numel() * (module.weight.numel() // module.weight.shape[0])
        if self.flow is not None:
            self.flow.leave_layer(layer, output)

    def enter_spikes(self, name: str, module: HoyerSpike, u: Tensor) -> None:
        if self.flow is not None:
            self.flow.enter_spikes(name, u)

    def leave_spikes(self, name: str, module: HoyerSpike, u: Tensor, output: Tensor) -> None:
        activity = self.measured.spikes[name]
        if not activity.num_neurons:
            self.measured.ran.append(name)
        activity.num_neurons += output.numel()
        activity.num_spikes += self.count(output).num_active
        if self.flow is not None:
            self.flow.spikes[output] = name

    def leave_transparent(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        if self.flow is not None:
            self.flow.pass_on(x, output)

    def count(self, x: Tensor) -> _Counts:
        if self.latest is not None and self.latest[0] is x and self.latest[1] == x._version:
            return self.latest[2]
        counts = _count(x)
        if not x.is_inference():  # such a tensor does not say whether it was changed since
            self.latest = (x, x._version, counts)
        return counts

    def fanout(self, module: nn.Conv2d, height: int, width: int) -> Tensor:
        """Outputs per output channel that each input position reaches, (height, width): rows times columns."""
        lines = []
        for axis, size in enumerate((height, width)):
            kernel, stride, dilation = module.kernel_size[axis], module.stride[axis], module.dilation[axis]
            if module.padding == "same":  # the odd one goes behind, as in torch
                before, after = divmod(dilation * (kernel - 1), 2)
                after += before
            else:
                before = after = 0 if module.padding == "valid" else module.padding[axis]
            key = (size, kernel, stride, dilation, before, after, module.padding_mode)
            if key not in self.fanouts:
                self.fanouts[key] = _fanout(*key)
            lines.append(self.fanouts[key])
        return torch.outer(*lines)


class _Counts(NamedTuple):
    """Of one tensor: values other than 0, at each position over all images and channels (float64, on the CPU)."""

    per_position: Tensor
    num_active: int
    is_binary: bool


def _count(x: Tensor) -> _Counts:
    """Few passes over the memory, as this runs for every layer of every batch."""
    x = x.detach()
    is_binary = True
    if x.numel():
        low, high = torch.aminmax(x)
        # In [0, 1] no x - x^2 is negative, and it is 0 at the ends only, also after rounding. NaN fails the first test.
        is_binary = bool((low >= 0) & (high <= 1)) and not bool(torch.addcmul(x, x, x, value=-1).max())
    over = (0, 1) if x.dim() == 4 else 0
    # Sums of fewer than 2^24 ones are exact in float32.
    per_position = x.sum(over, dtype=torch.float32) if is_binary else (x != 0).sum(over, dtype=torch.int32)
    per_position = per_position.cpu().double()
    return _Counts(per_position, int(per_position.sum()), is_binary)


def _fanout(size: int, kernel: int, stride: int, dilation: int, before: int, after: int, mode: str) -> Tensor:
    """Outputs that each of `size` inputs in a row reaches, also through its copies in the padding, (size,) float64."""
    positions = torch.arange(size, dtype=torch.float64).view(1, 1, size)
    if mode == "zeros":
        positions = F.pad(positions, (before, after), value=-1)
    elif before or after:
        positions = F.pad(positions, (before, after), mode=mode)
    taps = positions.flatten().long().unfold(0, dilation * (kernel - 1) + 1, stride)[:, ::dilation]  # (outputs, kernel)
    return torch.bincount(taps[taps >= 0], minlength=size).double()


@dataclass
class _Output:
    """What became of one output of a convolution or linear layer."""

    layer: WeightedLayer
    num: int
    takers: list[str] = field(default_factory=list)
    elsewhere: bool = False


class _Flow(TorchFunctionMode):
    """Follows tensors through one pass, by identity: which spike layers and what else take a layer's output.

    A tensor is taken elsewhere if a layer with weights gets it, or any function that makes a tensor of it, outside of
    the modules that are followed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0  # of how many followed modules
        self.outputs: list[_Output] = []
        self.origins = WeakTensorKeyDictionary()  # tensor -> _Output
        self.spikes = WeakTensorKeyDictionary()  # tensor -> name of the spike layer
        self.used: set[str] = set()
        self.feeds: dict[str, list[str]] = {}  # layer -> spike layers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside and next(_tensors(result), None) is not None:  # x.shape and the like give no tensor
            self.use_elsewhere((args, kwargs))
        return result

    def use_elsewhere(self, values: Any) -> None:
        for tensor in _tensors(values):
            if tensor in self.origins:
                self.origins[tensor].elsewhere = True

    def enter_layer(self, layer: WeightedLayer, x: Tensor) -> None:
        self.use_elsewhere(x)
        name = self.spikes.get(x)
        if name is not None and name not in self.used:
            self.used.add(name)
            self.feeds.setdefault(layer.name, []).append(name)

    def leave_layer(self, layer: WeightedLayer, output: Tensor) -> None:
        self.origins[output] = _Output(layer, output.numel())
        self.outputs.append(self.origins[output])

    def enter_spikes(self, name: str, u: Tensor) -> None:
        if u in self.origins:
            self.origins[u].takers.append(name)

    def pass_on(self, x: Tensor, output: Tensor) -> None:
        for table in (self.origins, self.spikes):
            if x in table:
                table[output] = table[x]

    def describe(self, measured: Measurement) -> None:
        """Writes what was found into the layers."""
        for name, spikes in self.feeds.items():
            measured.layers[name].spikes_from = spikes
        by_layer: dict[str, list[_Output]] = {}
        for output in self.outputs:
            by_layer.setdefault(output.layer.name, []).append(output)
        for name, outputs in by_layer.items():
            layer = measured.layers[name]
            layer.spikes_to = list(dict.fromkeys(taker for output in outputs for taker in output.takers))
            num = sum(output.num for output in outputs)
            if num and all(output.takers and not output.elsewhere for output in outputs):
                layer.output_bits = sum(output.num * len(output.takers) for output in outputs) / num


def _tensors(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


class Finding(NamedTuple):
    """A layer that is not binary, or not known to be, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class Certificate:
    """Whether the input of every convolution and linear layer was exactly 0 or 1 in every measured pass.

    Attributes:
        strict: nothing but the stem was allowed to see real values.
        num_images: how many images were measured.
        num_binary: layers whose inputs were 0/1.
        exceptions: allowed: the stem, and layers that the caller declared analogue.
        violations: everything else that was not binary.
        silent: layers that saw nothing but zeros, for which being binary says little.
        time_steps: passes per image.
        levels: values that a spike can take, 0 and 1.
    """

    strict: bool
    num_images: int
    num_binary: int
    exceptions: tuple[Finding, ...]
    violations: tuple[Finding, ...]
    silent: tuple[str, ...]
    time_steps: int = 1
    levels: int = 2

    @property
    def is_binary(self) -> bool:
        """Whether there is no violation."""
        return not self.violations


def certify(measured: Measurement, analogue: Mapping[str, str] | None = None, *, strict: bool = False) -> Certificate:
    """The certificate of a measured network.

    The stem, the first convolution that ran, sees pixels and is always allowed to. A layer that never ran, or that is
    of a kind that is not measured, is a violation too: nothing is known about it.

    Args:
        measured: of `measure_activity` or `record_layers`.
        analogue: reason by module name of each part that may see real values with all that is in it, such as
            {"roi_heads": "analogue head"}.
        strict: allow nothing but the stem; `analogue` is then left aside.

    Raises:
        RuntimeError: nothing was measured.
        ValueError: there is no layer in a part of `analogue`.
    """
    if not measured.num_images:
        raise RuntimeError("nothing was measured: pass images through the model first")
    analogue = dict(analogue or {})
    names = [*measured.layers, *measured.unhandled]
    for part in analogue:
        if not any(_is_in(name, part) for name in names):
            raise ValueError(f"analogue part {part!r}: no convolution or linear layer has a name in it")
    exceptions, violations, stem = [], [], measured.stem
    if not measured.spikes:
        violations.append(Finding("network", "it has no spike layer"))
    for name in names:
        if name in measured.unhandled:
            reason = f"a {measured.unhandled[name]}, which is not measured"
        elif not measured.layers[name].num_calls:
            reason = "never ran, so nothing is known about it"
        elif measured.layers[name].example is not None:
            reason = f"its input is not 0/1, {measured.layers[name].example:.6g} for one"
        else:
            continue
        if name == stem:
            exceptions.append(Finding(name, "stem: sees pixels"))
            continue
        declared = next((why for part, why in analogue.items() if _is_in(name, part)), None)
        if declared is None or strict:
            violations.append(Finding(name, reason))
        else:
            exceptions.append(Finding(name, declared))
    ran = [layer for layer in measured.layers.values() if layer.num_calls]
    return Certificate(
        strict,
        measured.num_images,
        num_binary=sum(layer.is_binary for layer in ran),
        exceptions=tuple(exceptions),
        violations=tuple(violations),
        silent=tuple(layer.name for layer in ran if not layer.num_active),
    )


def _is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
