"""The neurons that come with the package, by the names that recipes and `create` know.

Options of those with a threshold: `extremum` and `threshold` ("layer" or "channel") are the scopes of the Hoyer
extremum and of v_th, `momentum` is the weight of a batch in the extremum's running average, `window` has the ends of
the surrogate gradient, `time_steps` and `reset` ("subtract" or "zero") are those of `MultiStepSpike`, `thresholds` is
that of `SeveralThresholds`.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .hoyer import WINDOW, HoyerSpike, Window
from .multistep import MultiStepSpike, Reset, check_count, check_steps
from .spiking import register_neuron

Scope = Literal["layer", "channel"]


@register_neuron("hoyer", words="spiking")
def make_hoyer(
    channels: int,
    extremum: Scope = "layer",
    momentum: float = 0.1,
    threshold: Scope = "layer",
    window: Window = WINDOW,
    time_steps: int = 1,
    reset: Reset = "subtract",
    thresholds: int = 1,
) -> HoyerSpike | SeveralThresholds:
    """Return the method's neuron: the Hoyer extremum, of the layer or of each channel, lowers the threshold."""
    options = _arguments(extremum, momentum, threshold, window) | {"fixed": False}
    return _in_steps(channels, time_steps, reset, options, thresholds=thresholds)


@register_neuron("relu", spiking=False, words="analogue twin")
def make_relu(channels: int) -> nn.ReLU:
    """Return the activation of the analogue twin: the same topology, real values in place of spikes."""
    return nn.ReLU()


@register_neuron("fixed", words="spiking, threshold without extremum")
def make_fixed(
    channels: int,
    extremum: Scope = "layer",
    momentum: float = 0.1,
    threshold: Scope = "layer",
    window: Window = WINDOW,
    time_steps: int = 1,
    reset: Reset = "subtract",
    thresholds: int = 1,
) -> HoyerSpike | SeveralThresholds:
    """Return the ablation: a plain trainable threshold v_th, the extremum left out."""
    options = _arguments(extremum, momentum, threshold, window) | {"fixed": True}
    return _in_steps(channels, time_steps, reset, options, thresholds=thresholds)


class RepeatChannels(nn.Module):
    """All channels several times, one set behind the other.

    Shape: (N, C, *) -> (N, times C, *).
    """

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, u: Tensor) -> Tensor:
        return torch.cat([u] * self.times, dim=1)

    def extra_repr(self) -> str:
        return str(self.times)


class SeveralThresholds(nn.Sequential):
    """Several neurons for each potential, with thresholds of their own: as many bits in place of one, all of one step.

    RepeatChannels -> BN -> the method's layer over all of them. BN shifts and scales each copy of a channel by itself,
    which makes of the one threshold of the layer one for each neuron, as in ABC-Net (Lin et al., arXiv:1711.11294).
    The convolution behind has weights for the spikes of each. Shifts start at equal distances from 1/2 to -1/2.

    Args:
        channels: of the potential.
        thresholds: neurons of each potential, from 2 on.
        make: (channels) -> the layer.

    Shape: (N, C, H, W) -> (N, thresholds C, H, W).
    """

    def __init__(self, channels: int, thresholds: int, make: Callable[[int], HoyerSpike]) -> None:
        norm = nn.BatchNorm2d(thresholds * channels)
        with torch.no_grad():
            norm.bias.copy_(torch.linspace(0.5, -0.5, thresholds).repeat_interleave(channels))
        super().__init__(RepeatChannels(thresholds), norm, make(thresholds * channels))
        self.thresholds = thresholds

    @property
    def is_nested(self) -> bool:
        """Whether the neurons of lower thresholds fire with each one: in one step, none rises while another falls."""
        sign = self[1].weight.detach().view(self.thresholds, -1).sign()
        return self[2].time_steps == 1 and not bool(((sign > 0).any(0) & (sign < 0).any(0)).any())


class GradedSpike(HoyerSpike):
    """Spikes of several levels, all else as in the method, the surrogate gradient included. Not binary.

        s = 1/n * number of i in 1..n with z >= 2 i E / (n + 1),   n = levels - 1

    is the method's spike for two levels, and approaches the ramp clip(z / 2E, 0, 1) for many.

    Args:
        channels: size of dimension 1 of the potential.
        levels: values that a spike can take, 0 and 1 included, 2 to 16.
        options: of `HoyerSpike`.
    """

    def __init__(self, channels: int, *, levels: int, **options: bool | float | str | tuple) -> None:
        super().__init__(channels, **options)
        if isinstance(levels, bool) or not isinstance(levels, Integral) or not 2 <= levels <= 16:
            raise ValueError(f"levels must be in 2..16, got {levels!r}")
        self.levels = levels

    def fire(self, z: Tensor, threshold: Tensor | float) -> Tensor:
        steps = self.levels - 1
        fires = (z >= threshold * (2 * step / (steps + 1)) for step in range(1, steps + 1))
        return sum(each.to(z.dtype) for each in fires) / steps

    @property
    def threshold(self) -> Tensor:
        """Potential of the first level, 2 / (n + 1) of the method's threshold."""
        return super().threshold * (2 / self.levels)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, levels={self.levels}"


class MultiStepGraded(GradedSpike, MultiStepSpike):
    """Graded spikes in several time steps, as in `MultiStepSpike`.

    The reset "subtract" takes the potential of the highest level that was reached, 2 i E / (n + 1), "zero" leaves the
    share 1 - s of the potential: for two levels both are the method's.
    """

    def taken(self, spikes: Tensor, threshold: Tensor | float) -> Tensor:
        return super().taken(spikes, threshold) * (2 * (self.levels - 1) / self.levels)


@register_neuron("graded", words="graded spikes")
def make_graded(
    channels: int,
    extremum: Scope = "layer",
    momentum: float = 0.1,
    threshold: Scope = "layer",
    window: Window = WINDOW,
    levels: int = 4,
    time_steps: int = 1,
    reset: Reset = "subtract",
) -> GradedSpike:
    """Return a neuron between spike and ReLU, for controlled runs: spikes of 2 to 16 levels."""
    options = _arguments(extremum, momentum, threshold, window) | {"levels": levels}
    return _in_steps(channels, time_steps, reset, options, GradedSpike, MultiStepGraded)


def _in_steps(
    channels: int,
    time_steps: int,
    reset: Reset,
    options: dict[str, Any],
    single: type[HoyerSpike] = HoyerSpike,
    several: type[MultiStepSpike] = MultiStepSpike,
    thresholds: int = 1,
) -> HoyerSpike | SeveralThresholds:
    check_count("thresholds", thresholds)
    check_steps(time_steps, reset)
    if thresholds > 1:
        return SeveralThresholds(channels, thresholds, lambda number: _in_steps(number, time_steps, reset, options))
    if time_steps == 1:
        return single(channels, **options)
    return several(channels, time_steps=time_steps, reset=reset, **options)


def _arguments(extremum: Scope, momentum: float, threshold: Scope, window: Window) -> dict[str, Any]:
    for name, value in (("extremum", extremum), ("threshold", threshold)):
        if value not in get_args(Scope):
            raise ValueError(f"{name} must be 'layer' or 'channel', got {value!r}")
    return {
        "per_channel": extremum == "channel",
        "momentum": momentum,
        "threshold_per_channel": threshold == "channel",
        "window": window,
    }
