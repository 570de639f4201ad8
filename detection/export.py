"""Networks as files: ONNX in floating point or integers, torch.export, NIR; each checked against PyTorch when written.

All start from the folded network (`backbones.fold`), in which BatchNorm and spike layer are one comparison per channel.
A network takes images (N, 3, H, W), RGB in [0, 1], and normalises them itself. A classifier gives "logits" (N, K). A
dense detector gives what its head predicts for every anchor, on images that were resized and padded before;
`OnnxDetector` does that, and makes boxes of what comes out by torchvision's own code.
"""

from __future__ import annotations

import builtins
import copy
import hashlib
import io
import json
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.ssd import SSD

import backbones
from backbones.fold import ChannelThreshold, fold, module_of
from backbones.integer import IntegerReal, IntegerSpikes, QuantisedReal, fix_size, is_binary, to_integers
from detection.checkpoint import Run, Weights
from detection.classification import in_memory
from detection.config import ClassificationConfig, Config, Recipe
from detection.data import DetectionDataset, build_datasets
from detection.data.images import FolderImages, read_folder, read_images
from detection.files import write_whole
from detection.models import build_detector, load_model

OPSET = 17
IR_VERSION = 9


def import_extra(name: str) -> Any:
    """The optional package `name`.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return __import__(name)
    except ImportError:
        raise ImportError(f"this needs {name}: pip install hoyer-det[export]") from None


# --- ONNX ---------------------------------------------------------------------------------------------------------


def to_onnx(
    network: fx.GraphModule,
    *,
    dynamic_size: bool = True,
    example: Tensor,
    outputs: Sequence[str],
    metadata: Mapping[str, str] | None = None,
) -> Any:
    """An `onnx.ModelProto` of a folded network, in floating point or, from `backbones.to_integers`, in integers.

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
    """Node by node from the graph of a folded network to ONNX."""

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
        """The value of `node` in float32."""
        name = self.names[node]
        if not self.is_uint8[name]:
            return name
        if name not in self.casts:
            self.casts[name] = self._emit("Cast", [name], f"{name}_float", to=self.onnx.TensorProto.FLOAT)
        return self.casts[name]

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
            kernel, stride = _pair(module.kernel_size), _pair(module.stride)
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
            kernel_shape=_pair(pool.kernel_size),
            strides=_pair(pool.stride),
            pads=_pair(pool.padding) * 2,
            ceil_mode=int(pool.ceil_mode),
        )

    def _threshold(self, node: fx.Node, layer: ChannelThreshold, out: str) -> None:
        x, dim = self._float(node.args[0]), self._dim(node)
        if layer.has_falling:
            x = self._emit("Mul", [x, self._constant(_columns(layer.sign, dim), f"{out}.sign")], f"{out}_turned")
        level = self._constant(_columns(layer.threshold, dim), f"{out}.threshold")
        fires = self._emit("GreaterOrEqual", [x, level], f"{out}_fires")
        uint8 = any(_takes_uint8(self.network, user) for user in node.users)
        types = self.onnx.TensorProto
        self._set(node, self._emit("Cast", [fires], out, to=types.UINT8 if uint8 else types.FLOAT), uint8=uint8)

    def _dim(self, node: fx.Node) -> int:
        """Dimensions of a comparison's tensor: 2 behind a linear layer or a flattening, else 4."""
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
            "strides": _pair(conv["stride"]),
            "pads": _pair(conv["padding"]) * 2,
            "dilations": _pair(conv["dilation"]),
            "group": conv["groups"],
        }

    def _qlinear(
        self, node: fx.Node, layer: IntegerSpikes | IntegerReal, gain: Tensor, zero_point: int, bias: Tensor, out: str
    ) -> str:
        """uint8: clip(round(gain * (acc + bias)) + zero_point, 0, 255)."""
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
            straight = self._constant(_columns(~layer.inverted, 4), f"{node.target}.straight")
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
            self._emit("Mul", [x, self._constant(_columns(layer.scale, 4), f"{node.target}.scale")], out)
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
            "Mul", [whole, self._constant(_columns(layer.weight, 4), f"{node.target}.weight")], f"{out}_m"
        )
        self._emit("Add", [scaled, self._constant(_columns(layer.bias, 4), f"{node.target}.bias")], out)
        self._set(node, out)

    def _call_function(self, node: fx.Node) -> None:
        out = node.name
        arithmetic = {operator.add: "Add", operator.sub: "Sub", operator.truediv: "Div", operator.mul: "Mul"}
        if node.target in arithmetic:
            self._emit(arithmetic[node.target], [self._float(arg) for arg in node.args], out)
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
    """Whether `node` is an integer layer, or a pool or flattening in front of one."""
    module = module_of(network, node)
    if isinstance(module, (nn.MaxPool2d, nn.Flatten)):
        return any(_takes_uint8(network, user) for user in node.users)
    return isinstance(module, (IntegerSpikes, IntegerReal)) and not isinstance(module, QuantisedReal)


