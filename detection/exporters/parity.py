"""Checks that a file gives what PyTorch gives."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from backbones.deploy.fold import ChannelThreshold, channels_first, module_of
from backbones.deploy.integer import IntegerSpikes, QuantisedReal
from detection.exporters.common import ParityError, difference_of, import_extra, open_session
from detection.exporters.nir import run_nir


def check_onnx(model: Any, network: fx.GraphModule, batches: Sequence[Tensor]) -> dict[str, Any]:
    """Return how well ONNX Runtime's results of a file agree with PyTorch's: counts and differences.

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
    seen = open_session(exposed.SerializeToString(), level)
    session = open_session(model.SerializeToString(), level)
    names = [output.name for output in model.graph.output]
    # A real value that rounding takes to the next of 8 bits is off by one of 255 steps.
    tolerance = 0.02 if any(isinstance(layer, QuantisedReal) for layer in network.modules()) else 1e-3
    report = {"spikes": 0, "flipped_by_rounding": 0, "largest_difference": 0.0, "whole_difference": 0.0}
    for images in batches:
        entry = {"images": images.numpy()}
        results = [torch.from_numpy(value) for value in seen.run(None, entry)]
        spikes = dict(zip((node.name for node in layers), results[len(names) :], strict=True))
        forced = _Forced(network, spikes)
        expected = tree_leaves(forced.run(images))
        report["spikes"] += sum(value.numel() for value in spikes.values())
        report["flipped_by_rounding"] += forced.flipped
        whole = [torch.from_numpy(value) for value in session.run(None, entry)]
        for name, ours, theirs, alone in zip(names, expected, results[: len(names)], whole, strict=True):
            difference = difference_of(ours, theirs, f"output {name!r}")
            if difference > tolerance:
                raise ParityError(f"the file's output {name!r} differs from PyTorch's by {difference:.2g}")
            report["largest_difference"] = max(report["largest_difference"], difference)
            difference = ((theirs - alone).norm() / theirs.norm().clamp_min(1e-12)).item()
            if not difference <= 0.2:
                raise ParityError(f"the file's output {name!r} differs by {difference:.2g} once its layers are joined")
            report["whole_difference"] = max(report["whole_difference"], difference)
    return report


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
        wrong = different
        if isinstance(layer, ChannelThreshold):
            (x,), _ = self.fetch_args_kwargs_from_env(n)
            level = channels_first(layer.threshold, x.dim())
            distance = (x * channels_first(layer.sign, x.dim()) - level).abs()
            wrong = different & (distance > 1e-4 * (x.abs().max() + level.abs()))
        if number := int(wrong.sum()):
            raise ParityError(f"{n.target}: {number} of {wrong.numel()} spikes differ between file and PyTorch")
        self.flipped += int(different.sum())
        return theirs


def check_nir(graph: Any, written: Any, network: fx.GraphModule, images: Tensor) -> dict[str, Any]:
    """Return how well a graph that was read back agrees with the one written and, run in float64, with PyTorch.

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
        difference = difference_of(ours, results[name], f"output {name!r}")
        if difference > 1e-6:
            raise ParityError(f"the graph's output {name!r} differs from PyTorch's by {difference:.2g}")
        largest = max(largest, difference)
    return {"numbers_read_back": numbers, "largest_difference": largest}
