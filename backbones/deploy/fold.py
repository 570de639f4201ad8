"""Networks for inference: BatchNorm and spike layer become one comparison per channel.

At one time step a spike layer behind a BatchNorm, over x, the output of a convolution (pooled or not), is

    spike = [(a x + b) / |v_th| >= E],   a = gamma / sqrt(var + eps),  b = beta - a mean
          = [x >= t]  where a > 0,   [x <= t]  where a < 0,   t = (|v_th| E - b) / a,
          = [b >= |v_th| E], a constant, where a = 0.

Several BatchNorms behind each other are one a and b, also where the channels are repeated between them, for several
thresholds. A max-pool between them and the spike changes places with the comparison, an average with the BatchNorm,
unless it counts zeros of the padding. A BatchNorm whose output is needed as a real value, a residual branch's or that
of a network with ReLU, moves into the weights of its convolution.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..arithmetic import Sign, arithmetic_layers
from ..spiking import SpikeLayer

NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)  # what does nothing in evaluation
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class ChannelThreshold(nn.Module):
    """1 where sign * x >= threshold, else 0, in x's dtype: a comparison per channel, or one for all.

    A channel that always fires has the threshold -inf, one that never does inf.

    Args:
        threshold: shape () or (C,), rounded up to a number of `dtype`. So a number of that type is compared as with
            the threshold itself.
        sign: 1, or -1 where the comparison is turned round; shape of the threshold.
        dtype: of the potentials.

    Shape: (N, C, *) -> (N, C, *).
    """

    def __init__(self, threshold: Tensor, sign: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        sign = torch.ones_like(threshold) if sign is None else sign
        if threshold.shape != sign.shape or threshold.dim() > 1:
            raise ValueError(
                f"threshold and sign must both have the shape () or (C,), got {tuple(threshold.shape)} and "
                f"{tuple(sign.shape)}"
            )
        self.register_buffer("threshold", round_up(threshold, dtype))
        self.register_buffer("sign", sign.to(dtype))
        self.has_falling = bool((sign < 0).any())

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.has_falling = bool((self.sign < 0).any())

    def forward(self, x: Tensor) -> Tensor:
        if self.has_falling:
            x = x * channels_first(self.sign, x.dim())
        return (x >= channels_first(self.threshold, x.dim())).to(x.dtype)

    def extra_repr(self) -> str:
        channels = self.threshold.numel() if self.threshold.dim() else "all in one"
        return f"channels={channels}, falling={int((self.sign < 0).sum())}"


def round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest numbers of `dtype` that are not below the float64 numbers `value`."""
    nearest = value.to(dtype)
    above = torch.nextafter(nearest, torch.full_like(nearest, float("inf")))
    return torch.where(nearest.to(value.dtype) < value, above, nearest)


def fold(model: nn.Module) -> nn.Module:
    """The same function in evaluation mode as a new module: BatchNorm and spike layer as one `ChannelThreshold`.

    Thresholds and weights are computed in float64 and rounded to the type of the network's numbers. In exact
    arithmetic every spike is that of `model`; a potential closer to its threshold than the rounding of the arithmetic
    may fall to the other side. Also for a network with ReLU, whose BatchNorms move into its convolutions.

    What torch.fx can trace, such as a backbone or a `Classifier`, becomes one `torch.fx.GraphModule`, which has no
    training mode; what it cannot, such as a torchvision detector, keeps its class, and its parts are folded.

    Args:
        model: any module; not changed.

    Raises:
        ValueError: one comparison cannot say what a spike layer does, or a convolution is of another arithmetic; names
            it.
    """
    require_float(model)
    return _fold(copy.deepcopy(model).eval(), "")


def require_float(model: nn.Module) -> None:
    """Raise ValueError that names the first convolution of another arithmetic, into whose weights nothing folds."""
    for name, layer in arithmetic_layers(model).items():
        raise ValueError(f"layer {name}: arithmetic {layer.arithmetic!r} has no folded form (allowed: 'float')")


