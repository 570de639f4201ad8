"""The contract of a spiking neuron, the one way to find the spike layers of a model, and the registry of neurons."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class SpikeLayer(nn.Module):
    """Base of every layer of neurons that fire: membrane potential u -> spikes, in u's shape and dtype.

    Subclasses define `forward` and `threshold`. A layer with a term of its own in the loss sets `has_penalty` and calls
    `add_penalty` in every training pass with gradients.

    Shape: (N, C, *) -> (N, C, *), also (N, C).

    Attributes:
        levels: number of values that a spike can take; 2 are 0 and 1.
        has_penalty: whether the layer has a term in the loss.
        sync: whether statistics of a training pass are taken over the batches of all processes.
        time_steps: steps in the first dimension of its input, see `backbones.multistep`.
    """

    levels: int = 2
    time_steps: int = 1
    has_penalty: bool = False
    sync: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.drop_penalty()

    @property
    def threshold(self) -> Tensor:
        """Potential from which on a neuron fires in evaluation, shape () or (C,)."""
        raise NotImplementedError

    @property
    def binary(self) -> bool:
        """Whether spikes are 0 and 1 alone."""
        return self.levels == 2

    def fold_threshold(self) -> Tensor:
        """Return `threshold` in float64, for `backbones.fold`, which makes one comparison of the layer.

        Raises:
            ValueError: the layer has more levels than 0 and 1.
        """
        if not self.binary:
            raise ValueError(f"{type(self).__name__} has {self.levels} levels: one comparison gives 0 and 1 alone")
        return self.threshold.detach().double()

    def broadcast(self, value: Tensor, u: Tensor) -> Tensor:
        """Return a value of shape () or (C,) in a shape that broadcasts to the potential u."""
        return value.view(-1, *[1] * (u.dim() - 2)) if value.dim() else value

    def membrane(self, u: Tensor) -> Tensor:
        """Return what is compared with `threshold` in evaluation, in u's shape: in one time step u itself."""
        return u

    def logged(self) -> dict[str, float]:
        """Scalars of the layer's state that the log of an epoch has, by name."""
        return {}

    def add_penalty(self, penalty: Tensor, neurons: int | Tensor) -> None:
        """Add a pass's term, shape (), taken over so many neurons, to what `take_penalty` gives next.

        Terms that nobody took before the backward pass of their loss go, and with them their graph. What a backward
        pass computes again adds nothing.
        """
        if is_recomputed():
            return
        if self._over:
            self.drop_penalty()
        if not torch.compiler.is_compiling() and penalty.grad_fn is not None:
            penalty.grad_fn.register_hook(lambda *gradients, over=self._over: over.append(True))
        self._penalty = penalty if self._penalty is None else self._penalty + penalty
        self._neurons = self._neurons + neurons

    def drop_penalty(self) -> None:
        """Forget the terms of passes that nothing comes of."""
        self._penalty: Tensor | None = None
        self._neurons: int | Tensor = 0
        self._over: list[bool] = []  # filled by the backward pass

    @property
    def has_pending_penalty(self) -> bool:
        """Whether there was a training pass since `take_penalty` was called last."""
        return self._penalty is not None

    def take_penalty(self) -> tuple[Tensor, int | Tensor]:
        """Return the sum of the terms of all passes since the last call, and their neurons; both start anew.

        Raises:
            RuntimeError: there was no training pass with gradients since the last call.
        """
        if self._penalty is None:
            raise RuntimeError("no penalty: call once after each forward pass in training mode with gradients enabled")
        penalty, neurons = self._penalty, self._neurons
        self.drop_penalty()
        return penalty, neurons

    def __getstate__(self) -> dict[str, Any]:
        # A pending penalty hangs on the graph of its pass, which cannot be copied: copies and pickles start without.
        return super().__getstate__() | {"_penalty": None, "_neurons": 0, "_over": []}


def is_recomputed() -> bool:
    """Return whether a backward pass computes a forward pass again, as `torch.utils.checkpoint` does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0


def spike_layers(model: nn.Module) -> dict[str, SpikeLayer]:
    """Return the spike layers of any module by name, in the order of their definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SpikeLayer)}


def time_steps(model: nn.Module) -> int:
    """Return the time steps of a network, the most of any spike layer; 1 without one."""
    return max((layer.time_steps for layer in spike_layers(model).values()), default=1)


