"""Noise on the potentials and thresholds of spike layers, and how far the potentials lie from the thresholds.

With a spike layer's threshold theta in evaluation and e drawn from the standard normal distribution:

    membrane          u + sd * theta * e         e anew for every neuron and image
    threshold         theta * (1 + sd * e)       e once for every neuron: mismatch of devices, each seed another device

Both are in units of the threshold, so that layers and networks compare.

All draws come from generators on the CPU that are keyed by seed, layer and image (or neuron): they do not depend on the
batch size, and a larger severity scales the same draws. They are equal for any batch as long as the images of a batch
are of one size; a detector pads smaller images to the largest, and noise is drawn for what is padded too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbones import SpikeLayer, hook_layers, spike_layers
from detection.robustness import NEAR, SPIKE_KINDS

Act = Callable[[str, SpikeLayer, Tensor, int, range], Tensor | None]


@contextmanager
def potential_noise(model: nn.Module, kind: str, sd: float, seed: int) -> Iterator[None]:
    """Put noise into every spike layer of `model` while the context is open; nothing of it stays.

    A threshold theta (1 + sd e) is reached by u where theta is reached by u - sd theta e, which is what is done: a
    threshold that falls below 0 is one too, and makes the neuron fire at rest.

    The first argument of `model` has one entry per image; images are counted from the opening of the context on, so it
    is opened anew for every evaluation.

    Args:
        model: in evaluation mode, where a layer's threshold does not depend on the batch.
        kind: "membrane" or "threshold".
        sd: standard deviation in units of each layer's (or channel's) threshold.
        seed: of the draws, from 0.

    Raises:
        ValueError: another kind, a negative sd or seed.
        RuntimeError: a pass in training mode, or a layer whose first dimension is not that of the images.
    """
    if kind not in SPIKE_KINDS:
        raise ValueError(f"kind {kind!r}: not a noise of spike layers (allowed: {', '.join(SPIKE_KINDS)})")
    if not 0 <= sd < math.inf or seed < 0:
        raise ValueError(f"sd {sd:g}, seed {seed}: neither may be negative, and sd must be finite")

    def disturb(name: str, layer: SpikeLayer, u: Tensor, position: int, images: range) -> Tensor:
        if kind == "membrane":
            return _shift(layer, u, sd, _membrane_draws(u, images, position, seed))
        return _shift(layer, u, -sd, _threshold_draws(u, position, seed))

    with _hook_potentials(model, disturb):
        yield


@dataclass
class LayerMargin:
    """Distance of the potentials of one layer from its threshold, counted over neurons and images.

    Attributes:
        num_neurons: all of them.
        num_spikes: that fire without noise.
        num_near: within 10 % of the threshold, on either side.
        sum, sum_squares: of u / theta.
        flips: (sd, seed) -> neurons that noise of this standard deviation makes fire, and those it keeps from firing.
    """

    num_neurons: int = 0
    num_spikes: int = 0
    num_near: int = 0
    sum: float = 0.0
    sum_squares: float = 0.0
    flips: dict[tuple[float, int], tuple[int, int]] = field(default_factory=dict)

    @property
    def firing_rate(self) -> float:
        """Share of the neurons that fire without noise, in [0, 1]."""
        return self.num_spikes / max(1, self.num_neurons)

    @property
    def near_rate(self) -> float:
        """Share of the neurons within 10 % of the threshold, in [0, 1]."""
        return self.num_near / max(1, self.num_neurons)

    @property
    def potential_sd(self) -> float:
        """Standard deviation of the potentials in units of the threshold: what the noise competes with."""
        number = max(1, self.num_neurons)
        return math.sqrt(max(0.0, self.sum_squares / number - (self.sum / number) ** 2))

    def flip_rate(self, sd: float, seed: int) -> float:
        """Return the share of the neurons that fire with noise or without it but not both, in [0, 1]."""
        return sum(self.flips.get((sd, seed), ())) / max(1, self.num_neurons)

    def lost_rate(self, sd: float, seed: int) -> float:
        """Return the share of the spikes that vanish, in [0, 1]; 0 for a layer without spikes."""
        return self.flips[sd, seed][1] / self.num_spikes if self.num_spikes else 0.0


@contextmanager
def record_margins(model: nn.Module, sds: Sequence[float], seeds: Sequence[int]) -> Iterator[dict[str, LayerMargin]]:
    """Measure, while the context is open, each spike layer of `model` on clean passes, by module name.

    A flip is an output of the layer that noise of kind "membrane" changes on the layer's clean input. Flips of earlier
    layers are thus not in it: it says how robust a layer is by itself, where the accuracy says how robust the network
    is. Noise of kind "threshold" has the same distribution over neurons, and on average flips as many.

    See `potential_noise` for what the passes have to be.
    """
    margins = {name: LayerMargin() for name in spike_layers(model)}

    def measure(name: str, layer: SpikeLayer, u: Tensor, position: int, images: range) -> None:
        # By `forward`: the module itself would call this hook again.
        margin, clean = margins[name], layer.forward(u) > 0
        ratio = u.detach().double() / _threshold(layer, u).double()
        margin.num_neurons += u.numel()
        margin.num_spikes += int(clean.sum())
        margin.num_near += int(((ratio - 1).abs() <= NEAR).sum())
        margin.sum += float(ratio.sum())
        margin.sum_squares += float(ratio.square().sum())
        for seed in seeds:
            draws = _membrane_draws(u, images, position, seed)
            for sd in sds:
                noisy = layer.forward(_shift(layer, u, sd, draws)) > 0
                gained, lost = margin.flips.get((sd, seed), (0, 0))
                margin.flips[sd, seed] = (gained + int((noisy & ~clean).sum()), lost + int((clean & ~noisy).sum()))

    with _hook_potentials(model, measure):
        yield margins


def sum_margins(margins: Iterable[LayerMargin]) -> LayerMargin:
    """Return the neurons of several layers counted together."""
    total = LayerMargin()
    for margin in margins:
        for name in ("num_neurons", "num_spikes", "num_near", "sum", "sum_squares"):
            setattr(total, name, getattr(total, name) + getattr(margin, name))
        for key, (gained, lost) in margin.flips.items():
            before = total.flips.get(key, (0, 0))
            total.flips[key] = (before[0] + gained, before[1] + lost)
    return total


@contextmanager
def _hook_potentials(model: nn.Module, act: Act) -> Iterator[None]:
    """Call act(name, layer, u, number of the layer, numbers of the images) in front of every spike layer.

    What it returns takes the place of u, unless it is None.
    """
    layers, images = spike_layers(model), range(0)
    positions = {name: position for position, name in enumerate(layers)}

    def count(name: str, module: nn.Module, batch: Any) -> None:
        nonlocal images
        images = range(images.stop, images.stop + len(batch))

    def enter(name: str, layer: SpikeLayer, u: Tensor) -> Tensor | None:
        if layer.training:
            raise RuntimeError(f"spike layer {name!r} is in training mode: call model.eval() first")
        if len(u) != len(images):
            raise RuntimeError(
                f"spike layer {name!r} got {len(u)} maps in a pass over {len(images)} images: "
                "noise is drawn per image, so their numbers must agree"
            )
        return act(name, layer, u, positions[name], images)

    with hook_layers({"": model}, before=count), hook_layers(layers, before=enter):
        yield


def _threshold(layer: SpikeLayer, u: Tensor) -> Tensor:
    """Return the threshold in a shape that broadcasts to u, float32 or wider."""
    # To divide by; the layer keeps |v_th| from 0 likewise.
    return layer.broadcast(layer.threshold.detach().clamp_min(1e-6), u)


def _shift(layer: SpikeLayer, u: Tensor, sd: float, draws: Tensor) -> Tensor:
    """Return u + sd * theta * draws in u's dtype, added in float32 or wider."""
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    return (wide + sd * _threshold(layer, u) * draws).to(u.dtype)


def _membrane_draws(u: Tensor, images: range, position: int, seed: int) -> Tensor:
    """Return standard normal numbers for each neuron of each image, in u's shape, float32."""
    draws = torch.empty_like(u, dtype=torch.float32, device="cpu")  # in u's order of memory
    for index, image in enumerate(images):
        generator = np.random.default_rng((seed, 0, position, image))
        draws[index] = torch.from_numpy(generator.standard_normal(u.shape[1:], dtype=np.float32))
    return draws.to(u.device)


def _threshold_draws(u: Tensor, position: int, seed: int) -> Tensor:
    """Return standard normal numbers for each neuron, (C, *), float32.

    A neuron keeps its number in maps of other sizes: every row has a generator of its own and is drawn from left to
    right, all channels of a cell together.
    """
    channels, height = u.shape[1], u.shape[2] if u.dim() > 3 else 1
    width = u[0, 0].numel() // height
    rows = [
        np.random.default_rng((seed, 1, position, row)).standard_normal((width, channels), dtype=np.float32)
        for row in range(height)
    ]
    return torch.from_numpy(np.stack(rows)).permute(2, 0, 1).reshape(u.shape[1:]).to(u.device)