def _attribute(module: nn.Module, path: Any) -> Tensor:
    for name in str(path).split("."):
        module = getattr(module, name)
    return module


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _columns(value: Tensor, dim: int) -> Tensor:
    """A value per channel, to go with tensors of `dim` dimensions; one value for all stays as it is."""
    return value.detach().reshape(-1, *[1] * (dim - 2)) if value.dim() else value.detach()


# --- what is exported -----------------------------------------------------------------------------------------------


class Normalised(nn.Module):
    """A network that takes images in [0, 1] and normalises them itself.

    Shape: (N, 3, H, W) -> what `network` gives.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Any:
        return self.network((images - self.mean) / self.std)


class DensePredictions(nn.Module):
    """What the head of a RetinaNet, FCOS or SSD says of every anchor: the network without images' sizes and boxes.

    Shape: (N, 3, H, W) normalised -> (N, A, num_classes), (N, A, 4) and, for FCOS, (N, A, 1), anchors in the order of
    torchvision's, finest level first; see `outputs`.

    Raises:
        ValueError: the detector pools regions, which depend on what it found before.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        kinds = {RetinaNet: self._retinanet, FCOS: self._fcos, SSD: self._ssd}
        self.kind = next((kind for kind in kinds if isinstance(detector, kind)), None)
        if self.kind is None:
            raise ValueError(
                f"a {type(detector).__name__} cannot be exported: it pools regions, whose number depends on the image "
                "(allowed: retinanet, fcos, ssd, and classifiers)"
            )
        self.backbone, self.head = detector.backbone, detector.head
        self._predict = kinds[self.kind]
        self.outputs = ["cls_logits", "bbox_regression"] + (["bbox_ctrness"] if self.kind is FCOS else [])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        rows = self._predict(list(self.backbone(images).values()))
        return tuple(torch.cat(levels, dim=1) for levels in rows)

    def _towers(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        head = self.head
        spiking = hasattr(head, "classification_tower")
        classes = head.classification_tower(maps) if spiking else [head.classification_head.conv(x) for x in maps]
        boxes = head.regression_tower(maps) if spiking else [head.regression_head.conv(x) for x in maps]
        return classes, boxes

    def _retinanet(self, maps: list[Tensor]) -> list[list[Tensor]]:
        classes, boxes = self._towers(maps)
        classification, regression = self.head.classification_head, self.head.regression_head
        return [
            [_rows(classification.cls_logits(x), classification.num_classes) for x in classes],
            [_rows(regression.bbox_reg(x), 4) for x in boxes],
        ]

    def _fcos(self, maps: list[Tensor]) -> list[list[Tensor]]:
        classes, boxes = self._towers(maps)
        classification, regression = self.head.classification_head, self.head.regression_head
        return [
            [_rows(classification.cls_logits(x), classification.num_classes) for x in classes],
            [_rows(F.relu(regression.bbox_reg(x)), 4) for x in boxes],
            [_rows(regression.bbox_ctrness(x), 1) for x in boxes],
        ]

    def _ssd(self, maps: list[Tensor]) -> list[list[Tensor]]:
        return [
            [_rows(layer(x), head.num_columns) for layer, x in zip(head.module_list, maps, strict=True)]
            for head in (self.head.classification_head, self.head.regression_head)
        ]


def _rows(x: Tensor, columns: int) -> Tensor:
    """(N, A * columns, H, W) -> (N, H * W * A, columns), as torchvision's heads order them."""
    return x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, columns))


