"""The Hoyer spike layer: one time step, binary output, a threshold that the layer's own potentials set.

Datta, Liu, Beerel, "Hoyer regularizer is all you need for ultra low-latency spiking neural networks",
arXiv:2212.10170. With the membrane potential u (what enters the layer) and the trainable threshold v_th:

    z = u / |v_th|                       normalised membrane potential
    c = clip(z, 0, 1)                    clipped potential
    E = sum c^2 / sum c                  Hoyer extremum, in (0, 1]; carries no gradient
    H = (sum c)^2 / sum c^2              Hoyer regulariser: 1 for one active neuron, n for n equally active ones
    s = 1 if z >= E else 0               spike;  ds/dz := 1/2 for 0 < z < 2, else 0  (surrogate gradient)

The effective threshold on u is |v_th| E <= |v_th|: the extremum lowers the threshold so that enough neurons fire
for one time step to train, and minimising H pushes potentials away from it.

    loss = task loss + weight * sum over layers of H
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .spiking import SpikeLayer, is_recomputed, spike_layers

Reduction = Literal["sum", "mean", "network"]
Window = tuple[float, float]
Fire = Callable[[Tensor, Tensor | float], Tensor]

LEAST = 1e-6  # |v_th|, only to keep z finite should it cross 0
WINDOW: Window = (0.0, 2.0)  # of the surrogate gradient, in units of v_th


def moments(c: Tensor, *, per_channel: bool = False, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """sum c and sum c^2, in float32 or wider: in float16 a single feature map would overflow.

    Args:
        c: clipped potential, any shape; channels in dimension 1.
        per_channel: sum over batch and space only.
        overwrite: the squares may take the place of c.

    Returns:
        Two tensors of shape () or, per channel, (C,).
    """
    wide = widen(c)
    dims = [dim for dim in range(c.dim()) if dim != 1] if per_channel else list(range(c.dim()))
    return wide.sum(dims), (wide.square_() if overwrite or wide is not c else wide.square()).sum(dims)


def widen(x: Tensor) -> Tensor:
    """Return x in float32: a copy, or x itself where it has that or more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def extremum(sum_c: Tensor, sum_c2: Tensor) -> Tensor:
    """E = sum c^2 / sum c, in (0, 1], without gradient; 1 where nothing is active (sum c = 0)."""
    sum_c, sum_c2 = sum_c.detach(), sum_c2.detach()
    return torch.where(sum_c > 0, sum_c2 / torch.where(sum_c > 0, sum_c, 1.0), 1.0)


def regulariser(sum_c: Tensor, sum_c2: Tensor) -> Tensor:
    """H = (sum c)^2 / sum c^2 of the whole layer, shape (); 0 (and gradient 0) where nothing is active."""
    sum_c, sum_c2 = sum_c.sum(), sum_c2.sum()
    return sum_c.square() / torch.where(sum_c2 > 0, sum_c2, 1.0)


def fire(z: Tensor, threshold: Tensor | float) -> Tensor:
    """Return 1 where z >= threshold, else 0, in z's dtype, without gradient.

    Both ways avoid a mask of bool made bfloat16, which took as long as all the rest of a layer.
    """
    if torch.compiler.is_compiling():
        return (z >= threshold).float().to(z.dtype)
    return torch.ge(z, threshold, out=torch.empty_like(z))


def spike(z: Tensor, threshold: Tensor | float = 1.0, fire: Fire = fire, window: Window = WINDOW) -> Tensor:
    """Return 1 where z >= threshold, else 0, in z's dtype; backward ds/dz = 1/2 for 0 < z < 2, else 0.

    The surrogate gradient belongs to z alone: the threshold gets none. A layer may have another `fire` and `window`.
    """
    return _Spike.apply(z, threshold, fire, window)


def add_surrogate_(dz: Tensor, ds: Tensor, z: Tensor, window: Window = WINDOW) -> Tensor:
    """Return dz + ds * ds/dz, in place, with the surrogate gradient ds/dz = 1/2 inside of the window, else 0.

    dz must be 0 outside of the window, as that of the regulariser is.
    """
    return _inside_(dz.add_(ds, alpha=0.5), z, *window)