def _fold(model: nn.Module, prefix: str) -> nn.Module:
    if not any(isinstance(module, (*NORMS, SpikeLayer)) for module in model.modules()):
        return model
    # A lone norm has nothing to join, a list of modules no forward.
    traced = None if isinstance(model, (*NORMS, nn.ModuleList, nn.ModuleDict)) else trace(model)
    if traced is None:
        for name, child in model.named_children():
            setattr(model, name, _fold(child, f"{prefix}{name}."))
        return model
    _fold_spikes(traced, prefix)
    _fold_norms(traced)
    for name, value in vars(model).items():  # such as feature_info and out_channels, which others read
        if not (name.startswith("_") or name == "training"):
            setattr(traced, name, value)
    return traced.eval()


class _Tracer(fx.Tracer):
    """Goes into every module but torch's own and the activations."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (SpikeLayer, Sign)) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule | None:
    """The graph of `model`'s forward over modules, without what nobody uses; None where torch.fx cannot trace it."""
    root = nn.Sequential(model) if isinstance(model, SpikeLayer) else model
    try:
        graph = _Tracer().trace(root)
    except Exception:  # a forward may fail in any way with a placeholder in place of a tensor
        return None
    traced = fx.GraphModule(root, graph, type(model).__name__)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.args and len(node.kwargs) == 1:  # called as layer(input=x)
            node.args, node.kwargs = tuple(node.kwargs.values()), {}
        if isinstance(module_of(traced, node), NOTHING):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    clean_up(traced)
    return traced


