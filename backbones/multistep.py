"""Several time steps: a spike layer that carries its potential over, and how a network runs in steps.

With the input u_t of step t = 1..T, the effective threshold theta = |v_th| E and a trainable leak per layer:

    m_t = leak (m_{t-1} - s_{t-1} theta) + u_t       reset "subtract"
    m_t = leak m_{t-1} (1 - s_{t-1}) + u_t           reset "zero";   m_0 = s_0 = 0
    z_t = m_t / |v_th|,   s_t = 1 if z_t >= E else 0

E and H are those of `backbones.hoyer`, of the z of all steps together. The gradient goes through time and through the
reset, ds/dz being the surrogate's.

The steps lie in the first dimension, step by step: (T N, ...). The image is the same in every step (direct encoding),
so a network is computed once up to its first spike layer, and `RepeatSteps` stands there; or each step has a frame of
its own, of an event camera, and `FramesToSteps` stands in front of all. The outputs are averaged over the steps in the
end, `average_steps`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .hoyer import HoyerSpike, extremum, moments, regulariser, spike, track_
from .spiking import spike_layers

Reset = Literal["subtract", "zero"]


def check_steps(time_steps: int, reset: str) -> None:
    """Raise ValueError for a number of steps or a reset that there is not."""
    if reset not in get_args(Reset):
        raise ValueError(f"reset must be 'subtract' or 'zero', got {reset!r}")
    check_count("time_steps", time_steps)


def check_count(name: str, value: int) -> None:
    """Raise ValueError unless an option is a whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")


def average_steps(x: Tensor, time_steps: int) -> Tensor:
    """Return the mean over the steps: (T N, *) -> (N, *); one step is returned as it is."""
    return x if time_steps == 1 else x.unflatten(0, (time_steps, -1)).mean(0)


def average_so_far(x: Tensor, time_steps: int) -> Tensor:
    """Return the means over the first 1, ..., T steps: (T N, *) -> (T, N, *).

    In evaluation mode they are the outputs of a network that is stopped after as many steps.
    """
    steps = x.unflatten(0, (time_steps, -1))
    return torch.stack([steps[: number + 1].mean(0) for number in range(time_steps)])


@contextmanager
def stop_after(model: nn.Module, steps: int) -> Iterator[None]:
    """Let a network of several time steps run for its first `steps` alone while the context is open.

    In evaluation mode alone: what a training learns belongs to all steps.

    Raises:
        ValueError: the network has not so many steps.
    """
    parts = [part for part in model.modules() if isinstance(part, (RepeatSteps, MultiStepSpike))]
    before = [part.time_steps for part in parts]
    check_count("steps", steps)
    if not 1 <= steps <= min(before, default=1):
        raise ValueError(f"steps {steps}: expected 1 to the {min(before, default=1)} time steps of the network")
    try:
        for part in parts:
            part.time_steps = steps
        yield
    finally:
        for part, number in zip(parts, before, strict=True):
            part.time_steps = number


class RepeatSteps(nn.Module):
    """Every image once per step: (N, *) -> (T N, *), step by step."""

    def __init__(self, time_steps: int) -> None:
        super().__init__()
        self.time_steps = time_steps

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.time_steps)

    def within(self, part: nn.Module, x: Tensor) -> Tensor:
        """Return part(x) with the repetition in front of the first of its modules in a row that has spike layers.

        What is no plain `nn.Sequential` is repeated in front of as a whole, which gives the same later.

        Shape: (N, *) -> (T N, *).
        """
        if type(part).forward is not nn.Sequential.forward:
            return part(self(x))
        waiting = True
        for child in part:
            if waiting and spike_layers(child):
                x, waiting = self.within(child, x), False
            else:
                x = child(x)
        return x


class FramesToSteps(RepeatSteps):
    """Frames in an image's channels as its steps: (N, T C, H, W), frame by frame -> (T N, C, H, W), step by step."""

    def __init__(self, time_steps: int) -> None:
        super().__init__(time_steps)
        self.frames = time_steps

    def forward(self, x: Tensor) -> Tensor:
        frames = x.unflatten(1, (self.frames, -1)).transpose(0, 1)
        return frames[: self.time_steps].flatten(0, 1)  # of all, where the network is stopped early


