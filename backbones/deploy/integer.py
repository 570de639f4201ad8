"""Folded networks with 8-bit weights: every layer that sees spikes adds up integers and compares them with integers.

With the weight w of an output channel, its scale s = max|w| / 127 and W = round(w / s) in -127..127,

    acc = sum of W over the active inputs           int32, exact
    spike = [acc >= T]                              where spikes leave the layer, T an integer per channel
    y = d (clip(round(g (acc + o)), -128, 127))     where a real value does: 8 bits per channel, o an integer

A linear layer that gives real values, that is logits, gives y = s acc + bias without rounding, and so does everything
that is `exact`. Convolutions that see real values, the residual stream and whatever else is analogue stay in floating
point. If asked for, analogue convolutions (of a pyramid, of a head; not the first of the network) round what they see
to 8 bits, too: then W has 7, since a processor without VNNI adds pairs of products in 16 bits, and 2 * 255 * 64 < 2^15,
as 2 * 1 * 127 is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from .fold import ChannelThreshold, add_module, channels_first, clean_up, module_of
from .highest import Highest, fire_once

LIMIT, ANALOGUE_LIMIT = 127, 64  # of a weight's absolute value, over spikes and over 8 bits
EXACT = 2**24  # float32 holds every integer up to here, so convolutions in float32 add up integers exactly
WINDOW, STEPS = 0.25, 12  # of the search for a threshold: its half in standard deviations, its halvings


class IntegerLayer(nn.Module):
    """A convolution or linear layer of int8 weights over 0/1, and what its two kinds share.

    Args:
        layer: gives weight, stride, padding and groups.
        flip: (C,) bool, output channels whose weights change their sign.

    Attributes:
        weight: int8, shape of the layer's.
        weight_scale: float32 (C,), of a unit of the weight.

    Raises:
        ValueError: so many inputs that their sum could leave the integers that float32 holds.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, flip: Tensor | None = None, *, limit: int = LIMIT) -> None:
        super().__init__()
        weight = layer.weight.detach().double()
        fan_in = weight[0].numel()
        if fan_in * LIMIT >= EXACT:
            raise ValueError(f"{fan_in} inputs per neuron: at most {(EXACT - 1) // LIMIT} add up exactly in float32")
        scale = weight.abs().flatten(1).amax(1) / limit
        scale = torch.where(scale > 0, scale, 1.0)
        per_channel = (-1, *[1] * (weight.dim() - 1))
        integers = (weight / scale.view(per_channel)).round()
        if flip is not None:
            integers = torch.where(flip.view(per_channel), -integers, integers)
        self.register_buffer("weight", integers.to(torch.int8))
        self.register_buffer("weight_scale", scale.float())
        self.conv: dict[str, Any] | None = None
        if isinstance(layer, nn.Conv2d):
            if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                raise ValueError(f"{layer}: only padding by a number of zeros can be added up in integers")
            keys = ("stride", "padding", "dilation", "groups")
            self.conv = {key: getattr(layer, key) for key in keys}

    def accumulate(self, x: Tensor) -> Tensor:
        """Sums of weights over active inputs: integers in float32, exact."""
        weight = self.weight.float()
        return F.linear(x.float(), weight) if self.conv is None else F.conv2d(x.float(), weight, **self.conv)

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.weight.shape))}, {self.conv or 'linear'}"


