"""The passes of a Hoyer layer in training on a CPU, by the kernels: three, where torch makes twenty.

Spikes and gradients are those of the operations in `backbones.hoyer`; sums over neurons are more exact.
MemoryError says that there is not enough memory for them.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from backbones.hoyer import LEAST, Window, track_

from . import library

MOMENTS, SPIKES, GRADIENTS = range(3)  # passes of the kernels


def takes(u: Tensor) -> bool:
    """Return whether the functions of this module take a potential: on the CPU, of their types, kernels in use."""
    plain = type(u) is Tensor and u.dtype in (torch.float32, torch.bfloat16) and u.device.type == "cpu"
    return plain and library.LIBRARY is not None and library.current() != "torch"


def forward(
    u: Tensor, v_th: Tensor, average: Tensor, count: Tensor, momentum: float, fixed: bool
) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """Return u, spikes, H, sum c and sum c^2 of a layer with one threshold and one extremum.

    Arguments are those of `backbones.fused.fused_layer`, with u float32 or bfloat16 (N,).
    """
    v, spikes = v_th.item(), torch.empty_like(u)
    sum_c, sum_c2 = _run(MOMENTS, u, v)
    extremum = sum_c2 / sum_c if sum_c > 0 and not fixed else 1.0
    if not fixed:
        track_(average, count, torch.tensor(extremum, dtype=torch.float32), momentum)
    _run(SPIKES, u, v, spikes, threshold=extremum)
    penalty = sum_c * sum_c / (sum_c2 if sum_c2 > 0 else 1.0)
    return u, spikes, torch.tensor(penalty, dtype=torch.float32), sum_c, sum_c2


def backward(
    u: Tensor, v_th: Tensor, sum_c: float, sum_c2: float, ds: Tensor, dh: Tensor, window: Window
) -> tuple[Tensor, Tensor]:
    """Return the gradients of u and v_th, of the arguments and results of `forward`.

    Args:
        ds, dh: gradients that arrive, as u and float32 ().
        window: of the surrogate gradient.
    """
    v, du = v_th.item(), torch.empty_like(u)
    q = sum_c / (sum_c2 if sum_c2 > 0 else 1.0)
    dv, _ = _run(GRADIENTS, u, v, du, ds, low=window[0], high=window[1], q=q, pull=2 * q * dh.item())
    sign = (v > 0) - (v < 0) if abs(v) >= LEAST else 0
    return du, v_th.new_tensor(sign * dv)


def _run(
    step: int, u: Tensor, v: float, output: Tensor | None = None, arriving: Tensor | None = None, **values: float
) -> list[float]:
    """Make a pass, and return its sums."""
    values["v"] = max(abs(v), LEAST)
    brief = u.dtype == torch.bfloat16
    call = library.HoyerLayer(len(u), torch.get_num_threads(), brief, _torch_threads(), u.data_ptr(), **values)
    call.output, call.arriving = (None if x is None else x.data_ptr() for x in (output, arriving))
    if library.LIBRARY.events_hoyer(call, step):
        raise MemoryError(f"not enough memory for a layer of {len(u)} neurons")
    return list(call.sums)


@cache
def _torch_threads() -> int | None:
    """Address of the function that makes OpenMP's threads, torch's, work; None where they are others than GNU's."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None
