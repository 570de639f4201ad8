"""A folded network as a NIR graph, and a NIR graph run by PyTorch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from backbones.deploy.fold import ChannelThreshold, channels_first, copies_of, module_of, norm_affine
from backbones.deploy.integer import fix_size, is_binary, shape_of
from detection.exporters.common import import_extra, pair


def to_nir(network: fx.GraphModule, example: Tensor) -> Any:
    """Return a folded network, for images of one size, as `nir.NIRGraph`: convolutions, sums, thresholds without state.

    NIR adds up what comes in along several edges: so do the residual sums. It has no maximum: a max-pool in front of a
    comparison is Threshold -> SumPool2d -> Threshold. A BatchNorm over the residual stream is a convolution of 1x1. Its
    Threshold fires above, ours at its number, so that the number below is written, and a comparison that is turned
    round has a Scale of -1 in front.

    Args:
        network: of `fold`, with one input.
        example: an input, of which the first image is taken.

    Raises:
        ImportError: the package nir is not installed.
        ValueError: the network does something that NIR cannot say.
    """
    return _NirWriter(fix_size(network, example[:1])).write()


class _NirWriter:
    """Writer of NIR, node by node from the graph of a folded network for images of one size."""

    def __init__(self, network: fx.GraphModule) -> None:
        self.nir = import_extra("nir")
        self.network = network
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.sources: dict[fx.Node, list[str]] = {}  # whose sum the value is

    def write(self) -> Any:
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                self._add("input", self.nir.Input({"input": np.array(_shape(node))}), [])
                self.sources[node] = ["input"]
            elif node.op == "call_module":
                self._module(node)
            elif node.op == "call_function" and node.target is operator.add:
                first, second = node.args
                self.sources[node] = [*self.sources[first], *self.sources[second]]
            elif times := copies_of(node):
                if (x := node.args[0][0]) in self.sources:  # else a maximum, which its threshold writes
                    self.sources[node] = self._copies(node.name, times, self.sources[x], _shape(x))
            elif node.op == "output":
                outputs = node.args[0]
                named = outputs if isinstance(outputs, dict) else {"": outputs}
                for name, value in named.items():
                    output = self.nir.Output({"output": np.array(_shape(value))})
                    self._add(f"output_{name}" if name else "output", output, self.sources[value])
            else:
                raise ValueError(f"NIR has nothing for {node.name} ({node.target})")
        return self.nir.NIRGraph(self.nodes, self.edges)

    def _add(self, name: str, node: Any, sources: Sequence[str]) -> list[str]:
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]
        return [name]

    def _module(self, node: fx.Node) -> None:
        module, x = module_of(self.network, node), node.args[0]
        if isinstance(module, ChannelThreshold):
            times = copies_of(x)
            pooled = x.args[0][0] if times else x
            pool = module_of(self.network, pooled)
            if isinstance(pool, nn.MaxPool2d) and pooled not in self.sources:
                self.sources[node] = self._pooled_threshold(node, module, pooled, pool, max(times, 1))
            else:
                self.sources[node] = self._threshold(node.name, module, self.sources[x], _shape(x))
        elif isinstance(module, nn.MaxPool2d):
            if is_binary(self.network, x):
                self.sources[node] = self._sum_pool(node, node, self.sources[x], torch.tensor(0.5))
            elif not all(
                isinstance(module_of(self.network, user), ChannelThreshold) or copies_of(user) for user in node.users
            ):
                raise ValueError(f"NIR has no maximum of real values, which {node.target} takes")
        else:
            self.sources[node] = self._add(node.name, self._layer(node, module, _shape(x)), self.sources[x])

    def _layer(self, node: fx.Node, module: nn.Module | None, shape: tuple[int, ...]) -> Any:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias
            if isinstance(module, nn.Linear):
                return self.nir.Affine(_array(module.weight), _array(bias))
            kernel = (module.stride, module.padding, module.dilation, 1)
            return self.nir.Conv2d(shape[1:], _array(_ungrouped(module)), *kernel, _array(bias))
        if isinstance(module, nn.Flatten):
            return self.nir.Flatten({"input": np.array(shape)}, start_dim=0, end_dim=-1)
        if isinstance(module, nn.BatchNorm2d):
            scale, shift = norm_affine(module)
            return self.nir.Conv2d(shape[1:], _array(scale.diag()[..., None, None]), 1, 0, 1, 1, _array(shift))
        if isinstance(module, (nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            return self.nir.AvgPool2d(*_windows(node, module))
        raise ValueError(f"NIR has nothing for {node.target} ({module})")

    def _threshold(
        self, name: str, layer: ChannelThreshold, sources: Sequence[str], shape: tuple[int, ...]
    ) -> list[str]:
        if layer.has_falling:
            sources = self._add(f"{name}_turned", self.nir.Scale(_everywhere(layer.sign, shape)), sources)
        below = torch.nextafter(layer.threshold.float(), torch.full_like(layer.threshold, float("-inf")).float())
        return self._add(name, self.nir.Threshold(_everywhere(below, shape)), sources)

    def _copies(self, name: str, times: int, sources: Sequence[str], shape: tuple[int, ...]) -> list[str]:
        channels, *size = shape
        copies = np.tile(np.eye(channels), (times, 1))[..., None, None]
        return self._add(name, self.nir.Conv2d(tuple(size), copies, 1, 0, 1, 1, np.zeros(len(copies))), sources)

    def _pooled_threshold(
        self, node: fx.Node, layer: ChannelThreshold, pooled: fx.Node, pool: nn.MaxPool2d, times: int
    ) -> list[str]:
        x = pooled.args[0]
        sources, (channels, *size) = self.sources[x], _shape(x)
        if times > 1:
            sources = self._copies(f"{node.name}_copies", times, sources, _shape(x))
        spikes = self._threshold(f"{node.name}_each", layer, sources, (times * channels, *size))
        # A turned comparison holds for the maximum if it holds for every cell, an ordinary one if it does for any.
        cells = int(np.prod(pair(pool.kernel_size)))
        level = torch.where(layer.sign < 0, cells - 0.5, 0.5).float()
        if layer.has_falling and (pool.padding not in (0, (0, 0))):
            raise ValueError(f"NIR has nothing for {pooled.target}: a padded maximum in front of a turned comparison")
        return self._sum_pool(node, pooled, spikes, level)

    def _sum_pool(self, node: fx.Node, pooled: fx.Node, sources: Sequence[str], level: Tensor) -> list[str]:
        """Add as `node` whether a window has more spikes than `level`; `pooled` is the pool."""
        layer = self.nir.SumPool2d(*_windows(pooled, module_of(self.network, pooled)))
        summed = self._add(f"{node.name}_sum", layer, sources)
        return self._add(node.name, self.nir.Threshold(_everywhere(level, _shape(node))), summed)


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a value without its batch."""
    return shape_of(node)[1:]


