"""The way of tensors in one pass: what takes the output of each layer with weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from .operations import Measurement, WeightedLayer


@dataclass
class _Output:
    """What became of one output of a convolution or linear layer."""

    layer: WeightedLayer
    num: int
    takers: list[str] = field(default_factory=list)
    elsewhere: bool = False


class Flow(TorchFunctionMode):
    """Follows tensors through one pass, by identity: which spike layers and what else take a layer's output.

    A tensor is taken elsewhere if a layer with weights gets it, or any function that makes a tensor of it, outside of
    the modules that are followed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0  # of how many followed modules
        self.outputs: list[_Output] = []
        self.origins = WeakTensorKeyDictionary()  # tensor -> _Output
        self.spikes = WeakTensorKeyDictionary()  # tensor -> name of the spike layer
        self.used: set[str] = set()
        self.feeds: dict[str, list[str]] = {}  # layer -> spike layers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside and next(_tensors(result), None) is not None:  # x.shape and the like give no tensor
            self.use_elsewhere((args, kwargs))
        return result

    def use_elsewhere(self, values: Any) -> None:
        for tensor in _tensors(values):
            if tensor in self.origins:
                self.origins[tensor].elsewhere = True

    def enter_layer(self, layer: WeightedLayer, x: Tensor) -> None:
        self.use_elsewhere(x)
        name = self.spikes.get(x)
        if name is not None and name not in self.used:
            self.used.add(name)
            self.feeds.setdefault(layer.name, []).append(name)

    def leave_layer(self, layer: WeightedLayer, output: Tensor) -> None:
        self.origins[output] = _Output(layer, output.numel())
        self.outputs.append(self.origins[output])

    def enter_spikes(self, name: str, u: Tensor) -> None:
        if u in self.origins:
            self.origins[u].takers.append(name)

    def pass_on(self, x: Tensor, output: Tensor) -> None:
        for table in (self.origins, self.spikes):
            if x in table:
                table[output] = table[x]

    def describe(self, measured: Measurement) -> None:
        """Write what was found into the layers."""
        for name, spikes in self.feeds.items():
            measured.layers[name].spikes_from = spikes
        by_layer: dict[str, list[_Output]] = {}
        for output in self.outputs:
            by_layer.setdefault(output.layer.name, []).append(output)
        for name, outputs in by_layer.items():
            layer = measured.layers[name]
            layer.spikes_to = list(dict.fromkeys(taker for output in outputs for taker in output.takers))
            num = sum(output.num for output in outputs)
            if num and all(output.takers and not output.elsewhere for output in outputs):
                layer.output_bits = sum(output.num * len(output.takers) for output in outputs) / num


def _tensors(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
