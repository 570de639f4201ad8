"""A folded network as a NIR graph, and a NIR graph run by PyTorch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from backbones.deploy.fold import ChannelThreshold, module_of
from backbones.deploy.integer import fix_size, is_binary
from detection.exporters.common import columns, import_extra, pair


def to_nir(network: fx.GraphModule, example: Tensor) -> Any:
    """Return a folded network, for images of one size, as `nir.NIRGraph`: convolutions, sums, thresholds without state.

    NIR adds up what comes in along several edges: so do the residual sums. It has no maximum: a max-pool in front of a
    comparison is Threshold -> SumPool2d -> Threshold. Its Threshold fires above, ours at its number, so that the number
    below is written, and a comparison that is turned round has a Scale of -1 in front.

    Args:
        network: of `fold`, with one input.
        example: an input, of which the first image is taken.

    Raises:
        ImportError: the package nir is not installed.
        ValueError: the network does something that NIR cannot say.
    """
    return _NirWriter(fix_size(network, example[:1]), example[:1]).write()


class _NirWriter:
    def __init__(self, network: fx.GraphModule, example: Tensor) -> None:
        self.nir = import_extra("nir")
        self.network, self.example = network, example
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.sources: dict[fx.Node, list[str]] = {}  # whose sum the value is
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def write(self) -> Any:
        record = self.shapes

        class Shapes(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if isinstance(value, Tensor):
                    record[n] = tuple(value.shape[1:])
                return value

        with torch.no_grad():
            Shapes(self.network).run(self.example)
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                self.nodes["input"] = self.nir.Input({"input": np.array(self.shapes[node])})
                self.sources[node] = ["input"]
            elif node.op == "call_module":
                self._call_module(node)
            elif node.op == "call_function" and node.target is operator.add:
                first, second = node.args
                self.sources[node] = [*self.sources[first], *self.sources[second]]
            elif node.op == "output":
                self._outputs(node.args[0])
            else:
                raise ValueError(f"NIR has nothing for {node.name} ({node.target})")
        return self.nir.NIRGraph(self.nodes, self.edges)

    def _outputs(self, value: Any) -> None:
        outputs = value if isinstance(value, dict) else {"output": value}
        for name, node in outputs.items():
            name = name if name == "output" else f"output_{name}"
            self._add(name, self.nir.Output({"output": np.array(self.shapes[node])}), self.sources[node])

    def _add(self, name: str, node: Any, sources: Sequence[str]) -> list[str]:
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]
        return [name]

    def _call_module(self, node: fx.Node) -> None:
        module, x = module_of(self.network, node), node.args[0]
        if isinstance(module, ChannelThreshold):
            if not (isinstance(module_of(self.network, x), nn.MaxPool2d) and x not in self.sources):
                self.sources[node] = self._threshold(node.name, module, self.sources[x], self.shapes[x])
                return
            self.sources[node] = self._pooled_threshold(node, module, x)
        elif isinstance(module, nn.MaxPool2d):
            if is_binary(self.network, x):
                self.sources[node] = self._sum_pool(node, node, self.sources[x])
            elif not all(isinstance(module_of(self.network, user), ChannelThreshold) for user in node.users):
                raise ValueError(f"NIR has no maximum of real values, which {node.target} takes")
        elif isinstance(module, nn.Conv2d):
            bias = torch.zeros(module.out_channels) if module.bias is None else module.bias
            size = tuple(self.shapes[x][1:])
            kernel = (module.stride, module.padding, module.dilation, 1)
            layer = self.nir.Conv2d(size, _array(_ungrouped(module)), *kernel, _array(bias))
            self.sources[node] = self._add(node.name, layer, self.sources[x])
        elif isinstance(module, nn.Linear):
            bias = torch.zeros(module.out_features) if module.bias is None else module.bias
            layer = self.nir.Affine(_array(module.weight), _array(bias))
            self.sources[node] = self._add(node.name, layer, self.sources[x])
        elif isinstance(module, nn.Flatten):
            shape = {"input": np.array(self.shapes[x])}
            layer = self.nir.Flatten(shape, start_dim=0, end_dim=-1)
            self.sources[node] = self._add(node.name, layer, self.sources[x])
        elif isinstance(module, nn.BatchNorm2d):
            raise ValueError(f"NIR has nothing for {node.target}, a BatchNorm with no convolution to go into")
        elif isinstance(module, (nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            size = self.shapes[x][1:]
            kernel = size if isinstance(module, nn.AdaptiveAvgPool2d) else pair(module.kernel_size)
            layer = self.nir.AvgPool2d(np.array(kernel), np.array(kernel), np.array([0, 0]))
            self.sources[node] = self._add(node.name, layer, self.sources[x])
        else:
            raise ValueError(f"NIR has nothing for {node.target} ({module})")

    def _threshold(
        self, name: str, layer: ChannelThreshold, sources: Sequence[str], shape: tuple[int, ...]
    ) -> list[str]:
        def everywhere(value: Tensor) -> np.ndarray:
            value = value.float()
            return _array(columns(value, len(shape) + 1).expand(shape))

        if layer.has_falling:
            sources = self._add(f"{name}_turned", self.nir.Scale(everywhere(layer.sign)), sources)
        below = torch.nextafter(layer.threshold.float(), torch.full_like(layer.threshold, float("-inf")).float())
        return self._add(name, self.nir.Threshold(everywhere(below)), sources)

    def _pooled_threshold(self, node: fx.Node, layer: ChannelThreshold, pooled: fx.Node) -> list[str]:
        x, pool = pooled.args[0], module_of(self.network, pooled)
        spikes = self._threshold(f"{node.name}_each", layer, self.sources[x], self.shapes[x])
        # A turned comparison holds for the maximum if it holds for every cell, an ordinary one if it does for any.
        cells = int(np.prod(pair(pool.kernel_size)))
        level = torch.where(layer.sign < 0, cells - 0.5, 0.5).float()
        if layer.has_falling and (pool.padding not in (0, (0, 0))):
            raise ValueError(f"NIR has nothing for {pooled.target}: a padded maximum in front of a turned comparison")
        return self._sum_pool(node, pooled, spikes, level)

    def _sum_pool(
        self, node: fx.Node, pooled: fx.Node, sources: Sequence[str], level: Tensor | None = None
    ) -> list[str]:
        """Add as `node` whether a window has more spikes than `level`, or than none; `pooled` is the pool."""
        pool = module_of(self.network, pooled)
        level = torch.tensor(0.5) if level is None else level
        shape = self.shapes[pooled.args[0]]
        kernel, stride, padding = pair(pool.kernel_size), pair(pool.stride), pair(pool.padding)
        for side, k, s, p in zip(shape[1:], kernel, stride, padding, strict=True):
            if pool.ceil_mode and (side + 2 * p - k) % s:
                raise ValueError(
                    f"NIR pools whole windows only, and {pooled.target} has a map of {shape[1]}x{shape[2]} cells: "
                    "choose a height and a width that are multiples of the network's last stride"
                )
        name = f"{node.name}_sum"
        layer = self.nir.SumPool2d(np.array(kernel), np.array(stride), np.array(padding))
        summed = self._add(name, layer, sources)
        out = self.shapes[node]
        return self._add(node.name, self.nir.Threshold(_array(columns(level, len(out) + 1).expand(out))), summed)


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
        ValueError: a node of another kind.
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
        if isinstance(node, nir.Input):
            return x
        total = sum(values[source] for source in incoming[name])
        if isinstance(node, nir.Output):
            return total
        if isinstance(node, nir.Conv2d):
            options = (ints(node.stride), ints(node.padding), ints(node.dilation), int(node.groups))
            return F.conv2d(total, tensor(node.weight), tensor(node.bias), *options)
        if isinstance(node, nir.Affine):
            return F.linear(total, tensor(node.weight), tensor(node.bias))
        if isinstance(node, nir.Threshold):
            return (total > tensor(node.threshold)).to(x.dtype)
        if isinstance(node, nir.Scale):
            return total * tensor(node.scale)
        if isinstance(node, (nir.SumPool2d, nir.AvgPool2d)):
            divisor = 1 if isinstance(node, nir.SumPool2d) else None
            return F.avg_pool2d(
                total, ints(node.kernel_size), ints(node.stride), ints(node.padding), divisor_override=divisor
            )
        if isinstance(node, nir.Flatten):
            return total.flatten(1)
        raise ValueError(f"{name}: a node of the kind {type(node).__name__}")

    waiting = list(graph.nodes)
    while waiting:
        ready = [name for name in waiting if all(source in values for source in incoming[name])]
        if not ready:
            raise ValueError(f"the graph has a cycle through {waiting[0]}")
        for name in ready:
            values[name] = run(name, graph.nodes[name])
        waiting = [name for name in waiting if name not in values]
    return {name: values[name] for name, node in graph.nodes.items() if isinstance(node, nir.Output)}