class IntegerSpikes(IntegerLayer):
    """Spikes of a layer over spikes: acc >= T, or acc < T in the channels that are inverted.

    Args:
        layer: convolution or linear layer.
        threshold: what its output, pooled, is compared with.
        pool: max-pool between the two.

    Shape: as the layer's, pooled; 0/1 in float32.

    Attributes:
        threshold: int32 (C,).
        inverted: bool (C,); only behind a pool, where the weights cannot change their sign instead.
    """

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, threshold: ChannelThreshold, pool: nn.MaxPool2d | None = None
    ) -> None:
        channels = layer.weight.shape[0]
        falling = (threshold.sign < 0).expand(channels)
        super().__init__(layer, falling if pool is None else None)
        self.pool = pool
        sign, level = threshold.sign.double().expand(channels), threshold.threshold.double().expand(channels)
        bias = torch.zeros(channels).double() if layer.bias is None else layer.bias.detach().double()
        # On sign * x / scale, which is acc where the weights took the sign, and -acc where there is a pool.
        level = (level - sign * bias) / self.weight_scale.double()
        self.register_buffer("inverted", falling & (pool is not None))
        exact = torch.where(self.inverted, (-level).floor() + 1, level.ceil())
        self.register_buffer("threshold", self._bounded(exact))
        self.register_buffer("fixed", ~level.isfinite(), persistent=False)

    def _bounded(self, threshold: Tensor) -> Tensor:
        """As int32, no further than just out of reach."""
        reach = self.weight.double().abs().flatten(1).sum(1) + 1
        return threshold.clamp(-reach, reach).to(torch.int32)

    def potentials(self, x: Tensor) -> Tensor:
        """Pooled sums."""
        acc = self.accumulate(x)
        return acc if self.pool is None else self.pool(acc)

    def forward(self, x: Tensor) -> Tensor:
        acc = self.potentials(x)
        reached = acc >= channels_first(self.threshold, acc.dim()).float()
        return (reached ^ channels_first(self.inverted, acc.dim())).float()

    def calibrate(self, x: Tensor, rate: Tensor) -> None:
        """Move the threshold of each channel so that on the spikes `x` it fires at `rate` (C,), as nearly as may be.

        The rounding of weights shifts potentials. No threshold moves by more than a quarter of their deviation.
        """
        acc = self.potentials(x)
        dims = all_but_channels(acc)
        target = torch.where(self.inverted, 1 - rate, rate)
        start = self.threshold.float()
        half = (WINDOW * acc.std(dims)).nan_to_num().floor()
        low, high = start - half, start + half  # fires too much, or just right, at low; too little, or so, at high

        def rate_at(level: Tensor) -> Tensor:
            return (acc >= channels_first(level, acc.dim())).float().mean(dims)

        for _ in range(STEPS):
            middle = ((low + high) / 2).floor()
            fires = rate_at(middle) >= target
            low, high = torch.where(fires, middle, low), torch.where(fires, high, middle)
        found = torch.where((rate_at(low) - target).abs() <= (rate_at(high) - target).abs(), low, high)
        # Where the network never fires, or always does, any threshold far enough out would do: the computed one stays.
        keep = self.fixed | (rate == 0) | (rate == 1)
        self.threshold.copy_(self._bounded(torch.where(keep, start, found).double()))


class IntegerReal(IntegerLayer):
    """Real values of a layer over spikes: a convolution's in 8 bits per channel, a linear layer's exact.

    Args:
        layer: convolution or linear layer.
        exact: a convolution's too: scale * acc + bias in float32, without rounding to 8 bits.

    Shape: as the layer's.

    Attributes:
        offset: int32 (C,), the bias in units of the weights, of a convolution.
        gain: float32 (C,), from a sum to the 8 bits, of a convolution.
        scale: float32 (C,), from the 8 bits, or the sum of a linear layer, to the real value.
        bias: float32 (C,), of a linear layer.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, *, limit: int = LIMIT, exact: bool = False) -> None:
        super().__init__(layer, limit=limit)
        self.exact = exact or self.conv is None
        bias = torch.zeros(len(self.weight)) if layer.bias is None else layer.bias.detach().float()
        self.register_buffer("bias", bias.clone())
        self.register_buffer("offset", (bias / self.weight_scale).round().to(torch.int32))
        self.register_buffer("gain", torch.ones_like(bias))
        self.register_buffer("scale", self.weight_scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        acc = self.accumulate(x)
        if self.exact:
            return acc * channels_first(self.scale, acc.dim()) + channels_first(self.bias, acc.dim())
        offset, gain, scale = (channels_first(each, acc.dim()) for each in (self.offset, self.gain, self.scale))
        level = ((acc + offset.to(acc.dtype)).float() * gain).clamp(-128, 127).round()
        return level * scale

    def calibrate(self, x: Tensor, mean: Tensor, largest: Tensor) -> None:
        """Set bias and range so that on the spikes `x` each channel has its `mean` and reaches its `largest` (C,)."""
        step = torch.where(largest > 0, largest / LIMIT, 1.0)
        if not self.exact:  # weights that move nothing, in whose unit the bias would not fit into 32 bits
            still = (self.weight_scale * EXACT < step) | ~self.weight.flatten(1).any(1)
            self.weight[still], self.weight_scale[still] = 0, step[still]
        acc = self.accumulate(x)
        dims = all_but_channels(acc)
        shift = mean - acc.mean(dims).float() * self.weight_scale
        self.bias.copy_(shift)
        if not self.exact:
            self.offset.copy_((shift / self.weight_scale).round().to(torch.int32))
            self.gain.copy_(self.weight_scale / step)
            self.scale.copy_(step)


class QuantisedReal(IntegerReal):
    """Real values, in 8 bits per channel, of a convolution over real values in 8 bits: an analogue one's.

    The input is q = clip(round(x / step) + zero_point, 0, 255); weights lie in -64..64.

    Shape: as the layer's.

    Attributes:
        step: float32 (), of the input.
        zero_point: uint8 (), the q of 0.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer, limit=ANALOGUE_LIMIT)
        self.register_buffer("step", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.uint8))

    def accumulate(self, x: Tensor) -> Tensor:
        """Sums of weight times q - zero_point: integers in float64, since float32 would not hold them all."""
        level = ((x / self.step).round() + self.zero_point).clamp(0, 255) - self.zero_point
        return F.conv2d(level.double(), self.weight.double(), **self.conv)

    def calibrate(self, x: Tensor, mean: Tensor, largest: Tensor) -> None:
        low, high = x.min().clamp_max(0), x.max().clamp_min(0)
        step = torch.where(high > low, (high - low) / 255, 1.0)
        self.weight_scale.mul_(step / self.step)
        self.step.copy_(step)
        self.zero_point.copy_((-low / step).round())
        super().calibrate(x, mean, largest)


