"""A Hoyer layer in training in a few passes over its neurons, where torch takes dozens of operations.

On a GPU they are kernels that `torch.compile` makes, whose number is what a network of small layers waits for; on a
CPU those that come with the package. Networks that are compiled as a whole need none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._triton import has_triton

from .deploy.events import training
from .hoyer import LEAST, Window, extremum, moments, regulariser, track_
from .spiking import is_recomputed


def can_fuse(u: Tensor) -> bool:
    """Return whether `fused_layer` is the fast way for a potential, and nothing looks at its operations."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return has_triton() if u.is_cuda else training.takes(u)


def fused_layer(
    u: Tensor, v_th: Tensor, average: Tensor, count: Tensor, momentum: float, fixed: bool, window: Window
) -> tuple[Tensor, Tensor]:
    """Return spikes and H of a layer with one threshold and one extremum, as `HoyerSpike`'s but for rounding.

    Kernels that are compiled are so at the first call, once for all layers and sizes.

    Args:
        u: potential, any shape.
        v_th: trainable threshold, shape ().
        average, count: the extremum's running average over so many batches, shape (); both are brought up to date.
        momentum, fixed, window: those of the layer.

    Shape: spikes as u, H ().
    """
    orders = (torch.contiguous_format, torch.channels_last)[: 1 + (u.dim() == 4)]
    if is_recomputed():  # compiled kernels do not see it
        average, count = average.clone(), count.clone()
    dense = u if any(u.is_contiguous(memory_format=order) for order in orders) else u.contiguous()
    return _Layer.apply(dense, v_th, average, count, momentum, fixed, window)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, v_th: Tensor, average: Tensor, count: Tensor, momentum: float, fixed: bool, window: Window
    ) -> tuple[Tensor, Tensor]:
        ctx.window, ctx.native = window, training.takes(u)
        run = training.forward if ctx.native else _compiled(_forward)
        kept, spikes, penalty, *ctx.sums = run(_flat(u, ctx.native), v_th, average, count, momentum, fixed)
        kept = u if ctx.native else kept.as_strided(u.shape, u.stride())
        ctx.save_for_backward(kept, v_th)
        return spikes.as_strided(u.shape, u.stride()), penalty

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        kept, v_th = ctx.saved_tensors
        if ds.stride() != kept.stride():
            ds = torch.empty_like(kept).copy_(ds)
        run = training.backward if ctx.native else _compiled(_backward)
        du, dv_th = run(_flat(kept, ctx.native), v_th, *ctx.sums, _flat(ds, ctx.native), dh, ctx.window)
        return du.as_strided(kept.shape, kept.stride()), dv_th, *[None] * 5


def _forward(
    u: Tensor, v_th: Tensor, average: Tensor, count: Tensor, momentum: float, fixed: bool
) -> tuple[Tensor, ...]:
    z = (u / v_th.abs().clamp_min(LEAST)).to(u.dtype)
    sum_c, sum_c2 = moments(z.float().clamp(0.0, 1.0))
    threshold = torch.ones_like(sum_c)
    if not fixed:
        threshold = extremum(sum_c, sum_c2)
        track_(average, count, threshold, momentum)
    spikes = (z >= threshold.to(z.dtype)).to(z.dtype)
    return z, spikes, regulariser(sum_c, sum_c2), sum_c, sum_c2


def _backward(
    z: Tensor, v_th: Tensor, sum_c: Tensor, sum_c2: Tensor, ds: Tensor, dh: Tensor, window: Window
) -> tuple[Tensor, Tensor]:
    wide, v = z.float(), v_th.abs().clamp_min(LEAST)
    q = sum_c / torch.where(sum_c2 > 0, sum_c2, 1.0)
    dz = torch.where((wide > 0) & (wide < 1), 2 * q * dh * (1 - wide * q), 0.0)
    du = (dz + torch.where((wide > window[0]) & (wide < window[1]), 0.5 * ds.float(), 0.0)) / v
    dv = -(wide * du).sum()
    return du.to(z.dtype), torch.where(v_th.abs() >= LEAST, dv * v_th.sign(), 0.0).to(v_th.dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _flat(x: Tensor, native: bool) -> Tensor:
    """All elements of a dense tensor in the order of memory: one kernel, of any number of them, serves every layer."""
    flat = x.as_strided((x.numel(),), (1,))
    if not native:
        torch._dynamo.maybe_mark_dynamic(flat, 0)
    return flat