def module_of(traced: fx.GraphModule, node: Any) -> nn.Module | None:
    """The module that `node` calls, None if it does something else."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return traced.get_submodule(node.target)


def clean_up(traced: fx.GraphModule) -> None:
    """Remove what nobody uses, from the graph and from the modules."""
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()


def add_module(traced: fx.GraphModule, name: str, module: nn.Module) -> str:
    """Add `module` under `name`, or a name like it that is free, and return that name."""
    taken = {key for key, _ in traced.named_modules(remove_duplicate=False)}
    free, number = name, 0
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    traced.add_submodule(free, module)
    return free


class _Affine(NamedTuple):
    """What lies between a source and a spike layer: scale * x + shift per channel, and pools, nearest the spike first.

    `scale` and `shift` are float64, () or (C,), of the spike layer's channels, the source's once or several `times`.
    """

    source: fx.Node
    scale: Tensor
    shift: Tensor
    pools: tuple[fx.Node, ...]
    times: int


def _fold_spikes(traced: fx.GraphModule, prefix: str) -> None:
    for node in list(traced.graph.nodes):
        layer = module_of(traced, node)
        if not isinstance(layer, SpikeLayer):
            continue
        affine = _look_back(traced, node.args[0])
        try:
            threshold = _threshold(layer, affine)
        except ValueError as error:
            raise ValueError(f"spike layer {prefix}{node.target}: {error}") from None
        name = add_module(traced, f"{node.target}_threshold", threshold)
        pools = [str(pool.target) for pool in reversed(affine.pools)]
        has_maximum = any(isinstance(module_of(traced, pool), nn.MaxPool2d) for pool in affine.pools)
        # A channel that falls turns a maximum into a minimum: there the pool takes the spikes.
        steps = [name, *pools] if has_maximum and not (affine.scale > 0).all() else [*pools, name]
        x = affine.source
        with traced.graph.inserting_before(node):
            for step in steps:
                if step == name and affine.times > 1:
                    x = traced.graph.call_function(torch.cat, ([x] * affine.times,), {"dim": 1})
                x = traced.graph.call_module(step, (x,))
        node.replace_all_uses_with(x)
        traced.graph.erase_node(node)
    clean_up(traced)


def _look_back(traced: fx.GraphModule, node: fx.Node) -> _Affine:
    """The deepest source from which the spike layer over `node` can be one comparison."""
    one = torch.ones((), dtype=torch.float64)
    scale, shift, pools, times = one, torch.zeros_like(one), [], 1
    found = _Affine(node, scale, shift, (), times)
    while True:
        module = module_of(traced, node)
        if isinstance(module, NORMS) and module.running_mean is not None:
            factor, offset = (each.repeat(times) for each in norm_affine(module))
            scale, shift = scale * factor, scale * offset + shift
            node = node.args[0]
            are_maxima = {isinstance(module_of(traced, pool), nn.MaxPool2d) for pool in pools}
            # Maxima and averages, or a maximum of several spikes for each potential in place of one of potentials.
            if True in are_maxima and (len(are_maxima) == 2 or times > 1) and not (scale > 0).all():
                return found
            found = _Affine(node, scale, shift, tuple(pools), times)
        elif copies := copies_of(node):
            times *= copies
            node = node.args[0][0]
            found = _Affine(node, scale, shift, tuple(pools), times)
        elif is_mean(module) or (isinstance(module, nn.MaxPool2d) and bool((scale > 0).all())):
            pools.append(node)
            node = node.args[0]
        else:
            return found


def copies_of(node: Any) -> int:
    """Return how many copies of one map a node puts behind each other, as `RepeatChannels` does; 0: it does not."""
    if not isinstance(node, fx.Node) or node.target is not torch.cat:
        return 0
    dim = node.kwargs.get("dim", (*node.args, 0)[1])
    return len(node.args[0]) if dim == 1 and len(set(node.args[0])) == 1 else 0


def _threshold(layer: SpikeLayer, affine: _Affine) -> ChannelThreshold:
    level = layer.fold_threshold()
    scale, shift = affine.scale, affine.shift
    distance = level - shift
    # 0 or more where the channel, whose scale is 0, never reaches the level.
    constant = torch.where(distance > 0, float("inf"), float("-inf")).double()
    threshold = torch.where(scale == 0, constant, distance / torch.where(scale == 0, 1.0, scale))
    sign = torch.where(scale < 0, -1.0, 1.0).double().expand_as(threshold)
    return ChannelThreshold(sign * threshold, sign, dtype=layer.threshold.dtype)


def is_mean(module: nn.Module | None) -> bool:
    """Whether a pool changes places with scale * x + shift: an average whose weights add up to 1, at borders, too."""
    if isinstance(module, nn.AvgPool2d):
        counts_zeros = module.count_include_pad and module.padding not in (0, (0, 0))
        return not counts_zeros and module.divisor_override is None
    return isinstance(module, nn.AdaptiveAvgPool2d)


def norm_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift, float64 (C,), of a BatchNorm in evaluation mode."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = 1 / (var + norm.eps).sqrt()
    if norm.affine:
        scale = scale * norm.weight.detach().double()
        return scale, norm.bias.detach().double() - scale * mean
    return scale, -scale * mean


def _fold_norms(traced: fx.GraphModule) -> None:
    """Moves every BatchNorm that is left into the convolution in front of it, where nothing else uses that one."""
    for node in list(traced.graph.nodes):
        norm = module_of(traced, node)
        if not isinstance(norm, NORMS) or norm.running_mean is None:
            continue
        scale, shift = norm_affine(norm)
        source = node.args[0]
        while len(source.users) == 1 and (
            is_mean(module_of(traced, source))
            or (isinstance(module_of(traced, source), nn.MaxPool2d) and bool((scale > 0).all()))
        ):
            source = source.args[0]
        conv = module_of(traced, source)
        if not isinstance(conv, nn.Conv2d) or len(source.users) != 1:
            continue
        source.target = add_module(traced, f"{source.target}_folded", _scaled(conv, scale, shift))
        node.replace_all_uses_with(node.args[0])
        traced.graph.erase_node(node)
    clean_up(traced)


def _scaled(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> nn.Conv2d:
    """`conv` with its output channels times `scale` plus `shift`."""
    scaled = copy.deepcopy(conv)
    weight = conv.weight.detach()
    bias = torch.zeros_like(shift) if conv.bias is None else conv.bias.detach().double()
    scaled.weight = nn.Parameter((weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype))
    scaled.bias = nn.Parameter((bias * scale + shift).to(weight.dtype))
    return scaled


def channels_first(value: Tensor, dim: int) -> Tensor:
    """A value per channel, (C,), in a shape that broadcasts to `dim` dimensions; one value for all stays as it is."""
    return value.view(-1, *[1] * (dim - 2)) if value.dim() else value