def regulariser_gradient(z: Tensor, sum_c: Tensor, sum_c2: Tensor, dh: Tensor) -> Tensor:
    """Return dH * 2 q (1 - z q) for 0 < z < 1, where c = z, else 0; with q = sum c / sum c^2 and dH that arrives."""
    q = sum_c / torch.where(sum_c2 > 0, sum_c2, 1.0)
    dz = z.mul(-q).add_(1.0).mul_(2 * q * dh)  # in place: at this size every tensor counts
    return _inside_(dz, z, 0.0, 1.0)


def _inside_(gradient: Tensor, z: Tensor, low: float, high: float) -> Tensor:
    """The gradient where low < z < high, else 0; in place."""
    return torch.ops.aten.hardtanh_backward.grad_input(gradient, z, low, high, grad_input=gradient)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor | float, fire: Fire, window: Window) -> Tensor:
        ctx.save_for_backward(z)
        ctx.window = window
        return fire(z, threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        return add_surrogate_(torch.zeros_like(z), ds, z, ctx.window), None, None, None


def sum_over_processes(*sums: Tensor) -> list[Tensor]:
    """The sums of all processes of torch.distributed together, in float32 or wider; as they are where there is one.

    Every process must call it with the same shapes. Without gradient.
    """
    if num_processes() == 1:
        return list(sums)
    total = torch.cat([value.detach().reshape(-1) for value in sums])
    dist.all_reduce(total)
    parts = total.split([value.numel() for value in sums])
    return [part.view_as(value) for part, value in zip(parts, sums, strict=True)]


def num_processes() -> int:
    """Processes of torch.distributed, 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class SpikesAndPenalty(torch.autograd.Function):
    """s and H of a layer with all their gradients, for which z is the only tensor of the layer's size that is kept.

    With the gradients ds, dH that arrive:

        dz = ds / 2                  for 0 < z < 2, the surrogate gradient, `add_surrogate_`
           + dH * 2 q (1 - z q)      for 0 < z < 1, `regulariser_gradient`
        du = dz / |v_th|
        d|v_th| = -sum z dz / |v_th|, over the layer or over each channel

    Autograd would find the same through z, `spike`, `moments` and `regulariser`, but would keep u and c, too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor,
        z: Tensor,
        threshold: Tensor | float,
        sum_c: Tensor,
        sum_c2: Tensor,
        fire: Fire,
        window: Window,
        share: int,
    ) -> tuple[Tensor, Tensor]:
        """Return fire(z, threshold) and H.

        Args:
            u, v, z: z = u / v, v = |v_th| in a shape that broadcasts to u.
            threshold: on z.
            sum_c, sum_c2: `moments`.
            fire: (z, threshold) -> spikes.
            window: of the surrogate gradient.
            share: times the gradient of H goes to u and v_th: the number of processes over which H is taken.
        """
        ctx.save_for_backward(z, v, sum_c.sum(), sum_c2.sum())
        ctx.window, ctx.share = window, share
        return fire(z, threshold), regulariser(sum_c, sum_c2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        z, v, sum_c, sum_c2 = ctx.saved_tensors

        wide = widen(z)
        dz = regulariser_gradient(wide, sum_c, sum_c2, dh * ctx.share)
        dz = add_surrogate_(dz, ds, wide, ctx.window)
        if torch.compiler.is_compiling():  # du alone is written, and BatchNorm's sums, over the same, take dv along
            du = (dz / v).to(z.dtype)
            dims = [dim for dim in range(z.dim()) if dim != 1]
            dv = -(wide * du).sum(dims, keepdim=True).sum_to_size(v.shape)
        else:
            dv = -(wide * dz if wide is z else wide.mul_(dz)).sum_to_size(v.shape) / v
            du = dz.div_(v).to(z.dtype)
        return du, dv.to(v.dtype), *[None] * 7


def track_(average: Tensor, count: Tensor, value: Tensor, momentum: float) -> None:
    """Let a batch's value into a running average over `count` batches, both in place; see `HoyerSpike`."""
    if is_recomputed():
        return
    count += 1
    weight = (1.0 / count).clamp_min(momentum)
    average.copy_(torch.lerp(average.to(value.dtype), value, weight.to(value.dtype)))


class HoyerSpike(SpikeLayer):
    """Spikes of one layer: 0/1 in the shape and dtype of the membrane potential.

    In training the extremum comes from the batch and feeds a counted running average: the n-th batch (from 0)
    has the weight max(momentum, 1 / (n + 1)), so that the average is right from the first batch on. Evaluation uses
    the average alone, so an image's spikes do not depend on its neighbours in the batch.

    In training with gradients the layer also keeps its H, until `hoyer_penalties` takes it.

    Args:
        channels: size of dimension 1 of the potential.
        per_channel: one extremum per channel, over batch and space, in place of one per layer. H always
            belongs to the whole layer.
        momentum: weight of a batch in the running average, once 1 / momentum batches have been seen.
        fixed: E = 1 at all times, that is a plain threshold v_th: the ablation without the extremum.
        window: lower and upper end of the surrogate gradient's window, which contains (0, 1).
        threshold_per_channel: one v_th per channel, in place of one per layer.
        sync: take the moments over the batches of all processes, so that E and H are those of one process with all
            the images. For training by `DistributedDataParallel`, which averages the gradients.

    Shape: (N, C, *) -> (N, C, *), also (N, C).

    Attributes:
        v_th: trainable threshold, shape () or (C,), starts at 1, used as |v_th|.
        extremum: running average of E, float32, shape () or (C,); 1 before the first batch.
        num_batches_tracked: batches averaged so far, int64, shape ().
    """

    has_penalty = True

    def __init__(
        self,
        channels: int,
        *,
        per_channel: bool = False,
        momentum: float = 0.1,
        fixed: bool = False,
        window: Window = WINDOW,
        threshold_per_channel: bool = False,
        sync: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(momentum, bool) or not isinstance(momentum, Real) or not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum!r}")
        if not isinstance(window, (tuple, list)) or [isinstance(end, Real) for end in window] != [True, True]:
            raise ValueError(f"window must have two ends, such as {WINDOW}, got {window!r}")
        if not (window[0] <= 0 and window[1] >= 1):
            raise ValueError(f"window must contain (0, 1), got {window[0]:g} to {window[1]:g}")
        self.channels, self.per_channel, self.momentum = channels, per_channel, momentum
        self.fixed, self.sync, self.window = fixed, sync, tuple(window)
        self.v_th = nn.Parameter(torch.ones(channels if threshold_per_channel else ()))
        self.register_buffer("extremum", torch.ones(channels if per_channel else ()))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def forward(self, u: Tensor) -> Tensor:
        if self.can_fuse(u):
            from .fused import fused_layer

            state = self.v_th, self.extremum, self.num_batches_tracked
            spikes, penalty = fused_layer(u, *state, self.momentum, self.fixed, self.window)
            self.add_penalty(penalty, u.numel())
            return spikes
        v = self._threshold_for(u)
        if not self.training:
            return spike(u / v, self._spread(self.extremum, u), self.fire, self.window)
        with torch.no_grad():
            z = u / v
            c = F.hardtanh(wide := widen(z), 0.0, 1.0, inplace=wide is not z)
            sum_c, sum_c2 = moments(c, per_channel=self.per_channel, overwrite=True)
            neurons: int | Tensor = z.numel()
            if self.sync:
                sum_c, sum_c2, neurons = sum_over_processes(sum_c, sum_c2, sum_c.new_tensor(neurons))
            threshold: Tensor | float = 1.0
            if not self.fixed:
                batch_extremum = extremum(sum_c, sum_c2)
                if self.sync or z.numel():  # an empty batch has none
                    track_(self.extremum, self.num_batches_tracked, batch_extremum, self.momentum)
                threshold = self.broadcast(batch_extremum.to(z.dtype), z)
        if not torch.is_grad_enabled():
            return self.fire(z, threshold)
        layer = SpikesAndPenalty.apply
        if torch.compiler.is_compiling():  # else the compiler keeps the spikes as they enter the next convolution
            layer = partial(checkpoint, layer, use_reentrant=False)
        share = num_processes() if self.sync else 1
        spikes, penalty = layer(u, v, z, threshold, sum_c, sum_c2, self.fire, self.window, share)
        self.add_penalty(penalty, neurons)
        return spikes

    def can_fuse(self, u: Tensor) -> bool:
        """Return whether `fused_layer` computes a pass: in training, of a layer with one threshold and extremum."""
        if not (self.training and torch.is_grad_enabled() and u.numel() and type(self).fire is HoyerSpike.fire):
            return False
        from . import fused  # made of the functions above

        return not (self.v_th.dim() or self.per_channel or self.sync) and fused.can_fuse(u)

    def fire(self, z: Tensor, threshold: Tensor | float) -> Tensor:
        """Return the spikes at a normalised potential, in its shape and dtype."""
        return fire(z, threshold)

    def _threshold_for(self, u: Tensor) -> Tensor:
        return self.broadcast(self.v_th.abs().clamp_min(LEAST).to(u.dtype), u)

    def _spread(self, value: Tensor, u: Tensor) -> Tensor | float:
        return 1.0 if self.fixed else self.broadcast(value.to(u.dtype), u)

    @property
    def threshold(self) -> Tensor:
        """Effective threshold on u in evaluation, |v_th| E (|v_th| if fixed), shape () or (C,)."""
        v_th = self.v_th.abs()
        return v_th if self.fixed else v_th * self.extremum

    def fold_threshold(self) -> Tensor:
        super().fold_threshold()  # refuses more levels than two
        v_th = self.v_th.detach().double().abs().clamp_min(LEAST)
        return v_th if self.fixed else v_th * self.extremum.double()

    def logged(self) -> dict[str, float]:
        """Return |v_th| and the extremum's running average, means over the channels where each has its own."""
        return {"v_th": self.v_th.abs().mean().item(), "extremum": self.extremum.mean().item()}

    def extra_repr(self) -> str:
        scope = "fixed" if self.fixed else "channel" if self.per_channel else "layer"
        return f"{self.channels}, extremum={scope}, momentum={self.momentum}"


def hoyer_penalties(model: nn.Module, reduction: Reduction = "sum") -> dict[str, Tensor]:
    """Return every spike layer's H of the last training pass by module name; taken out, so a second call raises.

    Layers in evaluation mode, of frozen parts, have none, nor those whose `has_penalty` is False.

    Args:
        model: any module.
        reduction: "sum" is the paper's H, taken over the whole batch tensor: it grows with batch size, resolution
            and width (a weight of 1e-8 belongs to 128 images of 32x32). "network" is H divided by the neurons of all
            layers together: its sum over the layers is a density in (0, 1], whose weight carries over between sizes
            and which pulls every neuron alike, as the paper's does. "mean" is H divided by the layer's own neurons,
            which pulls a neuron of a small deep layer ten to a hundred times harder than one of the first.

    Raises:
        ValueError: `reduction` is neither.
        RuntimeError: a layer has nothing to give: no training pass since the last call, or one without gradients.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(map(repr, get_args(Reduction)))}, got {reduction!r}")
    layers = {name: layer for name, layer in spike_layers(model).items() if layer.has_penalty}
    layers = {name: layer for name, layer in layers.items() if layer.training} or layers
    empty = [name for name, layer in layers.items() if not layer.has_pending_penalty]
    if empty:
        raise RuntimeError(
            f"no Hoyer term in spike layer {empty[0]!r} ({len(empty)} of {len(layers)} layers): "
            "call once after each forward pass in training mode with gradients enabled"
        )
    found = {name: layer.take_penalty() for name, layer in layers.items()}
    if reduction == "sum":
        return {name: penalty for name, (penalty, _) in found.items()}
    total = sum(neurons for _, neurons in found.values()) or 1  # of an empty batch every H is 0
    if reduction == "network" and found:  # at once: on a GPU the number of kernels counts
        shares = torch.stack([penalty for penalty, _ in found.values()]) / total
        return dict(zip(found, shares.unbind(), strict=True))
    return {name: penalty / (neurons or 1) for name, (penalty, neurons) in found.items()}


def hoyer_penalty(model: nn.Module, reduction: Reduction = "sum") -> Tensor:
    """Return the sum over all spike layers of H, shape (): the term that the loss takes times its weight.

    0 for a model without spike layers (the analogue twin). See `hoyer_penalties` for the reductions and errors.
    """
    penalties = hoyer_penalties(model, reduction)
    return torch.stack(list(penalties.values())).sum() if penalties else torch.zeros(())