def fix_size(folded: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    """The same network for images of one size: adaptive pools to more than one cell become plain ones, or nothing.

    Args:
        folded: of `fold`; not changed.
        example: an input of that size.

    Returns:
        The network; `shape_of` knows the shapes of all that it computes.

    Raises:
        ValueError: a map does not divide into the cells of a pool.
    """
    fixed = copy.deepcopy(folded)
    with torch.no_grad():
        ShapeProp(fixed).propagate(example)
    for node in list(fixed.graph.nodes):
        pool = module_of(fixed, node)
        if not isinstance(pool, nn.AdaptiveAvgPool2d) or pool.output_size in (1, (1, 1)):
            continue
        size, cells = shape_of(node.args[0])[-2:], shape_of(node)[-2:]
        if any(side % number for side, number in zip(size, cells, strict=True)):
            raise ValueError(
                f"images of {example.shape[-2]}x{example.shape[-1]} pixels leave a map of {size[0]}x{size[1]}, which "
                f"does not divide into the {cells[0]}x{cells[1]} cells of {node.target}: choose another size"
            )
        if size == cells:
            node.replace_all_uses_with(node.args[0])
            fixed.graph.erase_node(node)
        else:
            kernel = tuple(side // number for side, number in zip(size, cells, strict=True))
            node.target = add_module(fixed, f"{node.target}_fixed", nn.AvgPool2d(kernel, kernel))
    clean_up(fixed)
    return fixed


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of what a node of a network by `fix_size` gives."""
    return tuple(node.meta["tensor_meta"].shape)


def is_binary(traced: fx.GraphModule, node: Any) -> bool:
    """Whether what `node` gives is 0/1: the output of a comparison, pooled by maximum or flattened."""
    module = module_of(traced, node)
    if isinstance(module, (nn.MaxPool2d, nn.Flatten)):
        return is_binary(traced, node.args[0])
    return isinstance(module, (ChannelThreshold, IntegerSpikes, Highest))


def to_integers(
    folded: nn.Module, images: Tensor, *, keep: Sequence[str] = (), analogue: bool = False, exact: bool = False
) -> fx.GraphModule:
    """`folded` with int8 weights wherever a layer sees spikes, thresholds and ranges set on a few images.

    Layer after layer, on the spikes that the layers before it give now: each channel's threshold moves to where it
    fires as often as in `folded`, each real-valued channel keeps its mean.

    Args:
        folded: of `fold`, one graph; not changed.
        images: (N, 3, H, W) as the network takes them, N of 16 or more for a good estimate.
        keep: layers with one of these in their module names stay in floating point; one name may be a str.
        analogue: 8 bits for convolutions over real values, too, but the first of the network.
        exact: for the event-driven engine: real values that leave a convolution over spikes are not rounded to 8 bits,
            the first convolution of the network is a `FixedPointConv`, and a potential fires once (`fire_once`).

    Raises:
        ValueError: `folded` is no graph, or no layer sees spikes.
    """
    keep = (keep,) if isinstance(keep, str) else keep
    if not isinstance(folded, fx.GraphModule):
        raise ValueError(f"{type(folded).__name__} is not one graph: torch.fx cannot trace it")
    folded, images = copy.deepcopy(folded).float(), images.float()
    folded = fix_size(fire_once(folded) if exact else folded, images[:1])
    statistics = _Statistics(folded)
    statistics.run(images)
    integers = copy.deepcopy(folded)
    calibrations: dict[str, tuple[Tensor, ...]] = {}

    def add(layer: IntegerLayer, name: str, replaced: fx.Node) -> str:
        name = add_module(integers, name, layer)
        calibrations[name] = statistics.found[replaced.name]
        return name

    def may_change(node: fx.Node, *kinds: type[nn.Module]) -> bool:
        kept = any(name in str(node.target) for name in keep)
        return isinstance(module_of(integers, node), kinds) and not kept

    for node in list(integers.graph.nodes):
        threshold = module_of(integers, node)
        if not isinstance(threshold, ChannelThreshold):
            continue
        source, pool = node.args[0], module_of(integers, node.args[0])
        source, pool = (source.args[0], pool) if isinstance(pool, nn.MaxPool2d) else (source, None)
        if may_change(source, nn.Conv2d, nn.Linear) and is_binary(integers, source.args[0]):
            name = add(IntegerSpikes(module_of(integers, source), threshold, pool), f"{source.target}_spikes", node)
            with integers.graph.inserting_before(node):
                node.replace_all_uses_with(integers.graph.call_module(name, (source.args[0],)))
            integers.graph.erase_node(node)
    integers.graph.eliminate_dead_code()
    for node in list(integers.graph.nodes):
        if may_change(node, nn.Conv2d, nn.Linear) and is_binary(integers, node.args[0]):
            node.target = add(IntegerReal(module_of(integers, node), exact=exact), f"{node.target}_integer", node)
    convs = [node for node in integers.graph.nodes if type(module_of(integers, node)) is nn.Conv2d]
    for node in convs[1:] if analogue else []:
        if may_change(node, nn.Conv2d) and not is_binary(integers, node.args[0]):
            node.target = add(QuantisedReal(module_of(integers, node)), f"{node.target}_integer", node)
    return _calibrated(integers, calibrations, images, statistics.found if exact else None)


def _calibrated(
    integers: fx.GraphModule,
    calibrations: dict[str, tuple[Tensor, ...]],
    images: Tensor,
    exact: dict[str, tuple[Tensor, ...]] | None,
) -> fx.GraphModule:
    """Return the network, set on images; `exact` has the statistics of the network before, if it is to be exact."""
    if not calibrations:
        raise ValueError("no layer sees spikes: there is nothing to add up in integers")
    if exact is not None:
        from .fixed_point import fix_points  # which needs this module

        fix_points(integers, calibrations, exact)
    clean_up(integers)
    _Calibration(integers, calibrations).run(images)
    if exact is not None:  # the engine's program asks for the shapes of what was put in, too
        with torch.no_grad():
            ShapeProp(integers).propagate(images[:1])
    return integers


class _Statistics(fx.Interpreter):
    """Per channel: firing rate of every comparison, mean and largest absolute value of every layer's output."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.found: dict[str, tuple[Tensor, ...]] = {}

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        module = module_of(self.module, n)
        if isinstance(module, ChannelThreshold):
            self.found[n.name] = (value.mean(all_but_channels(value)),)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            dims = all_but_channels(value)
            self.found[n.name] = value.mean(dims), value.abs().amax(dims)
        return value


class _Calibration(fx.Interpreter):
    """Calibrates each integer layer when its turn has come."""

    def __init__(self, traced: fx.GraphModule, calibrations: dict[str, tuple[Tensor, ...]]) -> None:
        super().__init__(traced)
        self.calibrations = calibrations

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and n.target in self.calibrations:
            (x,), _ = self.fetch_args_kwargs_from_env(n)
            module_of(self.module, n).calibrate(x, *self.calibrations[n.target])
        return super().run_node(n)


def all_but_channels(x: Tensor) -> list[int]:
    """Return the dimensions of a map or vector (N, C, *) but its channels."""
    return [dim for dim in range(x.dim()) if dim != 1]
