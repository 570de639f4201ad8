"""Real values as the event-driven engine computes them itself: the first convolution, BatchNorms that are left."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .fold import add_module, module_of, norm_affine
from .integer import IntegerLayer, all_but_channels

FIXED_POINT = 32767  # largest absolute value of a `FixedPointConv`'s input


class FixedPointConv(nn.Module):
    """A convolution over real values, an image's, in fixed point: exact sums of products of 16-bit integers.

        y = scale * sum of W * clip(round(x / step), -32767, 32767) + bias,   sum of |W| <= 65535, sums below 2^31

    fifteen bits and a sign of the input, and as many of the weights as the sums permit. Weights are rounded so that
    their sum over each kernel stays: where an image has one colour, as a background may, hardly a potential moves.

    Args:
        layer: a convolution padded by zeros, without groups or dilation.

    Shape: as the layer's.

    Attributes:
        weight: int16, shape of the layer's.
        step: float32 (), of the input.
        scale, bias: float32 (C,).
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        weight = layer.weight.detach().double()
        flat = weight.abs().flatten(1)
        room = (2**31 - 1) // FIXED_POINT - flat.shape[1]  # rounding adds up to a unit per weight
        size = torch.maximum(flat.amax(1) / (FIXED_POINT - 1), flat.sum(1) / room)
        size = torch.where(size > 0, size, 1.0)
        self.stride, self.padding = layer.stride, layer.padding
        self.register_buffer("weight", _round_together(weight / size.view(-1, 1, 1, 1)).to(torch.int16))
        self.register_buffer("weight_scale", size)
        self.register_buffer("step", torch.ones(()))
        self.register_buffer("scale", size.float())
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float()
        self.register_buffer("bias", bias.clone())

    @staticmethod
    def suits(layer: nn.Module | None) -> bool:
        """Return whether a layer is a convolution that can be one."""
        plain = type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return plain and layer.groups == 1 and layer.dilation == (1, 1) and layer.weight[0].numel() <= 2**13

    def calibrate(self, x: Tensor, mean: Tensor, largest: Tensor) -> None:
        """Set the range of the input, 4 times that of `x` as others may be brighter, and keep channels' `mean` (C,)."""
        largest = 4 * x.abs().max()
        self.step.copy_(torch.where(largest > 0, largest, 1.0) / FIXED_POINT)
        self.scale.copy_(self.weight_scale * self.step.double())
        self.bias.add_(mean - self(x).mean(all_but_channels(x)))

    def forward(self, x: Tensor) -> Tensor:
        level = (x / self.step).clamp(-FIXED_POINT, FIXED_POINT).round()
        acc = F.conv2d(level.double(), self.weight.double(), stride=self.stride, padding=self.padding)
        return acc.float() * self.scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.weight.shape))}, stride={self.stride}, padding={self.padding}"


def _round_together(weight: Tensor) -> Tensor:
    """Return weights (C', C, kh, kw) rounded up or down, so that each kernel's sum is off by half a unit at most."""
    rounded = weight.round()
    error = (weight - rounded).flatten(2)
    missing = error.sum(2, keepdim=True).round()
    rank = error.argsort(2, descending=True).argsort(2)  # 0: the one that was rounded down furthest
    step = (rank < missing).double() - (rank >= rank.shape[2] + missing).double()
    return rounded + step.view_as(weight)


class ChannelAffine(nn.Module):
    """scale * x + shift per channel, two roundings: a BatchNorm that nothing could take in.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        for name, value in zip(("scale", "shift"), norm_affine(norm), strict=True):
            self.register_buffer(name, value.float())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(-1, 1, 1) + self.shift.view(-1, 1, 1)


def fix_points(
    integers: fx.GraphModule, calibrations: dict[str, tuple[Tensor, ...]], statistics: dict[str, tuple[Tensor, ...]]
) -> None:
    """Replace the first convolution, and BatchNorms that are left, by modules that compute the same anywhere."""
    first = next(
        (n for n in integers.graph.nodes if isinstance(module_of(integers, n), (nn.Conv2d, IntegerLayer))), None
    )
    for node in list(integers.graph.nodes):
        module = module_of(integers, node)
        if node is first and FixedPointConv.suits(module):
            node.target = add_module(integers, f"{node.target}_fixed_point", FixedPointConv(module))
            calibrations[node.target] = statistics[node.name]
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            node.target = add_module(integers, f"{node.target}_affine", ChannelAffine(module))
