"""Active inputs of a tensor at each position, step by step, and how many outputs each position reaches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init


class Counts(NamedTuple):
    """Values other than 0 of one tensor.

    Attributes:
        per_position: for each time step, at each position over all images and channels, float64 on the CPU.
        active: for each time step, in all.
        is_binary, is_sign: whether every value is 0 or 1, or -1 or 1.
    """

    per_position: list[Tensor]
    active: list[int]
    is_binary: bool
    is_sign: bool


def count(x: Tensor, steps: int) -> Counts:
    """Return the counts of a tensor whose first dimension has so many time steps.

    In few passes over the memory, as this runs for every layer of every batch.
    """
    x = x.detach()
    is_binary, is_sign = True, False
    if x.numel():
        low, high = torch.aminmax(x)
        # In [0, 1] no x - x^2 is negative, and it is 0 at the ends only, also after rounding. NaN fails the first test.
        is_binary = bool((low >= 0) & (high <= 1)) and not bool(torch.addcmul(x, x, x, value=-1).max())
        is_sign = bool((low.abs() == 1) & (high.abs() == 1)) and bool((x.abs() == 1).all())
    over = (0, 1) if x.dim() == 4 else 0
    # Sums of fewer than 2^24 ones are exact in float32.
    per_position = [
        each.sum(over, dtype=torch.float32) if is_binary else (each != 0).sum(over, dtype=torch.int32)
        for each in x.tensor_split(steps)
    ]
    per_position = [each.cpu().double() for each in per_position]
    return Counts(per_position, [int(each.sum()) for each in per_position], is_binary, is_sign)


def geometry(conv: nn.Conv2d, axis: int) -> tuple[Any, ...]:
    """Return kernel size, stride, padding, dilation and padding mode along an axis."""
    padding = conv.padding if isinstance(conv.padding, str) else conv.padding[axis]
    return conv.kernel_size[axis], conv.stride[axis], padding, conv.dilation[axis], conv.padding_mode


def fanout_of(size: int, kernel_size: int, stride: int, padding: int | str, dilation: int, mode: str) -> Tensor:
    """Return how many outputs each of `size` inputs in a row reaches, through its copies in the padding too.

    That is the gradient of the sum of the outputs, all weights being 1: (size,) float64.
    """
    options = {"padding": padding, "dilation": dilation, "padding_mode": mode, "dtype": torch.float64}
    with torch.inference_mode(False), torch.enable_grad():
        conv = skip_init(nn.Conv1d, 1, 1, kernel_size, stride, bias=False, **options)
        nn.init.ones_(conv.weight)
        x = torch.zeros(1, 1, size, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(conv(x).sum(), x)[0].flatten()
