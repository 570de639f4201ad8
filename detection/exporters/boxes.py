"""Padding, decoding and non-maximum suppression inside of an ONNX file: images in, boxes out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detection.exporters.common import ParityError, import_extra, open_session

OUTPUTS = {
    "boxes": "(M, 4) float32: x1 y1 x2 y2 in pixels of the image that the file is given, best score first",
    "scores": "(M,) float32 in [0, 1]",
    "labels": "(M,) int64 in 1..K; label k is classes[k - 1]",
}
ALL = 2**31 - 1


def add_boxes(model: Any, decoding: Mapping[str, Any], num_classes: int, size: Sequence[int | str]) -> Any:
    """Return an `onnx.ModelProto` that gives boxes, scores and labels (`OUTPUTS`) of one image, (1, C, H, W) in [0, 1].

    The image is padded inside. What is not done is to resize it: boxes are those that the detector finds in what it is
    given.

    Args:
        model: of `to_onnx`, of a detector's `DensePredictions`.
        decoding: of `describe_decoding`; with "noise", normal noise is added to the logits, see `check_boxes`.
        num_classes: K, the background not among them.
        size: height and width of the image; names where they are free.

    Raises:
        ImportError: the package onnx is not installed.
    """
    onnx = import_extra("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    before, after = _Nodes(onnx, "before"), _Nodes(onnx, "after")
    _pad(before, decoding)
    _find(after, decoding, num_classes)
    whole = copy.deepcopy(model)
    for node in whole.graph.node:
        node.input[:] = ["padded" if name == "images" else name for name in node.input]
    nodes = [*before.nodes, *whole.graph.node, *after.nodes]
    del whole.graph.node[:], whole.graph.output[:], whole.graph.input[:], whole.graph.value_info[:]
    whole.graph.node.extend(nodes)
    whole.graph.initializer.extend([*before.initializers, *after.initializers])
    channels = len(decoding["pad_colour"])
    whole.graph.input.append(helper.make_tensor_value_info("images", types.FLOAT, [1, channels, *size]))
    kinds = {"boxes": (types.FLOAT, ["M", 4]), "scores": (types.FLOAT, ["M"]), "labels": (types.INT64, ["M"])}
    whole.graph.output.extend(helper.make_tensor_value_info(name, *kinds[name]) for name in OUTPUTS)
    whole = onnx.shape_inference.infer_shapes(whole)
    onnx.checker.check_model(whole, full_check=True)
    return whole


def check_boxes(
    model: Any, dense: Sequence[str], around: Callable[[Callable[[Tensor], dict[str, Tensor]]], Any], image: Tensor
) -> dict[str, int]:
    """Return how many boxes of a file are those that torchvision makes of the same outputs of its head.

    Noise on the logits keeps scores apart: of equal ones the two may choose different boxes, and both be right.

    Args:
        model: of `add_boxes`, with a score threshold of 0, for many boxes, and with noise.
        dense: names of the outputs of the head.
        around: a function that computes them for a padded batch -> the detector around it, see `Task.model_around`.
        image: (1, C, H, W) in [0, 1].

    Raises:
        ParityError: more than one in fifty differs.
    """
    runtime, onnx = import_extra("onnxruntime"), import_extra("onnx")
    exposed = copy.deepcopy(model)
    names = ["noisy_logits" if each == "cls_logits" else each for each in dense]
    exposed.graph.output.extend(onnx.helper.make_tensor_value_info(each, 1, None) for each in names)
    session = open_session(exposed.SerializeToString(), runtime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    values = map(torch.from_numpy, session.run(None, {"images": image.numpy()}))
    found = dict(zip([*OUTPUTS, *dense], values, strict=True))
    expecting = around(lambda batch: {name: found[name] for name in dense})
    detector, sides = expecting.detector, image.shape[2:]
    detector.score_thresh, detector.transform.min_size, detector.transform.max_size = 0.0, (min(sides),), max(sides)
    (expected,) = expecting([image[0]])
    same = (found["boxes"][:, None] - expected["boxes"]).abs().amax(2) < 1e-3 * max(sides)
    same &= (found["scores"][:, None] - expected["scores"]).abs() < 1e-4
    same &= found["labels"][:, None] == expected["labels"]
    number, equal = len(expected["scores"]), int(same.any(0).sum())
    if len(found["scores"]) != number or equal < 0.98 * number:
        raise ParityError(f"of {number} boxes {equal} are among the file's {len(found['scores'])}")
    return {"boxes": number, "equal_boxes": equal}


class _Nodes:
    """Nodes of ONNX, one call each: operation, inputs (names, or numbers, which become constants) -> output's name."""

    def __init__(self, onnx: Any, prefix: str) -> None:
        self.onnx, self.prefix = onnx, prefix
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def __call__(self, operation: str, *inputs: Any, name: str = "", **attributes: Any) -> str:
        return self.several(operation, *inputs, names=[name], **attributes)[0]

    def several(self, operation: str, *inputs: Any, names: Sequence[str], **attributes: Any) -> list[str]:
        """Return the names of all outputs, new ones where they are empty."""
        place = f"{self.prefix}_{len(self.nodes)}_{operation}"
        outputs = [name or f"{place}_{number}" for number, name in enumerate(names)]
        entering = [x if isinstance(x, str) else self._constant(x) for x in inputs]
        self.nodes.append(self.onnx.helper.make_node(operation, entering, outputs, name=place, **attributes))
        return outputs

    def real(self, x: str) -> str:
        """Return integers as float32."""
        return self("Cast", x, to=self.onnx.TensorProto.FLOAT)

    def part(self, x: str, start: int, end: int, axis: int = 0) -> str:
        """Return x[start:end] along an axis."""
        return self("Slice", x, [start], [end], [axis])

    def at_most(self, x: str, most: int) -> str:
        """Return the length of a vector, as a vector of one, or `most` where it is longer."""
        return self("Min", self("Shape", x), [most])

    def _constant(self, value: Any) -> str:
        array = np.asarray(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        name = f"{self.prefix}_constant_{len(self.initializers)}"
        self.initializers.append(self.onnx.numpy_helper.from_array(array, name))
        return name


def _pad(g: _Nodes, decoding: Mapping[str, Any]) -> None:
    """Pad "images" with a colour, exactly as the detector does, and call that "padded"; "size" is the image's."""
    size, step = g("Slice", g("Shape", "images"), [2], [4], name="size"), decoding["pad_to"]
    missing = g("Mod", g("Sub", step, g("Mod", size, step)), step)
    filled = g("Pad", "images", g("Concat", [0] * 6, missing, axis=0), -1.0)
    colour = np.array(decoding["pad_colour"], np.float32).reshape(1, -1, 1, 1)
    g("Where", g("Less", filled, 0.0), colour, filled, name="padded")


def _find(g: _Nodes, decoding: Mapping[str, Any], num_classes: int) -> None:
    """Turn the head's outputs into `OUTPUTS`, for one image."""
    levels = [_anchors(g, level, decoding) for level in decoding["levels"]]
    anchors = g("Concat", *levels, axis=0)
    logits = "cls_logits"
    if decoding.get("noise"):
        logits = g("Add", logits, g("RandomNormalLike", logits, seed=0.0), name="noisy_logits")
    scores = g("Squeeze", logits, [0])
    scores = g("Softmax", scores, axis=1) if decoding["activation"] == "softmax" else g("Sigmoid", scores)
    if "bbox_ctrness" in decoding["activation"]:
        scores = g("Sqrt", g("Mul", scores, g("Sigmoid", g("Squeeze", "bbox_ctrness", [0]))))
    scores = g.part(scores, decoding["background_column"] + 1, ALL, axis=1)  # (A, K)
    offsets, number = g("Squeeze", "bbox_regression", [0]), decoding["candidates"]
    if decoding["candidates_per"] == "class":
        scores = g("Transpose", scores, perm=[1, 0])
        most = g("Min", g.part(g("Shape", scores), 1, 2), [number])
        best, _ = g.several("TopK", scores, most, names=["", ""], axis=1)
        least = g("ReduceMin", best, axes=[1], keepdims=1)
        scores = g("Where", g("Less", scores, least), -1.0, scores)
    else:
        scores, rows = _best_of_levels(g, scores, levels, number, num_classes)
        offsets, anchors = g("Gather", offsets, rows), g("Gather", anchors, rows)
    boxes = _decode(g, offsets, anchors, decoding["box_coder"])
    limits = g.real(g("Gather", "size", [1, 0, 1, 0]))
    boxes = g("Min", g("Max", boxes, 0.0), limits)
    limit, thresholds = decoding["max_detections"], [[decoding["nms_threshold"]], [decoding["score_threshold"]]]
    kept = g("NonMaxSuppression", g("Unsqueeze", boxes, [0]), g("Unsqueeze", scores, [0]), [limit], *thresholds)
    found = g("GatherND", scores, g.part(kept, 1, 3, axis=1))
    _, order = g.several("TopK", found, g.at_most(found, limit), names=["scores", ""])
    g("Gather", boxes, g("Gather", g("Gather", kept, 2, axis=1), order), name="boxes")
    g("Add", g("Gather", g("Gather", kept, 1, axis=1), order), 1, name="labels")


def _anchors(g: _Nodes, level: Mapping[str, Any], decoding: Mapping[str, Any]) -> str:
    """Return the anchors of a level (A, 4) for what is "padded"."""
    size, stride = g.part(g("Shape", "padded"), 2, 4), level["stride"]
    cells = level["cells"] if "cells" in level else g("Div", g("Add", size, stride - 1), stride)
    cells = g("Identity", cells)
    whole = decoding["anchor_step"] == "integer"
    steps = g.real(g("Div", size, cells)) if whole else g("Div", g.real(size), g.real(cells))
    places = []
    for axis, sides, shape in ((0, [0.0, 1, 0, 1], [-1, 1, 1, 1]), (1, [1.0, 0, 1, 0], [1, -1, 1, 1])):
        numbers = g.real(g("Range", 0, g("Gather", cells, axis), 1))
        centres = g("Mul", g("Add", numbers, float(decoding["anchor_offset"])), g("Gather", steps, axis))
        places.append(g("Mul", g("Reshape", centres, shape), sides))
    anchors = np.array(level["anchors"], np.float32)
    return g("Reshape", g("Add", g("Add", *places), anchors), [-1, 4])


def _best_of_levels(g: _Nodes, scores: str, levels: Sequence[str], number: int, num_classes: int) -> tuple[str, str]:
    """Return the best scores of each level as (K, M), -1 but in the class of each, and the rows that they are from."""
    lengths = [g("Mul", g.part(g("Shape", level), 0, 1), num_classes) for level in levels]
    flat = g("Reshape", scores, [-1])
    parts = g.several("Split", flat, g("Concat", *lengths, axis=0), names=[""] * len(levels), axis=0)
    values, places, start = [], [], g("Identity", [0])
    for part, length in zip(parts, lengths, strict=True):
        best, index = g.several("TopK", part, g.at_most(part, number), names=["", ""])
        values.append(best)
        places.append(g("Add", index, start))
        start = g("Add", start, length)
    place = g("Concat", *places, axis=0)
    of_class = g("Equal", g("Mod", place, num_classes), np.arange(num_classes)[:, None])
    return g("Where", of_class, g("Concat", *values, axis=0), -1.0), g("Div", place, num_classes)


def _decode(g: _Nodes, offsets: str, anchors: str, coder: Mapping[str, Any]) -> str:
    """Return boxes (M, 4) of offsets from anchors."""
    low, high = g.part(anchors, 0, 2, axis=1), g.part(anchors, 2, 4, axis=1)
    side = g("Sub", high, low)
    centre = g("Add", low, g("Mul", side, 0.5))
    if coder["kind"] == "distances":
        first, last = (g("Mul", g.part(offsets, *ends, axis=1), side) for ends in ((0, 2), (2, 4)))
    else:
        offsets = g("Div", offsets, [float(weight) for weight in coder["weights"]])
        centre = g("Add", centre, g("Mul", g.part(offsets, 0, 2, axis=1), side))
        growth = g("Exp", g("Min", g.part(offsets, 2, 4, axis=1), float(coder["max_log_scale"])))
        first = last = g("Mul", g("Mul", growth, side), 0.5)
    return g("Concat", g("Sub", centre, first), g("Add", centre, last), axis=1)