def _windows(node: fx.Node, pool: nn.Module) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return kernel, stride and padding of a pool, which must cover its map by whole windows."""
    sides, cells = _shape(node.args[0])[1:], _shape(node)[1:]
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        kernel = np.array(sides) // cells  # `fix_size` takes no other
        return kernel, kernel, np.array([0, 0])
    kernel, stride, padding = (np.array(pair(value)) for value in (pool.kernel_size, pool.stride, pool.padding))
    if padding.any() and not getattr(pool, "count_include_pad", True):
        raise ValueError(f"NIR has nothing for {node.target}: averages that leave the padding out")
    if pool.ceil_mode and ((sides + 2 * padding - kernel) % stride).any():
        raise ValueError(
            f"NIR pools whole windows only, and {node.target} has a map of {sides[0]}x{sides[1]} cells: "
            "choose a height and a width that are multiples of the network's last stride"
        )
    return kernel, stride, padding


def _everywhere(value: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Return a number per channel, or one for all, for every neuron."""
    return _array(channels_first(value.float(), len(shape) + 1).expand(shape))


def _ungrouped(conv: nn.Conv2d) -> Tensor:
    """Return the weight of the same convolution with one group: the type check of NIR 1.0 knows no other."""
    if conv.groups == 1:
        return conv.weight
    inputs, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    weight = conv.weight.new_zeros(conv.out_channels, conv.in_channels, *conv.kernel_size)
    for group in range(conv.groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        weight[rows, group * inputs : (group + 1) * inputs] = conv.weight.detach()[rows]
    return weight


def _array(value: Tensor) -> np.ndarray:
    return np.array(value.detach().cpu().float().numpy())


def run_nir(graph: Any, x: Tensor) -> dict[str, Tensor]:
    """Return the outputs by name of an NIR graph of `to_nir`, computed in the type of x, (N, ...), for checks.

    Raises:
        ValueError: a node of another kind, or a cycle.
    """
    nir = import_extra("nir")
    incoming: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        incoming[target].append(source)
    values: dict[str, Tensor] = {}

    def tensor(array: Any) -> Tensor:
        return torch.as_tensor(np.asarray(array)).to(x.dtype)

    def ints(value: Any) -> tuple[int, ...]:
        return tuple(int(number) for number in np.broadcast_to(value, 2))

    def run(name: str, node: Any) -> Tensor:
        total = sum(values[source] for source in incoming[name])
        match node:
            case nir.Input():
                return x
            case nir.Output():
                return total
            case nir.Conv2d():
                options = (ints(node.stride), ints(node.padding), ints(node.dilation), int(node.groups))
                return F.conv2d(total, tensor(node.weight), tensor(node.bias), *options)
            case nir.Affine():
                return F.linear(total, tensor(node.weight), tensor(node.bias))
            case nir.Threshold():
                return (total > tensor(node.threshold)).to(x.dtype)
            case nir.Scale():
                return total * tensor(node.scale)
            case nir.SumPool2d() | nir.AvgPool2d():
                window = ints(node.kernel_size), ints(node.stride), ints(node.padding)
                return F.avg_pool2d(total, *window, divisor_override=1 if isinstance(node, nir.SumPool2d) else None)
            case nir.Flatten():
                return total.flatten(1)
        raise ValueError(f"{name}: a node of the kind {type(node).__name__}")

    for name in TopologicalSorter(incoming).static_order():
        values[name] = run(name, graph.nodes[name])
    return {name: values[name] for name, node in graph.nodes.items() if isinstance(node, nir.Output)}
