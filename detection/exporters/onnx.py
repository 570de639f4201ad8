"""A folded network as ONNX, in floating point or in integers."""

from __future__ import annotations

import builtins
import hashlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from backbones.deploy.fold import ChannelThreshold, channels_first, module_of
from backbones.deploy.integer import IntegerLayer, IntegerReal, IntegerSpikes, QuantisedReal
from detection.exporters.common import import_extra, pair

OPSET = 17
IR_VERSION = 9


def to_onnx(
    network: fx.GraphModule,
    *,
    dynamic_size: bool = True,
    example: Tensor,
    outputs: Sequence[str],
    metadata: Mapping[str, str] | None = None,
) -> Any:
    """Return an `onnx.ModelProto` of a folded network, in floating point or, from `backbones.to_integers`, in integers.

    Spikes are uint8 0/1 between integer layers. An integer convolution over spikes is a QLinearConv whose scales are 1
    and whose bias is -T: it gives acc - T + 1, cut to 0..255, of which a Clip to 1 leaves the spikes. Sums of two
    products, which processors without VNNI keep in 16 bits, stay below them, because spikes are 0/1.

    Args:
        network: of `fold` or `to_integers`, with one input.
        dynamic_size: whether height and width of the input are free, as the number of images always is.
        example: an input.
        outputs: names for the tensors that the network returns.
        metadata: written into the file.

    Raises:
        ImportError: the package onnx is not installed.
        ValueError: the network does something that this exporter does not know.
    """
    return _OnnxWriter(network).write(dynamic_size, example, outputs, metadata or {})


