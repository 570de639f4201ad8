"""A network of integers as a program for the event-driven engine: a list of operations and their tensors, no code."""

from __future__ import annotations

import builtins
import hashlib
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..fixed_point import ChannelAffine, FixedPointConv
from ..fold import ChannelThreshold, module_of
from ..highest import Highest
from ..integer import IntegerLayer, IntegerReal, IntegerSpikes, QuantisedReal, is_binary, shape_of
from .library import MAX_OUTPUTS

Operation = dict[str, Any]
ANALOGUE: dict[type[nn.Module], tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    nn.Conv2d: ("conv2d", ("weight", "bias"), ("stride", "padding", "dilation", "groups")),
    nn.Linear: ("linear", ("weight", "bias"), ()),
    ChannelAffine: ("affine", ("scale", "shift"), ()),
    nn.GroupNorm: ("group_norm", ("weight", "bias"), ("num_groups", "eps")),
    nn.ReLU: ("relu", (), ()),
    nn.AvgPool2d: ("avg_pool2d", (), ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d", (), ("output_size",)),
    nn.Flatten: ("flatten", (), ("start_dim",)),
}
"""Operation, tensors and attributes of each layer over real values."""
ARITHMETIC = {operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "div"}


class Program(NamedTuple):
    """The operations of a network and their tensors.

    Attributes:
        operations: each {"op", "inputs", "outputs", "attributes", "tensors"}; inputs and outputs are names of values,
            numbers as they are, and tensors {key: name in `tensors`}. The first input of all is "images".
        outputs: names of the values that the network returns.
        tensors: by name.
    """

    operations: list[Operation]
    outputs: list[str]
    tensors: dict[str, Tensor]


def to_program(network: fx.GraphModule) -> Program:
    """Return the program of a network by `to_integers` with `exact`.

    Layers over spikes become one operation each, together with the addition to a residual stream and with all
    comparisons of what they give. Layers with the same weights over the same spikes, as two towers behind one
    convolution of a pyramid, become one. A max-pool of real values that comparisons alone see becomes one of spikes.

    Raises:
        ValueError: the network does something that the engine does not know.
    """
    return _Writer(network).write()


class _Writer:
    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self.operations: list[Operation] = []
        self.tensors: dict[str, Tensor] = {}
        self.known: dict[Any, str] = {}  # names of tensors by what is in them
        self.names: dict[fx.Node, str] = {}
        self.fused: set[fx.Node] = set()  # computed together with another node
        self.flattened: dict[fx.Node, tuple[int, ...]] = {}  # bits by their shape before

    def write(self) -> Program:
        results: list[fx.Node] = []
        for node in self.network.graph.nodes:
            if node.op == "output":
                fx.map_arg(node.args[0], results.append)
            elif node not in self.fused:
                self.names.setdefault(node, "images" if node.op == "placeholder" else node.name)
                kinds = {"call_module": self._module, "call_function": self._function, "call_method": self._method}
                kinds.get(node.op, self._constant)(node)
        outputs = [self.names[node] for node in results]
        return _without_unused(Program(self.operations, outputs, self.tensors))

    def emit(
        self,
        op: str,
        inputs: list[Any],
        outputs: list[str],
        tensors: dict[str, Tensor] | None = None,
        **attributes: Any,
    ) -> None:
        """Add an operation; `inputs` are nodes, names or numbers."""
        stored = {}
        for key, value in (tensors or {}).items():
            value = value.detach().contiguous()
            bits = hashlib.sha256(value.cpu().numpy().tobytes()).digest()  # a head has the same for every level
            stored[key] = self.known.setdefault((value.dtype, value.shape, bits), f"{outputs[0]}.{key}")
            self.tensors.setdefault(stored[key], value)
        for each in inputs:
            if isinstance(each, fx.Node) and each not in self.names:
                raise self.refuse(each, "number that depends on a map's size")
        entering = [self.names[each] if isinstance(each, fx.Node) else each for each in inputs]
        self.operations.append(
            {"op": op, "inputs": entering, "outputs": outputs, "attributes": attributes, "tensors": stored}
        )

    def take_in(self, *nodes: fx.Node) -> None:
        """Note that nodes are computed by an operation of another one."""
        self.names |= {node: node.name for node in nodes}
        self.fused |= {*nodes}

    def refuse(self, node: fx.Node, what: Any) -> ValueError:
        return ValueError(f"{node.target}: the event-driven engine has no {what}")

    def module(self, node: Any) -> nn.Module | None:
        return module_of(self.network, node)

    def _constant(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self.emit("constant", [], [node.name], {"value": operator.attrgetter(node.target)(self.network)})

    def _module(self, node: fx.Node) -> None:
        module, out, x = self.module(node), [node.name], node.args[0]
        if isinstance(module, IntegerSpikes):
            self._spikes(node, module)
        elif isinstance(module, IntegerReal) and not isinstance(module, QuantisedReal):
            self._real(node, module)
        elif isinstance(module, FixedPointConv):
            self._stem(node, module)
        elif isinstance(module, ChannelThreshold):
            self.emit("threshold", [x], out, self._comparisons([node], shape_of(x)[1]))
        elif isinstance(module, Highest):
            self.emit("highest", list(node.args), out)
        elif isinstance(module, nn.MaxPool2d):
            self._max_pool(node, module)
        elif isinstance(module, nn.Flatten) and is_binary(self.network, x):
            if (module.start_dim, module.end_dim) != (1, -1):
                raise self.refuse(node, f"{module} of spikes")
            self.flattened[node] = shape_of(x)[1:]
            self.emit("flatten_bits", [x], out)
        else:
            self._analogue(node, module)

    # Layers over spikes

    def _spikes(self, node: fx.Node, layer: IntegerSpikes) -> None:
        source, tensors = node.args[0], {"weight": self._weight(node, layer), "threshold_0": layer.threshold}
        if layer.pool is not None:
            inner = f"{node.name}_inner"
            self.emit("layer", [source], [inner], tensors, conv=layer.conv, keeps_real=False)
            mask = {"inverted": layer.inverted} if bool(layer.inverted.any()) else {}
            self.emit("pool_bits", [inner], [node.name], mask, **_pool(layer.pool))
            return
        outputs = [node.name]
        for other in self._siblings(node, layer):
            same = (self.module(other).weight == layer.weight).flatten(1).all(1)
            level = self.module(other).threshold
            # -sum >= T is not (sum >= 1 - T)
            tensors[f"threshold_{len(outputs)}"] = torch.where(same, level, 1 - level)
            if not bool(same.all()):
                tensors[f"turned_{len(outputs)}"] = ~same
            outputs.append(other.name)
            self.take_in(other)
        self.emit("layer", [source], outputs, tensors, conv=layer.conv, keeps_real=False)

    def _siblings(self, node: fx.Node, layer: IntegerSpikes) -> list[fx.Node]:
        """Return later layers over the same spikes whose weights are the same, or turned round."""
        found = []
        for user in node.args[0].users:
            other = self.module(user)
            alike = isinstance(other, IntegerSpikes) and other.pool is None and other.conv == layer.conv
            if user is node or user in self.fused or user in self.names or not alike:
                continue
            if other.weight.shape == layer.weight.shape:
                pairs = other.weight.flatten(1), layer.weight.flatten(1)
                if bool(((pairs[0] == pairs[1]).all(1) | (pairs[0] == -pairs[1]).all(1)).all()):
                    found.append(user)
        return found[: MAX_OUTPUTS - 1]

    def _real(self, node: fx.Node, layer: IntegerReal) -> None:
        if not layer.exact and layer.conv is not None:
            raise ValueError(f"{node.target}: real values are rounded to 8 bits; to_integers with exact=True")
        last, inputs, users = node, [node.args[0]], list(node.users)
        if layer.conv is not None and len(users) == 1 and users[0].target is operator.add:
            others = [each for each in users[0].args if each is not node]
            if len(others) == 1 and self._can_be_residual(others[0], node):
                last = users[0]
                inputs.append(others[0])
        comparisons = self._comparing(last)
        keeps_real = len(comparisons) < len(last.users)
        outputs = [last.name] * keeps_real + [each.name for each in comparisons]
        tensors = {"weight": self._weight(node, layer), "scale": layer.scale, "bias": layer.bias}
        tensors |= self._comparisons(comparisons, len(layer.weight))
        self.take_in(last, *comparisons)
        self.emit("layer", inputs, outputs, tensors, conv=layer.conv, keeps_real=keeps_real)

    def _can_be_residual(self, other: Any, node: fx.Node) -> bool:
        """Return whether another summand is a real map of the same shape, and computed by now."""
        if not isinstance(other, fx.Node) or other not in self.names or is_binary(self.network, other):
            return False
        return shape_of(other) == shape_of(node)

    def _comparing(self, node: fx.Node) -> list[fx.Node]:
        """Return what compares a node's values, as many as its layer takes in."""
        return [user for user in node.users if isinstance(self.module(user), ChannelThreshold)][:MAX_OUTPUTS]

    def _comparisons(self, nodes: list[fx.Node], channels: int) -> dict[str, Tensor]:
        tensors = {}
        for index, node in enumerate(nodes):
            layer = self.module(node)
            tensors[f"level_{index}"] = layer.threshold.expand(channels).float()
            if layer.has_falling:
                tensors[f"turned_{index}"] = (layer.sign < 0).expand(channels)
        return tensors

    def _weight(self, node: fx.Node, layer: IntegerLayer) -> Tensor:
        """Return a layer's weights in the order of its bits: of flattened ones H, W, channels with their padding."""
        if isinstance(self.module(node.args[0]), Highest):
            sets = layer.weight.unflatten(1, (len(node.args[0].args), -1))
            return F.pad(sets, (0, 0, 0, 0, 0, -sets.shape[2] % 64)).flatten(1, 2)
        shape = self.flattened.get(node.args[0])
        if shape is None or len(shape) == 1:
            return layer.weight
        channels, height, width = shape
        weight = layer.weight.reshape(-1, channels, height, width).permute(0, 2, 3, 1)
        return F.pad(weight, (0, -channels % 64)).flatten(1)

    # What sees real values

    def _stem(self, node: fx.Node, layer: FixedPointConv) -> None:
        """Emit the stem with its max-pool, all comparisons and, if nothing else sees the real values, a BatchNorm."""
        tensors = {"weight": layer.weight, "step": layer.step, "scale": layer.scale, "bias": layer.bias}
        last, users, pool = node, list(node.users), None
        if len(users) == 1 and isinstance(self.module(users[0]), nn.MaxPool2d):
            last, pool = users[0], self.module(users[0])
        comparisons = self._comparing(last)
        others = [user for user in last.users if user not in comparisons]
        outputs = [last.name] * bool(others)
        if len(others) == 1 and isinstance(self.module(others[0]), ChannelAffine):
            affine = self.module(others[0])
            tensors |= {"more_scale": affine.scale, "more_bias": affine.shift}
            outputs = [others[0].name]
        source, normalise = self._normalisation(node.args[0], layer.weight.shape[1])
        tensors |= self._comparisons(comparisons, len(layer.weight)) | normalise
        self.take_in(last, *comparisons, *(others if "more_scale" in tensors else ()))
        keys = {"stride": list(layer.stride), "padding": list(layer.padding), "keeps_real": bool(others)}
        keys["pool"] = None if pool is None else _pool(pool)
        self.emit("stem", [source], [*outputs, *(each.name for each in comparisons)], tensors, **keys)

    def _normalisation(self, x: fx.Node, channels: int) -> tuple[fx.Node, dict[str, Tensor]]:
        """Return what enters a stem before it is normalised, (factor * x - mean) / std, and these by their names.

        Only where nothing else sees what is in between, and in this order.
        """
        found: dict[str, Tensor] = {}
        for name, operation in (("std", operator.truediv), ("mean", operator.sub), ("factor", operator.mul)):
            if x.target is not operation or len(x.users) > 1:
                continue
            entering = [each for each in x.args if isinstance(each, fx.Node) and each.op != "get_attr"]
            values = [each for each in x.args if each not in entering]
            if len(entering) != 1 or (name != "factor" and x.args[0] is not entering[0]):
                continue
            value = values[0]
            tensor = operator.attrgetter(value.target)(self.network) if isinstance(value, fx.Node) else value
            found[name] = torch.as_tensor(tensor, dtype=torch.float32).flatten().expand(channels)
            x = entering[0]
        return x, found

    def _max_pool(self, node: fx.Node, pool: nn.MaxPool2d) -> None:
        x, users = node.args[0], list(node.users)
        layers = [self.module(user) for user in users]
        if is_binary(self.network, x):
            self.emit("pool_bits", [x], [node.name], **_pool(pool))
        elif users and all(isinstance(each, ChannelThreshold) and not each.has_falling for each in layers):
            for user in users:
                self.emit("threshold", [x], [f"{user.name}_inner"], self._comparisons([user], shape_of(x)[1]))
                self.emit("pool_bits", [f"{user.name}_inner"], [user.name], **_pool(pool))
            self.take_in(*users)
        else:
            self.emit("max_pool2d", [x], [node.name], **_pool(pool))

    def _analogue(self, node: fx.Node, module: nn.Module | None) -> None:
        found = next((entry for kind, entry in ANALOGUE.items() if isinstance(module, kind)), None)
        if found is None:
            raise self.refuse(node, f"layer {module}")
        if isinstance(module, nn.Conv2d) and (isinstance(module.padding, str) or module.padding_mode != "zeros"):
            raise self.refuse(node, f"convolution {module}")
        if getattr(module, "divisor_override", None) is not None or getattr(module, "end_dim", -1) != -1:
            raise self.refuse(node, f"divisor or last dimension of one's own: {module}")
        op, tensors, attributes = found
        values = {key: getattr(module, key) for key in tensors if getattr(module, key) is not None}
        self.emit(op, [node.args[0]], [node.name], values, **{key: getattr(module, key) for key in attributes})

    def _function(self, node: fx.Node) -> None:
        out, arguments = [node.name], list(node.args)
        if not arguments:
            raise self.refuse(node, f"function {node.target} of named arguments alone")
        if node.target in ARITHMETIC:
            self.emit(ARITHMETIC[node.target], arguments, out)
        elif node.target in (F.relu, torch.relu):
            self.emit("relu", arguments[:1], out)
        elif node.target is torch.cat:
            self.emit("cat", list(arguments[0]), out, dim=node.kwargs.get("dim", (*arguments, 0)[1]))
        elif node.target is F.interpolate and node.kwargs.get("mode") == "nearest":
            self.emit("resize_as", [arguments[0], self._size_of(node)], out)
        elif node.target in (builtins.getattr, operator.getitem):
            del self.names[node]  # a size, which an interpolation alone may take
        else:
            raise self.refuse(node, f"function {node.target}")

    def _size_of(self, node: fx.Node) -> fx.Node:
        """Return the map whose height and width an interpolation takes."""
        part = node.kwargs["size"]
        if isinstance(part, fx.Node) and part.args[1:] == (slice(-2, None, None),):
            shape = part.args[0]
            if shape.target is builtins.getattr and shape.args[1] == "shape":
                return shape.args[0]
        raise self.refuse(node, "interpolation to a size that is not another map's")

    def _method(self, node: fx.Node) -> None:
        (x, *arguments), name = node.args, str(node.target)
        if name == "flatten" and len(arguments) == 1:
            self.emit(name, [x], [node.name], start_dim=arguments[0])
        elif name in ("permute", "unflatten") and not node.kwargs:
            self.emit(name, [x], [node.name], arguments=arguments)
        else:
            raise self.refuse(node, f"method {name}")


def _without_unused(program: Program) -> Program:
    """Return the program without operations whose outputs nobody needs, such as those that another took in."""
    needed, kept = set(program.outputs), []
    for operation in reversed(program.operations):
        if needed & set(operation["outputs"]):
            needed |= {name for name in operation["inputs"] if isinstance(name, str)}
            kept.append(operation)
    tensors = {name for operation in kept for name in operation["tensors"].values()}
    return Program(kept[::-1], program.outputs, {name: program.tensors[name] for name in sorted(tensors)})


def _pool(pool: nn.MaxPool2d) -> dict[str, Any]:
    if pool.dilation not in (1, (1, 1)):
        raise ValueError(f"the event-driven engine has no {pool}: dilation (allowed: 1)")
    keys: tuple[str, ...] = ("kernel_size", "stride", "padding", "dilation")
    values = {key: getattr(pool, key) for key in keys}
    pairs = {key: [value] * 2 if isinstance(value, int) else list(value) for key, value in values.items()}
    return pairs | {"ceil_mode": pool.ceil_mode}