class DetectorOf(nn.Module):
    """A torchvision detector whose backbone and head are another network: sizes, anchors and boxes stay its own.

    Args:
        detector: a RetinaNet, FCOS or SSD of this project; changed: it loses its weights.
        predict: (N, 3, H, W), RGB in [0, 1], padded with the mean colour -> the head's outputs by name.

    Shape: [(3, H_i, W_i)] in [0, 1] -> [{"boxes": (M, 4), "scores": (M,), "labels": (M,)}], as torchvision's.
    """

    def __init__(self, detector: nn.Module, predict: Callable[[Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        transform = detector.transform
        # Divided by 1 and padded with 0 after the mean is taken off: padded with the mean colour, that is.
        mean, transform.image_std = torch.tensor(transform.image_mean).view(3, 1, 1), [1.0, 1.0, 1.0]
        bridge = _Bridge(detector.backbone.to("meta"), lambda shifted: predict(shifted + mean))
        detector.backbone, detector.head = bridge, _BridgeHead(bridge)
        self.detector = detector.eval()

    @torch.no_grad()
    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        return self.detector(list(images))


class _Bridge(nn.Module):
    """In the place of a backbone: empty maps of its shapes, and the head's outputs for `_BridgeHead` to take."""

    def __init__(self, shapes: nn.Module, predict: Callable[[Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        self.shapes, self.predict = shapes, predict
        self.known: dict[torch.Size, list[torch.Size]] = {}
        self.outputs: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        self.outputs = self.predict(images)
        if images.shape not in self.known:  # on the meta device nothing is computed but shapes
            maps = self.shapes(images.to("meta"))
            self.known[images.shape] = [x.shape for x in maps.values()]
        shapes = enumerate(self.known[images.shape])
        return OrderedDict((str(level), images.new_zeros(()).expand(shape)) for level, shape in shapes)


class _BridgeHead(nn.Module):
    def __init__(self, bridge: _Bridge) -> None:
        super().__init__()
        self.take: Callable[[], dict[str, Tensor]] = lambda: bridge.outputs

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        return self.take()


# --- does the file say the same? ------------------------------------------------------------------------------------


class ParityError(ValueError):
    """A file does not do what the network does that it was made of."""


def check_onnx(model: Any, network: fx.GraphModule, batches: Sequence[Tensor]) -> dict[str, Any]:
    """How well ONNX Runtime's results of a file agree with PyTorch's: counts and differences.

    PyTorch is handed the file's spikes, layer after layer, so that one that fell to the other side of its threshold by
    rounding does not hide what comes after it. Comparisons of integers must agree in every spike. Those of real numbers
    must wherever the potential is further from its threshold than rounding reaches. The last values agree to 1e-3 of
    the largest, to 2e-2 where analogue values are rounded to 8 bits. To be seen every layer's spikes are made outputs,
    which can keep ONNX Runtime from joining two operations into one; the file itself is run as well, and must give the
    same but for what follows from such spikes: 20 % in the mean square at most, since a network may be sensitive.

    Args:
        model: of `to_onnx`.
        network: that it was made of.
        batches: images.

    Raises:
        ImportError: the package onnxruntime is not installed.
        ParityError: they differ; the message names the layer.
    """
    runtime, onnx = import_extra("onnxruntime"), import_extra("onnx")
    layers = [n for n in network.graph.nodes if isinstance(module_of(network, n), (ChannelThreshold, IntegerSpikes))]
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    exposed = copy.deepcopy(model)
    for node in layers:
        exposed.graph.output.append(onnx.helper.make_tensor_value_info(node.name, types[node.name], None))
    level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    open_session, session = _session(exposed.SerializeToString(), level), _session(model.SerializeToString(), level)
    names = [output.name for output in model.graph.output]
    # A real value that rounding takes to the next of 8 bits is off by one of 255 steps.
    tolerance = 0.02 if any(isinstance(layer, QuantisedReal) for layer in network.modules()) else 1e-3
    report = {"spikes": 0, "flipped_by_rounding": 0, "largest_difference": 0.0, "whole_difference": 0.0}
    for images in batches:
        entry = {"images": images.numpy()}
        results = [torch.from_numpy(value) for value in open_session.run(None, entry)]
        spikes = dict(zip((node.name for node in layers), results[len(names) :], strict=True))
        forced = _Forced(network, spikes)
        expected = _leaves(forced.run(images))
        report["spikes"] += sum(value.numel() for value in spikes.values())
        report["flipped_by_rounding"] += forced.flipped
        whole = [torch.from_numpy(value) for value in session.run(None, entry)]
        for name, ours, theirs, alone in zip(names, expected, results[: len(names)], whole, strict=True):
            difference = _difference(ours, theirs, f"output {name!r}")
            if difference > tolerance:
                raise ParityError(f"the file's output {name!r} differs from PyTorch's by {difference:.2g}")
            report["largest_difference"] = max(report["largest_difference"], difference)
            difference = ((theirs - alone).norm() / theirs.norm().clamp_min(1e-12)).item()
            if not difference <= 0.2:
                raise ParityError(f"the file's output {name!r} differs by {difference:.2g} once its layers are joined")
            report["whole_difference"] = max(report["whole_difference"], difference)
    return report


def _session(model: bytes, level: Any, threads: int = 0) -> Any:
    runtime = import_extra("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads = level, threads
    options.log_severity_level = 3
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return list(value.values() if isinstance(value, dict) else value)


def _difference(ours: Tensor, theirs: Tensor, name: str) -> float:
    """Largest difference over the largest absolute value.

    Raises:
        ParityError: shapes differ, or something is not finite.
    """
    if ours.shape != theirs.shape:
        raise ParityError(f"the file's {name} has the shape {tuple(theirs.shape)}, PyTorch's {tuple(ours.shape)}")
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        raise ParityError(f"{name} is not finite")
    scale = ours.abs().max().item() if ours.numel() else 0.0
    return (ours - theirs).abs().max().item() / (scale or 1.0) if ours.numel() else 0.0


class _Forced(fx.Interpreter):
    """The network with every layer's spikes taken from elsewhere, after a look at whether they could be its own."""

    def __init__(self, network: fx.GraphModule, spikes: dict[str, Tensor]) -> None:
        super().__init__(network)
        self.spikes, self.flipped = spikes, 0

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        ours = super().run_node(n)
        if n.name not in self.spikes:
            return ours
        theirs = self.spikes[n.name].to(ours.dtype)
        if ours.shape != theirs.shape:
            raise ParityError(f"{n.target}: shape {tuple(theirs.shape)} in the file, {tuple(ours.shape)} in PyTorch")
        different = ours != theirs
        layer = module_of(self.module, n)
        if isinstance(layer, ChannelThreshold):
            (x,), _ = self.fetch_args_kwargs_from_env(n)
            level = _columns(layer.threshold, x.dim())
            distance = (x * _columns(layer.sign, x.dim()) - level).abs()
            wrong = different & (distance > 1e-4 * (x.abs().max() + level.abs()))
        else:
            wrong = different
        if wrong.any():
            raise ParityError(
                f"{n.target}: {int(wrong.sum())} of {wrong.numel()} spikes differ between file and PyTorch"
            )
        self.flipped += int(different.sum())
        return theirs


# --- NIR ------------------------------------------------------------------------------------------------------------


def to_nir(network: fx.GraphModule, example: Tensor) -> Any:
    """An `nir.NIRGraph` of a folded network for images of one size: convolutions, thresholds without state, sums.

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
            kernel = size if isinstance(module, nn.AdaptiveAvgPool2d) else _pair(module.kernel_size)
            layer = self.nir.AvgPool2d(np.array(kernel), np.array(kernel), np.array([0, 0]))
            self.sources[node] = self._add(node.name, layer, self.sources[x])
        else:
            raise ValueError(f"NIR has nothing for {node.target} ({module})")

    def _threshold(
        self, name: str, layer: ChannelThreshold, sources: Sequence[str], shape: tuple[int, ...]
    ) -> list[str]:
        def everywhere(value: Tensor) -> np.ndarray:
            value = value.float()
            return _array(_columns(value, len(shape) + 1).expand(shape))

        if layer.has_falling:
            sources = self._add(f"{name}_turned", self.nir.Scale(everywhere(layer.sign)), sources)
        below = torch.nextafter(layer.threshold.float(), torch.full_like(layer.threshold, float("-inf")).float())
        return self._add(name, self.nir.Threshold(everywhere(below)), sources)

    def _pooled_threshold(self, node: fx.Node, layer: ChannelThreshold, pooled: fx.Node) -> list[str]:
        x, pool = pooled.args[0], module_of(self.network, pooled)
        spikes = self._threshold(f"{node.name}_each", layer, self.sources[x], self.shapes[x])
        # A turned comparison holds for the maximum if it holds for every cell, an ordinary one if it does for any.
        cells = int(np.prod(_pair(pool.kernel_size)))
        level = torch.where(layer.sign < 0, cells - 0.5, 0.5).float()
        if layer.has_falling and (pool.padding not in (0, (0, 0))):
            raise ValueError(f"NIR has nothing for {pooled.target}: a padded maximum in front of a turned comparison")
        return self._sum_pool(node, pooled, spikes, level)

    def _sum_pool(
        self, node: fx.Node, pooled: fx.Node, sources: Sequence[str], level: Tensor | None = None
    ) -> list[str]:
        """As `node`: are more of a window's spikes there than `level` (without it: than none)? `pooled` is the pool."""
        pool = module_of(self.network, pooled)
        level = torch.tensor(0.5) if level is None else level
        shape = self.shapes[pooled.args[0]]
        kernel, stride, padding = _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding)
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
        return self._add(node.name, self.nir.Threshold(_array(_columns(level, len(out) + 1).expand(out))), summed)


def _ungrouped(conv: nn.Conv2d) -> Tensor:
    """The weight of the same convolution with one group: the type check of NIR 1.0 knows no other."""
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
    """Outputs by name of an NIR graph of the nodes that `to_nir` makes; for checks, in the type of x, (N, ...).

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


def check_nir(graph: Any, written: Any, network: fx.GraphModule, images: Tensor) -> dict[str, Any]:
    """How well a graph that was read back agrees with the one written and, run in float64, with PyTorch.

    Raises:
        ParityError: they differ.
    """
    if set(graph.nodes) != set(written.nodes) or sorted(graph.edges) != sorted(written.edges):
        raise ParityError("the graph read back has other nodes or edges than the one written")
    numbers = 0
    for name, node in written.nodes.items():
        for key, value in vars(node).items():
            if isinstance(value, np.ndarray):
                numbers += value.size
                if not np.array_equal(value, getattr(graph.nodes[name], key)):
                    raise ParityError(f"{name}.{key} read back is not what was written")
    network = copy.deepcopy(network).double()
    with torch.no_grad():
        expected = network(images.double())
        results = run_nir(graph, images.double())
    expected = expected if isinstance(expected, dict) else {"": expected}
    largest = 0.0
    for key, ours in expected.items():
        name = f"output_{key}" if key else "output"
        difference = _difference(ours, results[name], f"output {name!r}")
        if difference > 1e-6:
            raise ParityError(f"the graph's output {name!r} differs from PyTorch's by {difference:.2g}")
        largest = max(largest, difference)
    return {"numbers_read_back": numbers, "largest_difference": largest}


# --- a run as a file ------------------------------------------------------------------------------------------------

Format = Literal["onnx", "torch", "nir"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2", "nir": ".nir"}
PACKAGES: dict[Format, tuple[str, ...]] = {"onnx": ("onnx", "onnxruntime"), "torch": (), "nir": ("nir",)}
METADATA_KEY = "hoyer_det"
NUM_CALIBRATION = {"classification": 256, "detection": 64}
PADDED = 32  # torchvision pads images to multiples of so many pixels
# Their outputs are scores and boxes, where 8 bits would show: they stay in floating point, over spikes too.
PREDICTIONS = ("cls_logits", "bbox_reg", "bbox_ctrness", "module_list")


def export_run(
    folder: str | Path,
    file_format: Format,
    out: str | Path | None = None,
    *,
    which: Weights = "last",
    int8: bool = False,
    analogue: bool = False,
    data_root: str | Path | None = None,
    num_calibration: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Writes a saved run's network as a file and, beside it, NAME.json that says what it takes and gives.

    The file is checked against PyTorch before it is written. A classifier, or the dense part of a RetinaNet, FCOS or
    SSD; as NIR what of a classifier, or of a detector's backbone up to the spikes that enter the pyramid, NIR can say:
    a ResNet from behind its stem, whose max-pool of real values NIR does not know.

    Args:
        folder: the run.
        file_format: "onnx", "torch" (torch.export, .pt2) or "nir".
        out: the file; None: model.onnx, model_int8.onnx, model.pt2 or model.nir in the run folder.
        which: which of its weights.
        int8: int8 weights and integer thresholds where layers see spikes; not for NIR.
        analogue: with `int8`: 8 bits for analogue convolutions, too, but the first and those of prediction.
        data_root: where the data lie now, from which `int8` takes training images; None: where they lay in training.
        num_calibration: training images for the thresholds; None: 256 for a classifier, 64 for a detector.
        height: of the images, which are then of this size only. None: free where the network permits.
        width: likewise; both or none.

    Returns:
        The file, and what NAME.json holds.

    Raises:
        FileExistsError: the file, or the .json beside it, exists already.
        FileNotFoundError: no such run, weights, or data.
        ImportError: a package is missing.
        ParityError: the file does not do what the network does; it is not written.
        ValueError: the run cannot be exported so.
    """
    run = Run.open(folder)
    if file_format not in SUFFIXES:
        raise ValueError(f"format {file_format!r} (allowed: {', '.join(SUFFIXES)})")
    for name in PACKAGES[file_format]:
        import_extra(name)
    path = Path(out) if out else run.folder / f"model{'_int8' if int8 else ''}{SUFFIXES[file_format]}"
    sidecar = path.with_name(f"{path.name}.json")
    for file in (path, sidecar):
        if file.exists():
            raise FileExistsError(f"{file} exists already; name another file with --out, or remove it first")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: there is no folder {path.parent}")
    if (height is None) != (width is None):
        raise ValueError("height and width of the images: both or none")
    if num_calibration is not None and num_calibration < 1:
        raise ValueError(f"--calibration {num_calibration}: at least one image is needed")
    if analogue and not int8:
        raise ValueError("--analogue-int8 goes with --int8")
    if int8 and file_format == "nir":
        raise ValueError("--int8: NIR has no integers (allowed with onnx and torch)")
    model = load_model(run, which).float().to(memory_format=torch.contiguous_format)
    if int8 and not any(isinstance(module, backbones.HoyerSpike) for module in model.modules()):
        raise ValueError(f"--int8: {folder} has no spike layers; integers add up spikes")
    config = run.config.model_copy(deep=True)
    if data_root is not None:
        config.data.root = Path(data_root)

    size, free = _sizes(config, model, height, width)
    example = _noise(1, size)
    description: dict[str, Any] = {
        "format": file_format,
        "task": config.task,
        "run": run.folder.name,
        "weights": which,
        "weights_sha256": run.checksums()[f"{which}.safetensors"],
        "classes": list(config.data.classes),
        "int8": int8,
        "analogue_int8": analogue,
        "model": config.model.model_dump(mode="json"),
        "versions": _versions("torch", "torchvision", *PACKAGES[file_format]),
    }
    if file_format == "nir":
        network, example, entry = _nir_network(model, config, example)
        description |= {"inputs": {"input": entry}, "outputs": "an Output node for each map, or for the logits"}
        content, parity = _nir_bytes(network, example)
    else:
        network, outputs, meaning = _network(model, config)
        free = free and not any(
            isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size not in (1, (1, 1))
            for layer in network.modules()
        )
        calibration = None
        if int8:
            number = num_calibration or NUM_CALIBRATION[config.task]
            calibration = calibration_images(config, model, number, None if free else size)
            network = to_integers(
                network, calibration, keep=PREDICTIONS if config.task == "detection" else (), analogue=analogue
            )
            description["calibration_images"] = len(calibration)
        elif not free:
            network = fix_size(network, example)
        description |= {
            "inputs": {"images": _describe_input(config, size, free)},
            "outputs": {name: meaning[name] for name in outputs},
        }
        batches = [example, _noise(3, (size[0] // 2 + 33, size[1] // 2 + 65) if free else size)]
        if calibration is not None:
            batches.append(calibration[:2])
        if file_format == "onnx":
            description["opset"] = OPSET
            metadata = {
                METADATA_KEY: json.dumps(description),
                "description": _describe_input(config, size, free)["meaning"],
            }
            file = to_onnx(network, dynamic_size=free, example=example, outputs=outputs, metadata=metadata)
            parity = check_onnx(file, network, batches)
            content = file.SerializeToString()
        else:
            content, parity = _torch_bytes(network, batches, free)
    description |= {"parity": parity, "file": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    write_whole(path, content)
    write_whole(sidecar, (json.dumps(description, indent=2) + "\n").encode())
    return path, description


def _sizes(config: Recipe, model: nn.Module, height: int | None, width: int | None) -> tuple[tuple[int, int], bool]:
    """Size of the images, and whether others are possible as far as the options go."""
    if height is not None and width is not None:
        body = model.backbone if isinstance(config, ClassificationConfig) else model.backbone.body
        stride = body.feature_info[-1].stride
        if min(height, width) < stride:
            raise ValueError(f"--height {height} --width {width}: at least {stride}, the network's last stride")
        return (height, width), False
    if isinstance(config, ClassificationConfig):
        return (config.data.size, config.data.size), True
    if config.model.detector == "ssd":
        return (config.model.max_size, config.model.max_size), True
    short, long = (-(-side // PADDED) * PADDED for side in (max(config.model.min_size), config.model.max_size))
    return (short, long), True


def _noise(number: int, size: tuple[int, int]) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] of coarse and fine noise, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(number, 3, 5, 5, generator=generator)
    fine = torch.rand(number, 3, *size, generator=generator)
    return 0.7 * F.interpolate(coarse, size, mode="bilinear") + 0.3 * fine


def _network(model: nn.Module, config: Recipe) -> tuple[fx.GraphModule, list[str], dict[str, str]]:
    """The folded network over images in [0, 1], the names of its outputs, and what they mean."""
    if isinstance(config, ClassificationConfig):
        network = fold(Normalised(model, config.data.mean, config.data.std))
        return network, ["logits"], {"logits": "(N, K) float32, in the order of classes"}
    dense = DensePredictions(model)
    meaning = {
        "cls_logits": "(N, A, K + 1) float32: for each anchor, finest level first, background and classes",
        "bbox_regression": "(N, A, 4) float32: offsets from the anchors as torchvision encodes them",
        "bbox_ctrness": "(N, A, 1) float32: centredness logits",
    }
    return fold(Normalised(dense, config.model.mean, config.model.std)), dense.outputs, meaning


def _describe_input(config: Recipe, size: tuple[int, int], free: bool) -> dict[str, Any]:
    meaning = "RGB in [0, 1], normalised inside"
    if isinstance(config, Config):
        meaning += (
            f"; resized (shorter side {list(config.model.min_size)}, longer at most {config.model.max_size}) and "
            f"padded at the right and below with the mean colour {list(config.model.mean)} to multiples of {PADDED}, "
            "which detection.export.OnnxDetector does"
        )
    sides: list[str | int] = ["height", "width"] if free else list(size)
    return {"shape": ["N", 3, *sides], "type": "float32", "meaning": meaning}


def _versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}


def calibration_images(config: Recipe, model: nn.Module, number: int, size: tuple[int, int] | None = None) -> Tensor:
    """Training images (N, 3, H, W) without augmentation, RGB in [0, 1], as the exported network takes them.

    Args:
        config: of the run; its data are read.
        model: of the run, whose transform resizes a detector's images.
        number: how many, drawn at random, always the same; all there are, if that is less.
        size: (H, W); None: that of the recipe.
    """
    generator = torch.Generator().manual_seed(0)
    if isinstance(config, ClassificationConfig):
        data = config.data
        if in_memory(config):
            pixels = read_images(data, "train").pixels
            images = pixels[torch.randperm(len(pixels), generator=generator)[:number]].float() / 255
        else:
            files = read_folder(data.root / data.train, data.classes)
            dataset = FolderImages(files, data, train=False)
            chosen = torch.randperm(len(files.files), generator=generator)[:number].tolist()
            mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
            images = torch.stack([dataset[index][0] for index in chosen]) * std + mean
    else:
        train, _ = build_datasets(config.data)
        plain = DetectionDataset(train.annotations)
        chosen = torch.randperm(len(plain), generator=generator)[:number].tolist()
        images = resize_and_pad(model.transform, [plain[index][0] for index in chosen])
    if size is not None and tuple(images.shape[2:]) != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    return images


def resize_and_pad(transform: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """Images of any size as a batch for an exported detector: in [0, 1], padded with the mean colour.

    Args:
        transform: of a torchvision detector.
        images: (3, H_i, W_i) in [0, 1].
    """
    shifting = copy.copy(transform)
    shifting.image_std = [1.0, 1.0, 1.0]
    mean = torch.tensor(transform.image_mean).view(3, 1, 1)
    return shifting.eval()(list(images))[0].tensors + mean


def _torch_bytes(network: fx.GraphModule, batches: Sequence[Tensor], free: bool) -> tuple[bytes, dict[str, Any]]:
    """A program of torch.export, and how well it agrees with the network once read back."""
    automatic = torch.export.Dim.AUTO
    dynamic = {0: automatic, 2: automatic, 3: automatic} if free else {0: automatic}
    several = batches[1]  # a batch of one would be taken for the only size
    program = torch.export.export(network, (several,), dynamic_shapes=(dynamic,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    largest = 0.0
    with torch.no_grad():
        for images in batches:
            for number, (ours, theirs) in enumerate(
                zip(_leaves(network(images)), _leaves(loaded(images)), strict=True)
            ):
                difference = _difference(ours, theirs, f"output {number}")
                if difference > 1e-3:
                    raise ParityError(f"the program's output {number} differs from the network's by {difference:.2g}")
                largest = max(largest, difference)
    return buffer.getvalue(), {"largest_difference": largest}


class _EnteringSpikes(nn.Module):
    """A detector's backbone up to what enters its pyramid."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.body, neck = backbone.body, backbone.neck
        self.entering = neck.leaving[: len(backbone.levels)] if hasattr(neck, "leaving") else neck.laterals
        self.levels = backbone.levels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        return {name: layer(maps[name]) for name, layer in zip(self.levels, self.entering, strict=True)}


def _nir_network(model: nn.Module, config: Recipe, example: Tensor) -> tuple[fx.GraphModule, Tensor, str]:
    """What of a network NIR can say, an input of it, and what that input is."""
    model = copy.deepcopy(model)
    if isinstance(config, ClassificationConfig):
        body, network, colours = model.backbone, model, config.data
    else:
        body, network, colours = model.backbone.body, _EnteringSpikes(model.backbone), config.model
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (colours.mean, colours.std))
    x = (example - mean) / std
    meaning = f"RGB in [0, 1], less {list(colours.mean)}, divided by {list(colours.std)}"
    stem = getattr(body, "stem", None)
    if isinstance(stem, nn.Sequential) and any(isinstance(layer, nn.MaxPool2d) for layer in stem):
        with torch.no_grad():
            x = stem(x)
        body.stem = nn.Identity()
        meaning = f"what the stem gives: membrane potentials, of {meaning}"
    return fold(network), x, meaning


def _nir_bytes(network: fx.GraphModule, example: Tensor) -> tuple[bytes, dict[str, Any]]:
    nir = import_extra("nir")
    graph = to_nir(network, example)
    buffer = io.BytesIO()
    nir.write(buffer, graph)
    parity = check_nir(nir.read(io.BytesIO(buffer.getvalue())), graph, fix_size(network, example), example)
    return buffer.getvalue(), parity


class OnnxDetector:
    """Detections of an ONNX file by `export_run`: sizes, anchors and boxes by torchvision, the rest by ONNX Runtime.

    Args:
        path: the file.
        threads: of ONNX Runtime; 0: its own choice.

    Attributes:
        class_names: of the labels 1..K.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the package onnxruntime is not installed.
        ValueError: no detector of this project.
    """

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        path, runtime = Path(path), import_extra("onnxruntime")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            self.session = _session(path.read_bytes(), runtime.GraphOptimizationLevel.ORT_ENABLE_ALL, threads)
        except Exception as error:  # its errors share no class but this one
            raise ValueError(f"{path}: damaged, or no ONNX file ({str(error).splitlines()[0]})") from None
        self.path = path
        text = self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        description = json.loads(text) if text else {}
        if description.get("task") != "detection":
            raise ValueError(f"{path}: not a detector exported by this project")
        self.class_names = tuple(description["classes"])
        recipe = {
            "model": description["model"] | {"backbone": description["model"]["backbone"] | {"weights": None}},
            "data": {"format": "synthetic", "classes": description["classes"]},
        }
        self.names = [output.name for output in self.session.get_outputs()]
        self.detector = DetectorOf(build_detector(Config.model_validate(recipe)), self._run)

    def predict(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Boxes (M, 4) in pixels of each image, scores (M,) and labels (M,) in 1..K, as torchvision's detectors.

        Args:
            images: (3, H_i, W_i) in [0, 1].

        Raises:
            ValueError: the file is for images of one size, and these have another.
        """
        return self.detector(images)

    __call__ = predict

    def _run(self, batch: Tensor) -> dict[str, Tensor]:
        wanted = self.session.get_inputs()[0].shape[2:]
        if any(isinstance(side, int) and side != have for side, have in zip(wanted, batch.shape[2:], strict=True)):
            raise ValueError(
                f"{self.path}: for batches of {wanted[0]}x{wanted[1]} pixels, these images are resized and padded to "
                f"{batch.shape[2]}x{batch.shape[3]}; export without --height and --width"
            )
        results = self.session.run(None, {"images": batch.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(self.names, results, strict=True)}