class _OnnxWriter:
    """Writer of ONNX, node by node from the graph of a folded network."""

    def __init__(self, network: fx.GraphModule) -> None:
        self.onnx = import_extra("onnx")
        self.network = network
        self.nodes: list[Any] = []
        self.constants: dict[tuple[Any, ...], str] = {}
        self.initializers: list[Any] = []
        self.names: dict[fx.Node, str] = {}
        self.spikes: set[str] = set()  # names of what is uint8
        self.casts: dict[str, str] = {}

    def write(self, dynamic_size: bool, example: Tensor, outputs: Sequence[str], metadata: Mapping[str, str]) -> Any:
        helper, float32 = self.onnx.helper, self.onnx.TensorProto.FLOAT
        calls = {"call_module": self._module, "call_function": self._function, "call_method": self._method}
        results: list[fx.Node] = []
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = "images"
            elif node.op == "get_attr":
                self.names[node] = self._constant(operator.attrgetter(node.target)(self.network), node.target)
            elif node.op == "output":
                fx.map_arg(node.args[0], results.append)
            else:
                self.names[node] = node.name
                calls[node.op](node)
        if len(results) != len(outputs):
            raise ValueError(f"{len(results)} outputs have {len(outputs)} names")
        values = []
        for name, result in zip(outputs, results, strict=True):
            self._emit("Identity", [self._float(result)], name)
            values.append(helper.make_tensor_value_info(name, float32, None))
        size = ["height", "width"] if dynamic_size else list(example.shape[2:])
        entry = helper.make_tensor_value_info("images", float32, ["N", example.shape[1], *size])
        graph = helper.make_graph(self.nodes, type(self.network).__name__, [entry], values, self.initializers)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="hoyer-det"
        )
        helper.set_model_props(model, dict(metadata))
        model = self.onnx.shape_inference.infer_shapes(model)
        self.onnx.checker.check_model(model, full_check=True)
        return model

    # Names and constants

    def _emit(self, operation: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(operation, list(inputs), [output], name=output, **attributes))
        return output

    def _cast(self, name: str, kind: str, output: str) -> str:
        return self._emit("Cast", [name], output, to=getattr(self.onnx.TensorProto, kind))

    def _constant(self, value: Tensor | np.ndarray, hint: str) -> str:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        key = (str(array.dtype), array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest())
        if key not in self.constants:
            name = hint if hint not in self.constants.values() else f"{hint}.{len(self.constants)}"
            self.constants[key] = name
            self.initializers.append(self.onnx.numpy_helper.from_array(np.array(array), name))
        return self.constants[key]

    def _scalar(self, value: float, kind: type) -> str:
        return self._constant(np.array(value, kind), f"{kind.__name__}_{value}")

    def _ints(self, value: int) -> str:
        return self._constant(np.array([value]), f"int_{value}")

    def _of(self, node: fx.Node, name: str, value: Tensor | None = None, *, dim: int = 0) -> str:
        """Return a module's tensor of that name, or `value` in its place, per channel for tensors of `dim`."""
        value = getattr(module_of(self.network, node), name) if value is None else value
        return self._constant(channels_first(value, dim) if dim else value, f"{node.target}.{name}")

    def _float(self, value: fx.Node | float) -> str:
        """Return the value of a node, or a number of the network's code, in float32."""
        if not isinstance(value, fx.Node):
            return self._scalar(value, np.float32)
        name = self.names[value]
        if name not in self.spikes:
            return name
        if name not in self.casts:
            self.casts[name] = self._cast(name, "FLOAT", f"{name}_float")
        return self.casts[name]

    # Operations: each gives the node's value the node's name

    def _module(self, node: fx.Node) -> None:
        module, out, x = module_of(self.network, node), node.name, node.args[0]
        for kind, method in (
            (ChannelThreshold, self._threshold),
            (IntegerSpikes, self._integer_spikes),
            (IntegerReal, self._integer_real),
            (nn.GroupNorm, self._group_norm),
        ):
            if isinstance(module, kind):
                return method(node, module, out)
        if isinstance(module, (nn.MaxPool2d, nn.Flatten)):  # of spikes as they are
            if self.names[x] in self.spikes:
                self.spikes.add(out)
            if isinstance(module, nn.MaxPool2d):
                self._emit("MaxPool", [self.names[x]], out, **_pool_attributes(module))
            else:
                self._emit("Flatten", [self.names[x]], out, axis=module.start_dim)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            inputs = [self._float(x), self._of(node, "weight")]
            inputs += [] if module.bias is None else [self._of(node, "bias")]
            if isinstance(module, nn.Conv2d):
                self._emit("Conv", inputs, out, **_conv_attributes(vars(module)))
            else:
                self._emit("Gemm", inputs, out, transB=1)
        elif isinstance(module, nn.BatchNorm2d):
            constants = [self._of(node, name) for name in ("weight", "bias", "running_mean", "running_var")]
            self._emit("BatchNormalization", [self._float(x), *constants], out, epsilon=module.eps)
        elif isinstance(module, nn.ReLU):
            self._emit("Relu", [self._float(x)], out)
        elif isinstance(module, nn.AvgPool2d) and module.divisor_override is None:
            options = {"count_include_pad": int(module.count_include_pad)}
            self._emit("AveragePool", [self._float(x)], out, **_pool_attributes(module), **options)
        elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            self._emit("GlobalAveragePool", [self._float(x)], out)
        else:
            raise ValueError(f"{node.target}: no ONNX for the layer {module}")

    def _threshold(self, node: fx.Node, layer: ChannelThreshold, out: str) -> None:
        x, source = self._float(node.args[0]), module_of(self.network, node.args[0])
        flat = isinstance(source, (nn.Linear, nn.Flatten)) or (isinstance(source, IntegerReal) and source.conv is None)
        dim = 2 if flat or node.args[0].target in ("flatten", torch.flatten) else 4
        if layer.has_falling:
            turn = self._constant(channels_first(layer.sign, dim), f"{out}.sign")
            x = self._emit("Mul", [x, turn], f"{out}_turned")
        level = self._constant(channels_first(layer.threshold, dim), f"{out}.threshold")
        fires = self._emit("GreaterOrEqual", [x, level], f"{out}_fires")
        if any(_takes_uint8(self.network, user) for user in node.users):
            self.spikes.add(self._cast(fires, "UINT8", out))
        else:
            self._cast(fires, "FLOAT", out)

    def _sums(self, node: fx.Node, layer: IntegerLayer, out: str) -> str:
        """Emit the sums of a linear layer over spikes, int32."""
        weight = self._of(node, "weight", layer.weight.t().contiguous())
        return self._emit("MatMulInteger", [self.names[node.args[0]], weight], f"{out}_sum")

    def _qlinear(
        self, node: fx.Node, layer: IntegerLayer, gain: Tensor, zero_point: int, bias: Tensor, out: str
    ) -> str:
        """Emit, as uint8, clip(round(gain * (acc + bias)) + zero_point, 0, 255) of a convolution."""
        one, no_gain = self._scalar(1, np.float32), np.zeros(gain.shape, np.int8)
        x, zero = node.args[0], self._scalar(0, np.uint8)
        if isinstance(layer, QuantisedReal):
            zero = self._of(node, "zero_point")
            entering = self._emit("QuantizeLinear", [self._float(x), self._of(node, "step"), zero], f"{out}_entering")
        else:
            entering = self.names[x]
        weights = [self._of(node, "weight"), self._of(node, "gain", gain), self._constant(no_gain, "zeros_int8")]
        levels = [one, self._scalar(zero_point, np.uint8), self._of(node, "bias", bias)]
        return self._emit("QLinearConv", [entering, one, zero, *weights, *levels], out, **_conv_attributes(layer.conv))

    def _integer_spikes(self, node: fx.Node, layer: IntegerSpikes, out: str) -> None:
        self.spikes.add(out)
        if layer.conv is None:
            sums = self._sums(node, layer, out)
            self._cast(self._emit("GreaterOrEqual", [sums, self._of(node, "threshold")], f"{out}_fires"), "UINT8", out)
            return
        x = self._qlinear(node, layer, torch.ones(()), 1, -layer.threshold, f"{out}_above")
        if layer.pool is not None:
            x = self._emit("MaxPool", [x], f"{out}_pooled", **_pool_attributes(layer.pool))
        inverted = bool(layer.inverted.any())
        x = self._emit("Clip", [x, "", self._scalar(1, np.uint8)], f"{out}_reached" if inverted else out)
        if inverted:
            straight = self._of(node, "straight", ~layer.inverted, dim=4)
            x = self._emit("Equal", [self._cast(x, "BOOL", f"{out}_bool"), straight], f"{out}_equal")
            self._cast(x, "UINT8", out)

    def _integer_real(self, node: fx.Node, layer: IntegerReal, out: str) -> None:
        if layer.conv is None:
            x = self._cast(self._sums(node, layer, out), "FLOAT", f"{out}_float")
            x = self._emit("Mul", [x, self._of(node, "scale")], f"{out}_scaled")
            self._emit("Add", [x, self._of(node, "bias")], out)
            return
        x = self._qlinear(node, layer, layer.gain, 128, layer.offset, f"{out}_level")
        # Not by channel in the DequantizeLinear: ONNX Runtime keeps channels last here, and is slow then.
        levels = [x, self._scalar(1, np.float32), self._scalar(128, np.uint8)]
        x = self._emit("DequantizeLinear", levels, f"{out}_around_0")
        self._emit("Mul", [x, self._of(node, "scale", dim=4)], out)

    def _group_norm(self, node: fx.Node, layer: nn.GroupNorm, out: str) -> None:
        x, groups = self._float(node.args[0]), layer.num_groups
        rows = self._constant(np.array([0, groups, -1]), "group_rows")
        flat = self._emit("Reshape", [x, rows], f"{out}_groups")
        ones = self._constant(np.ones(groups, np.float32), "group_ones")
        zeros = self._constant(np.zeros(groups, np.float32), "group_zeros")
        flat = self._emit("InstanceNormalization", [flat, ones, zeros], f"{out}_normal", epsilon=layer.eps)
        whole = self._emit("Reshape", [flat, self._emit("Shape", [x], f"{out}_shape")], f"{out}_whole")
        scaled = self._emit("Mul", [whole, self._of(node, "weight", dim=4)], f"{out}_m")
        self._emit("Add", [scaled, self._of(node, "bias", dim=4)], out)

    def _function(self, node: fx.Node) -> None:
        out = node.name
        arithmetic = {operator.add: "Add", operator.sub: "Sub", operator.truediv: "Div", operator.mul: "Mul"}
        if node.target in arithmetic:
            self._emit(arithmetic[node.target], [self._float(arg) for arg in node.args], out)
        elif node.target in (F.relu, torch.relu):
            self._emit("Relu", [self._float(node.args[0])], out)
        elif node.target is torch.flatten and node.args[1:] == (1,):
            self._emit("Flatten", [self._float(node.args[0])], out, axis=1)
        elif node.target is torch.cat:
            axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
            self._emit("Concat", [self._float(arg) for arg in node.args[0]], out, axis=axis)
        elif node.target is builtins.getattr and node.args[1] == "shape":
            self._emit("Shape", [self.names[node.args[0]]], out)
        elif node.target is operator.getitem and node.args[1] == slice(-2, None, None):
            self._emit("Slice", [self.names[node.args[0]], self._ints(-2), self._ints(2**31 - 1)], out)
        elif node.target is F.interpolate and node.kwargs.get("mode") == "nearest":
            x = self._float(node.args[0])
            shape = self._emit("Shape", [x], f"{out}_shape")
            images = self._emit("Slice", [shape, self._ints(0), self._ints(2)], f"{out}_images")
            size = self._emit("Concat", [images, self.names[node.kwargs["size"]]], f"{out}_size", axis=0)
            options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            self._emit("Resize", [x, "", "", size], out, **options)
        else:
            raise ValueError(f"{out}: no ONNX for the function {node.target}")

    def _method(self, node: fx.Node) -> None:
        (x, *arguments), out = node.args, node.name
        if node.target == "permute":
            self._emit("Transpose", [self._float(x)], out, perm=list(arguments))
        elif node.target == "flatten" and arguments == [1]:
            self._emit("Flatten", [self._float(x)], out, axis=1)
        elif node.target == "unflatten" and arguments[0] == 1:
            shape = self._constant(np.array([0, *arguments[1]]), f"{out}_shape")
            self._emit("Reshape", [self._float(x), shape], out)
        else:
            raise ValueError(f"{out}: no ONNX for the method {node.target}")


def _pool_attributes(pool: nn.AvgPool2d | nn.MaxPool2d) -> dict[str, Any]:
    kernel, stride, pads = pair(pool.kernel_size), pair(pool.stride), pair(pool.padding) * 2
    return {"kernel_shape": kernel, "strides": stride, "pads": pads, "ceil_mode": int(pool.ceil_mode)}


def _conv_attributes(conv: Mapping[str, Any]) -> dict[str, Any]:
    """Return ONNX's attributes of a convolution with torch's stride, padding, dilation and groups."""
    lengths = {"strides": conv["stride"], "pads": pair(conv["padding"]) * 2, "dilations": conv["dilation"]}
    return {key: pair(value) for key, value in lengths.items()} | {"group": conv["groups"]}


def _takes_uint8(network: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether `node` is an integer layer, or a pool or flattening in front of one."""
    module = module_of(network, node)
    if isinstance(module, (nn.MaxPool2d, nn.Flatten)):
        return any(_takes_uint8(network, user) for user in node.users)
    return isinstance(module, IntegerLayer) and not isinstance(module, QuantisedReal)