@torch.no_grad()
def logged_state(model: nn.Module) -> dict[str, dict[str, float]]:
    """Return {quantity: {layer: value}} of what the spike layers of a model log, such as "v_th" and "extremum"."""
    found: dict[str, dict[str, float]] = {}
    for name, layer in spike_layers(model).items():
        for quantity, value in layer.logged().items():
            found.setdefault(quantity, {})[name] = value
    return found


SEVERAL = {"time_steps": "one time step", "thresholds": "one threshold"}  # options that change a layer's shapes


class Neuron(NamedTuple):
    """An entry of the registry.

    Attributes:
        make: (channels, **options) -> the activation layer.
        spiking: whether it makes `SpikeLayer`s.
        words: the neuron in two or three words, for tables.
    """

    make: Callable[..., nn.Module]
    spiking: bool
    words: str

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that `make` takes."""
        parameters = list(inspect.signature(self.make).parameters.values())[1:]
        return tuple(each.name for each in parameters if each.kind is not each.VAR_KEYWORD)


_NEURONS: dict[str, Neuron] = {}


def register_neuron(
    name: str, *, spiking: bool = True, words: str | None = None
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Decorate a class or function (channels, **options) -> layer, so that `create` and recipes know it as `name`.

    Args:
        name: value of `activation`.
        spiking: whether it makes `SpikeLayer`s.
        words: the neuron in two or three words, for tables; None: its name.

    Example:
        >>> @register_neuron("always")
        ... class Always(SpikeLayer):
        ...     def __init__(self, channels): super().__init__()
        ...     threshold = property(lambda self: torch.tensor(float("-inf")))
        ...     def forward(self, u): return torch.ones_like(u)

    Raises:
        ValueError: the name is taken by another neuron.
    """

    def register(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in _NEURONS:
            require_same_object(f"neuron {name!r}", _NEURONS[name].make, make)
        _NEURONS[name] = Neuron(make, spiking, words or name)
        return make

    return register


def require_same_object(what: str, taken: Any, new: Any) -> None:
    """Raise ValueError if a name is registered for something else than an earlier import of the same."""
    if (taken.__module__, taken.__qualname__) != (new.__module__, new.__qualname__):
        raise ValueError(f"{what} is registered already, by {taken.__module__}")


def neurons() -> dict[str, Neuron]:
    """Return all registered neurons by name."""
    return dict(_NEURONS)


def find_neuron(name: str) -> Neuron:
    """Return a registered neuron.

    Raises:
        ValueError: there is none of this name.
    """
    if not isinstance(name, str) or name not in _NEURONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, _NEURONS))}, got {name!r}")
    return _NEURONS[name]


class SpikeFactory:
    """Maker of the activation layers of one network: `spike(channels)` gives a layer of the registered neuron.

    A network and its analogue twin take the same arguments: options that this neuron does not have are left aside if
    some other registered neuron has them. Several time steps and thresholds a spiking neuron must know.

    Args:
        activation: name of a registered neuron, such as "hoyer" (the method) or "relu" (the analogue twin).
        options: of the neuron, such as extremum="channel".

    Raises:
        ValueError: no such neuron, or an option that no neuron has.
    """

    def __init__(self, activation: str = "hoyer", **options: Any) -> None:
        neuron = find_neuron(activation)
        known = {option for each in _NEURONS.values() for option in each.options}
        for option in options:
            if option not in known:
                raise ValueError(f"no neuron has the option {option!r} (allowed: {', '.join(sorted(known))})")
        self.activation, self._make = activation, neuron.make
        self.options = {name: value for name, value in options.items() if name in neuron.options}
        self.time_steps, self.thresholds = (self.options.get(option, 1) for option in SEVERAL)
        for option, words in SEVERAL.items():
            if neuron.spiking and option not in self.options and options.get(option, 1) != 1:
                several = ", ".join(name for name, each in _NEURONS.items() if option in each.options)
                raise ValueError(f"{option}: activation {activation!r} has {words} alone (allowed: {several})")
        self(1)  # a value that is not allowed is an error here

    def __call__(self, channels: int) -> nn.Module:
        return self._make(channels, **self.options)

    def outputs(self, channels: int) -> int:
        """Return how many channels of spikes a layer makes of so many channels of potentials."""
        return channels * self.thresholds
