"""The way of tensors in one pass: what takes the output of each layer with weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ..activations import RepeatChannels
from ..multistep import RepeatSteps

# What may lie between a layer with weights and the spike layer that takes its output: all of it is done on the way.
TRANSPARENT = (
    RepeatChannels,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.GroupNorm,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Flatten,
    nn.Identity,
    RepeatSteps,
)
PRODUCTS = {"conv1d", "conv2d", "conv3d", "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm"}
PRODUCTS |= {"baddbmm", "einsum", "scaled_dot_product_attention", "multi_head_attention_forward", "tensordot", "inner"}
PRODUCTS |= {"mv", "addmv", "addbmm", "bilinear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}


class Destination(NamedTuple):
    """Takers of the output of a layer with weights.

    Attributes:
        spikes: spike layers that take it straight.
        bits: that leave per output neuron, those of a spike for each neuron of these; None where something else takes
            it too.
    """

    spikes: list[str]
    bits: float | None


@dataclass
class _Output:
    """What became of one output of a convolution or linear layer."""

    num: int
    takers: list[str] = field(default_factory=list)
    bits: int = 0
    elsewhere: bool = False


class Flow(TorchFunctionMode):
    """Follows tensors through one pass, by identity: which spike layers and what else take a layer's output.

    A tensor is taken elsewhere if a layer with weights gets it, or any function that makes a tensor of it, outside of
    the modules that are followed.

    Args:
        layers: names of the layers with weights.
        spike_layers: bits of a spike by the names of the spike layers.
        named: modules whose products are not told, as their own names are.

    Attributes:
        feeds: {spike layer: the first layer with weights that takes its output}.
        takes: {layer with weights: the spike layer whose output it takes first}.
        products: names of functions that multiply outside of the layers, nobody knows what.
    """

    def __init__(self, layers: Collection[str], spike_layers: Mapping[str, int], named: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers, self.spike_layers = layers, spike_layers
        self.named = {id(each) for module in named for each in module.parameters(recurse=False)}
        self.inside = 0  # of how many followed modules
        self.outputs: dict[str, list[_Output]] = {}
        self.origins = WeakTensorKeyDictionary()  # tensor -> _Output
        self.copies = WeakTensorKeyDictionary()  # tensor -> how many times it has each value of its origin
        self.spikes = WeakTensorKeyDictionary()  # tensor -> name of the spike layer
        self.feeds: dict[str, str] = {}
        self.takes: dict[str, str] = {}
        self.products: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside and next(_tensors(result), None) is not None:  # x.shape and the like give no tensor
            self.use_elsewhere((args, kwargs))
            if self.named.isdisjoint(map(id, _tensors((args, kwargs)))):
                self.products |= {getattr(func, "__name__", "")} & PRODUCTS
        return result

    def use_elsewhere(self, values: Any) -> None:
        for tensor in _tensors(values):
            if tensor in self.origins:
                self.origins[tensor].elsewhere = True

    def enter(self, name: str, x: Tensor) -> None:
        self.inside += 1
        if name in self.layers:
            self.use_elsewhere(x)
            if x in self.spikes:
                self.feeds.setdefault(self.spikes[x], name)
                self.takes.setdefault(name, self.spikes[x])
        elif name in self.spike_layers and x in self.origins:
            self.origins[x].takers.append(name)
            self.origins[x].bits += self.spike_layers[name] * self.copies.get(x, 1)

    def leave(self, name: str, x: Tensor, output: Tensor) -> None:
        if name in self.layers:
            self.origins[output] = _Output(output.numel())
            self.outputs.setdefault(name, []).append(self.origins[output])
        elif name in self.spike_layers:
            self.spikes[output] = name
        else:  # nothing but a way to the next layer, or to several neurons for each potential
            self.copies[output] = self.copies.get(x, 1) * max(1, output[:1].numel() // max(1, x[:1].numel()))
            for table in (self.origins, self.spikes):
                if x in table:
                    table[output] = table[x]
        self.inside -= 1

    def finish(self, output: Any) -> dict[str, Destination]:
        """Return where the output of each layer went, given that of the whole network, which is used elsewhere."""
        self.use_elsewhere(output)
        found = {}
        for name, outputs in self.outputs.items():
            num, bits = sum(output.num for output in outputs), None
            if num and all(output.takers and not output.elsewhere for output in outputs):
                bits = sum(output.num * output.bits for output in outputs) / num
            takers = [taker for output in outputs for taker in output.takers]
            found[name] = Destination(list(dict.fromkeys(takers)), bits)
        return found


def _tensors(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))