class MultiStepSpike(HoyerSpike):
    """Spikes of one layer in several time steps: 0/1 in the shape and dtype of its input.

    In training E must be that of potentials which depend on earlier spikes, and so on E itself: it is taken from a
    first pass through the steps that fires at the extremum of step 1, which no spike has touched, because then all
    steps have one threshold, as they have in evaluation, nothing but the batch decides, and one step is `HoyerSpike`.
    For the gradient the steps are computed again: nothing but the input is kept.

    Args:
        channels: size of dimension 1 of the input.
        time_steps: T; with 1 it is `HoyerSpike` bit for bit.
        reset: "subtract" the effective threshold from the potential where it fired, or set it to "zero".
        options: of `HoyerSpike`; `sync` is refused.

    Shape: (T N, C, *) -> (T N, C, *), step by step.

    Attributes:
        leak: trainable share of the potential that is carried over, shape (), starts at 1.

    Raises:
        ValueError: a value that is not allowed, or an input whose first dimension is no multiple of T.
    """

    def __init__(
        self, channels: int, *, time_steps: int, reset: Reset = "subtract", **options: bool | float | tuple
    ) -> None:
        super().__init__(channels, **options)
        check_steps(time_steps, reset)
        self.time_steps, self.reset = time_steps, reset
        self.leak = nn.Parameter(torch.ones(()))

    @property
    def sync(self) -> bool:
        """Whether moments are taken over all processes: never."""
        return False

    @sync.setter
    def sync(self, value: bool) -> None:
        if value:
            raise ValueError("hoyer.sync: several time steps take extremum and H from each process's own images alone")

    def forward(self, u: Tensor) -> Tensor:
        if self.time_steps == 1:
            return super().forward(u)
        if len(u) % self.time_steps:
            raise ValueError(f"{len(u)} maps are no multiple of {self.time_steps} time steps")
        v = self._threshold_for(u)
        if not self.training:
            return torch.cat([spikes for _, spikes in self._steps(u, v, self._spread(self.extremum, u))])
        threshold = 1.0 if self.fixed else self._spread(self._find_extremum(u, v), u)
        if not torch.is_grad_enabled():
            return self._run(u, v, threshold)[0]
        spikes, sum_c, sum_c2 = checkpoint(self._run, u, v, threshold, use_reentrant=False, preserve_rng_state=False)
        self.add_penalty(regulariser(sum_c, sum_c2), u.numel())
        return spikes

    def membrane(self, u: Tensor) -> Tensor:
        v = self._threshold_for(u)
        return torch.cat([v * z for z, _ in self._steps(u, v, self._spread(self.extremum, u))])

    def taken(self, spikes: Tensor, threshold: Tensor | float) -> Tensor:
        """Return what the reset "subtract" takes from the normalised potential."""
        return spikes * threshold

    def fold_threshold(self) -> Tensor:
        if self.time_steps > 1:
            raise ValueError(f"{self.time_steps} time steps: fold, integers and exported files are for one")
        return super().fold_threshold()

    def logged(self) -> dict[str, float]:
        """Return the leak, too."""
        return super().logged() | {"leak": self.leak.item()}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, time_steps={self.time_steps}, reset={self.reset}"

    @torch.no_grad()
    def _find_extremum(self, u: Tensor, v: Tensor) -> Tensor:
        """Return E of a batch, which enters the running average."""
        first = F.hardtanh(u.chunk(self.time_steps)[0] / v, 0.0, 1.0)
        start = extremum(*moments(first, per_channel=self.per_channel))
        found = extremum(*self._run(u, v, self._spread(start, u))[1:])
        if u.numel():
            track_(self.extremum, self.num_batches_tracked, found, self.momentum)
        return found

    def _run(self, u: Tensor, v: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the spikes of all steps, and the moments of their potentials."""
        potentials, spikes = zip(*self._steps(u, v, threshold), strict=True)
        sums = [moments(F.hardtanh(z, 0.0, 1.0), per_channel=self.per_channel) for z in potentials]
        sum_c, sum_c2 = (torch.stack(each).sum(0) for each in zip(*sums, strict=True))
        return torch.cat(spikes), sum_c, sum_c2

    def _steps(self, u: Tensor, v: Tensor, threshold: Tensor | float) -> list[tuple[Tensor, Tensor]]:
        """Return z and s of every step; all is in units of v, so the threshold is E."""
        leak, steps = self.leak.to(u.dtype), []
        for z in (u / v).chunk(self.time_steps):
            if steps:
                before, fired = steps[-1]
                left = before - self.taken(fired, threshold) if self.reset == "subtract" else before * (1 - fired)
                z = leak * left + z
            steps.append((z, spike(z, threshold, self.fire, self.window)))
        return steps
