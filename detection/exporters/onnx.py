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

from backbones.deploy.fold import ChannelThreshold, module_of
from backbones.deploy.integer import IntegerReal, IntegerSpikes, QuantisedReal
from detection.exporters.common import columns, import_extra, pair

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
        self.is_uint8: dict[str, bool] = {}
        self.casts: dict[str, str] = {}

    def write(self, dynamic_size: bool, example: Tensor, outputs: Sequence[str], metadata: Mapping[str, str]) -> Any:
        helper, float32 = self.onnx.helper, self.onnx.TensorProto.FLOAT
        results: list[Any] = []
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                self._set(node, "images")
            elif node.op == "get_attr":
                self._set(node, self._constant(_attribute(self.network, node.target), str(node.target)))
            elif node.op == "call_module":
                self._call_module(node)
            elif node.op == "call_function":
                self._call_function(node)
            elif node.op == "call_method":
                self._call_method(node)
            else:
                fx.map_arg(node.args[0], lambda result: results.append(result))
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

    def _set(self, node: fx.Node, name: str, *, uint8: bool = False) -> None:
        self.names[node] = name
        self.is_uint8[name] = uint8

    def _emit(self, operation: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(operation, list(inputs), [output], name=output, **attributes))
        return output

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

    def _float(self, node: fx.Node) -> str:
        """Return the value of `node` in float32."""
        name = self.names[node]
        if not self.is_uint8[name]:
            return name
        if name not in self.casts:
            self.casts[name] = self._emit("Cast", [name], f"{name}_float", to=self.onnx.TensorProto.FLOAT)
        return self.casts[name]

    def _operand(self, value: fx.Node | float) -> str:
        """Return a value in float32, or a number of the network's code."""
        return self._float(value) if isinstance(value, fx.Node) else self._scalar(value, np.float32)

    # Operations

    def _call_module(self, node: fx.Node) -> None:
        module, out = module_of(self.network, node), node.name
        for kind, method in (
            (ChannelThreshold, self._threshold),
            (IntegerSpikes, self._spikes),
            (IntegerReal, self._real),
            (nn.Conv2d, self._conv),
            (nn.Linear, self._linear),
            (nn.BatchNorm2d, self._norm),
            (nn.GroupNorm, self._group_norm),
        ):
            if isinstance(module, kind):
                method(node, module, out)
                return
        x = node.args[0]
        if isinstance(module, (nn.MaxPool2d, nn.Flatten)):  # of spikes as they are
            uint8 = self.is_uint8[self.names[x]]
            if isinstance(module, nn.Flatten):
                self._emit("Flatten", [self.names[x]], out, axis=module.start_dim)
            else:
                self._max_pool(self.names[x], module, out)
            self._set(node, out, uint8=uint8)
            return
        if isinstance(module, nn.ReLU):
            self._emit("Relu", [self._float(x)], out)
        elif isinstance(module, nn.AvgPool2d):
            kernel, stride = pair(module.kernel_size), pair(module.stride)
            self._emit("AveragePool", [self._float(x)], out, kernel_shape=kernel, strides=stride)
        elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            self._emit("GlobalAveragePool", [self._float(x)], out)
        else:
            raise ValueError(f"{node.target}: no ONNX for the layer {module}")
        self._set(node, out)

    def _max_pool(self, x: str, pool: nn.MaxPool2d, out: str) -> str:
        return self._emit(
            "MaxPool",
            [x],
            out,
            kernel_shape=pair(pool.kernel_size),
            strides=pair(pool.stride),
            pads=pair(pool.padding) * 2,
            ceil_mode=int(pool.ceil_mode),
        )

    def _threshold(self, node: fx.Node, layer: ChannelThreshold, out: str) -> None:
        x, dim = self._float(node.args[0]), self._dim(node)
        if layer.has_falling:
            x = self._emit("Mul", [x, self._constant(columns(layer.sign, dim), f"{out}.sign")], f"{out}_turned")
        level = self._constant(columns(layer.threshold, dim), f"{out}.threshold")
        fires = self._emit("GreaterOrEqual", [x, level], f"{out}_fires")
        uint8 = any(_takes_uint8(self.network, user) for user in node.users)
        types = self.onnx.TensorProto
        self._set(node, self._emit("Cast", [fires], out, to=types.UINT8 if uint8 else types.FLOAT), uint8=uint8)

    def _dim(self, node: fx.Node) -> int:
        """Return the dimensions of a comparison's tensor: 2 behind a linear layer or a flattening, else 4."""
        source = node.args[0]
        module = module_of(self.network, source)
        if isinstance(module, (nn.Linear, nn.Flatten)) or (isinstance(module, IntegerReal) and module.conv is None):
            return 2
        return 4

    def _uint8(self, node: fx.Node) -> str:
        name = self.names[node]
        if not self.is_uint8[name]:
            raise ValueError(f"{node.name} gives no spikes")
        return name

    def _conv_attributes(self, conv: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "strides": pair(conv["stride"]),
            "pads": pair(conv["padding"]) * 2,
            "dilations": pair(conv["dilation"]),
            "group": conv["groups"],
        }

    def _qlinear(
        self, node: fx.Node, layer: IntegerSpikes | IntegerReal, gain: Tensor, zero_point: int, bias: Tensor, out: str
    ) -> str:
        """Emit, as uint8, clip(round(gain * (acc + bias)) + zero_point, 0, 255)."""
        one, no_gain = self._scalar(1, np.float32), np.zeros(gain.shape, np.int8)
        x, zero = node.args[0], self._scalar(0, np.uint8)
        if isinstance(layer, QuantisedReal):
            zero = self._constant(layer.zero_point, f"{node.target}.zero_point")
            levels = [self._float(x), self._constant(layer.step, f"{node.target}.step"), zero]
            entering = self._emit("QuantizeLinear", levels, f"{out}_entering")
        else:
            entering = self._uint8(x)
        inputs = [
            entering,
            one,
            zero,
            self._constant(layer.weight, f"{node.target}.weight"),
            self._constant(gain, f"{node.target}.gain"),
            self._constant(no_gain, "zeros_int8"),
            one,
            self._scalar(zero_point, np.uint8),
            self._constant(bias, f"{node.target}.bias"),
        ]
        return self._emit("QLinearConv", inputs, out, **self._conv_attributes(layer.conv))

    def _spikes(self, node: fx.Node, layer: IntegerSpikes, out: str) -> None:
        types = self.onnx.TensorProto
        if layer.conv is None:
            weight = self._constant(layer.weight.t().contiguous(), f"{node.target}.weight")
            acc = self._emit("MatMulInteger", [self._uint8(node.args[0]), weight], f"{out}_sum")
            fires = self._emit(
                "GreaterOrEqual", [acc, self._constant(layer.threshold, f"{node.target}.threshold")], f"{out}_fires"
            )
            self._set(node, self._emit("Cast", [fires], out, to=types.UINT8), uint8=True)
            return
        x = self._qlinear(node, layer, torch.ones(()), 1, -layer.threshold, f"{out}_above")
        if layer.pool is not None:
            x = self._max_pool(x, layer.pool, f"{out}_pooled")
        inverted = bool(layer.inverted.any())
        x = self._emit("Clip", [x, "", self._scalar(1, np.uint8)], f"{out}_reached" if inverted else out)
        if inverted:
            straight = self._constant(columns(~layer.inverted, 4), f"{node.target}.straight")
            x = self._emit("Cast", [x], f"{out}_bool", to=types.BOOL)
            x = self._emit("Equal", [x, straight], f"{out}_equal")
            self._emit("Cast", [x], out, to=types.UINT8)
        self._set(node, out, uint8=True)

    def _real(self, node: fx.Node, layer: IntegerReal, out: str) -> None:
        if layer.conv is None:
            weight = self._constant(layer.weight.t().contiguous(), f"{node.target}.weight")
            acc = self._emit("MatMulInteger", [self._uint8(node.args[0]), weight], f"{out}_sum")
            x = self._emit("Cast", [acc], f"{out}_float", to=self.onnx.TensorProto.FLOAT)
            x = self._emit("Mul", [x, self._constant(layer.scale, f"{node.target}.scale")], f"{out}_scaled")
            self._emit("Add", [x, self._constant(layer.bias, f"{node.target}.bias")], out)
        else:
            x = self._qlinear(node, layer, layer.gain, 128, layer.offset, f"{out}_level")
            # Not by channel in the DequantizeLinear: ONNX Runtime keeps channels last here, and is slow then.
            levels = [x, self._scalar(1, np.float32), self._scalar(128, np.uint8)]
            x = self._emit("DequantizeLinear", levels, f"{out}_around_0")
            self._emit("Mul", [x, self._constant(columns(layer.scale, 4), f"{node.target}.scale")], out)
        self._set(node, out)

    def _conv(self, node: fx.Node, layer: nn.Conv2d, out: str) -> None:
        inputs = [self._float(node.args[0]), self._constant(layer.weight, f"{node.target}.weight")]
        if layer.bias is not None:
            inputs.append(self._constant(layer.bias, f"{node.target}.bias"))
        keys = ("stride", "padding", "dilation", "groups")
        self._emit("Conv", inputs, out, **self._conv_attributes({key: getattr(layer, key) for key in keys}))
        self._set(node, out)

    def _linear(self, node: fx.Node, layer: nn.Linear, out: str) -> None:
        inputs = [self._float(node.args[0]), self._constant(layer.weight, f"{node.target}.weight")]
        if layer.bias is not None:
            inputs.append(self._constant(layer.bias, f"{node.target}.bias"))
        self._emit("Gemm", inputs, out, transB=1)
        self._set(node, out)

    def _norm(self, node: fx.Node, layer: nn.BatchNorm2d, out: str) -> None:
        names = ("weight", "bias", "running_mean", "running_var")
        constants = [self._constant(getattr(layer, name), f"{node.target}.{name}") for name in names]
        self._emit("BatchNormalization", [self._float(node.args[0]), *constants], out, epsilon=layer.eps)
        self._set(node, out)

    def _group_norm(self, node: fx.Node, layer: nn.GroupNorm, out: str) -> None:
        x, groups = self._float(node.args[0]), layer.num_groups
        rows = self._constant(np.array([0, groups, -1]), "group_rows")
        flat = self._emit("Reshape", [x, rows], f"{out}_groups")
        ones = self._constant(np.ones(groups, np.float32), "group_ones")
        zeros = self._constant(np.zeros(groups, np.float32), "group_zeros")
        flat = self._emit("InstanceNormalization", [flat, ones, zeros], f"{out}_normal", epsilon=layer.eps)
        shape = self._emit("Shape", [x], f"{out}_shape")
        whole = self._emit("Reshape", [flat, shape], f"{out}_whole")
        scaled = self._emit(
            "Mul", [whole, self._constant(columns(layer.weight, 4), f"{node.target}.weight")], f"{out}_m"
        )
        self._emit("Add", [scaled, self._constant(columns(layer.bias, 4), f"{node.target}.bias")], out)
        self._set(node, out)

    def _call_function(self, node: fx.Node) -> None:
        out = node.name
        arithmetic = {operator.add: "Add", operator.sub: "Sub", operator.truediv: "Div", operator.mul: "Mul"}
        if node.target in arithmetic:
            self._emit(arithmetic[node.target], [self._operand(arg) for arg in node.args], out)
        elif node.target in (F.relu, torch.relu):
            self._emit("Relu", [self._float(node.args[0])], out)
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
            raise ValueError(f"{node.name}: no ONNX for the function {node.target}")
        self._set(node, out)

    def _call_method(self, node: fx.Node) -> None:
        x, *arguments = node.args
        if node.target == "permute":
            self._emit("Transpose", [self._float(x)], node.name, perm=list(arguments))
        elif node.target == "flatten" and arguments == [1]:
            self._emit("Flatten", [self._float(x)], node.name, axis=1)
        elif node.target == "unflatten" and arguments[0] == 1:
            shape = self._constant(np.array([0, *arguments[1]]), f"{node.name}_shape")
            self._emit("Reshape", [self._float(x), shape], node.name)
        else:
            raise ValueError(f"{node.name}: no ONNX for the method {node.target}")
        self._set(node, node.name)

    def _ints(self, value: int) -> str:
        return self._constant(np.array([value]), f"int_{value}")


def _takes_uint8(network: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether `node` is an integer layer, or a pool or flattening in front of one."""
    module = module_of(network, node)
    if isinstance(module, (nn.MaxPool2d, nn.Flatten)):
        return any(_takes_uint8(network, user) for user in node.users)
    return isinstance(module, (IntegerSpikes, IntegerReal)) and not isinstance(module, QuantisedReal)


def _attribute(module: nn.Module, path: Any) -> Tensor:
    for name in str(path).split("."):
        module = getattr(module, name)
    return module
