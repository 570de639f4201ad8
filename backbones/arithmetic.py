"""Networks to compare with: convolutions of 1-bit weights, and convolutions that add where others multiply.

"binary", after XNOR-Net (Rastegari et al., arXiv:1603.05279) and Bi-Real net (Liu et al., arXiv:1808.00278):

    y = conv(s(x), a s(w)),  s(v) = 1 where v >= 0, else -1,  a = mean |w| over the n weights of an output channel
    dx = ds   where |x| <= 1, else 0          the straight-through gradient of the activation `Sign`
    dw = (1/n + a [|w| <= 1]) dW              W = a s(w), XNOR-Net's; Bi-Real net's is that without 1/n

"adder", after AdderNet (Chen et al., arXiv:1912.13200), over the k weights of a layer and the n inputs of an output:

    y = -sum |x - w|
    dw = sum (x - w) dy                       full precision, not the sign that is the derivative
    dx = sum clip(w - x, -1, 1) dy
    dw is multiplied by eta sqrt(k) / ||dw||_2 in front of each step: the layer's own learning rate, eta = 0.2. It acts
        with SGD, with which the authors train; Adam divides by the gradient's size anyway

Both leave the first convolution, which sees pixels, and the linear layers of a classifier as they are, as the papers
do. A 1x1 convolution of a shortcut stays an ordinary one in a binary network, as in Bi-Real net, and adds in an adder
network, as in AdderNet's residual networks. Depthwise convolutions are in none of the papers and refused. A detector's
neck and head keep ordinary convolutions. The scale a costs nothing in use, it goes into the BatchNorm that follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .spiking import register_neuron

ETA = 0.2  # as in the authors' code
# Numbers of a slice of differences, which the cache of a core holds, and of the patches that are there at one time. A
# GPU, which runs whole slices at once, takes larger ones.
SLICE, PATCHES, ON_GPU = 2**18, 2**21, 2**6


class ArithmeticConv2d(nn.Conv2d):
    """Base of the convolutions of `ARITHMETICS`: shapes and arguments of `nn.Conv2d`, one group, padding by zeros.

    Attributes:
        arithmetic: its name there.
        accumulates: additions for a pair of an input and a weight, which take the place of a MAC.
        weight_bits: of a weight in use.
        is_product: whether it is linear in x and in what is made of its weights.

    Raises:
        ValueError: several groups, or another padding.
    """

    arithmetic: str
    accumulates: int = 1
    weight_bits: int = 32
    is_product: bool = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.groups != 1:
            raise ValueError(f"{type(self).__name__}: one group only, got {self.groups}")
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise ValueError(f"{type(self).__name__}: only padding by a number of zeros, got {self.padding!r}")

    @classmethod
    def take_over(cls, conv: nn.Conv2d) -> Self:
        """Return a layer in the place of an ordinary one that was just made."""
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        layer = cls(*shape, conv.groups, conv.bias is not None, conv.padding_mode, device="meta")
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer

    def before_step(self) -> None:
        """Change the weight's gradient, which is complete, in front of a step of the optimiser."""


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return sign(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return gradient * (u.abs() <= 1)


class _BinaryWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        scale = weight.abs().mean((1, 2, 3), keepdim=True)
        ctx.save_for_backward(weight, scale)
        return scale * sign(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        weight, scale = ctx.saved_tensors
        return gradient * (scale * (weight.abs() <= 1) + 1 / weight[0].numel())


def sign(value: Tensor) -> Tensor:
    """Return 1 where value >= 0, else -1, in its dtype, without gradient."""
    return (value >= 0).to(value.dtype).mul_(2).sub_(1)


class Sign(nn.Module):
    """Activation of a binary network: 1 where u >= 0, else -1, with the straight-through gradient for |u| <= 1.

    Shape: any, kept.
    """

    def forward(self, u: Tensor) -> Tensor:
        return _Sign.apply(u)


@register_neuron("sign", spiking=False, words="signs")
def make_sign(channels: int) -> Sign:
    """Return the activation of a binary network."""
    return Sign()


class BinaryConv2d(ArithmeticConv2d):
    """Convolution of 1-bit weights, times a scale per output channel; see this module's text.

    What falls into the padding is 0, neither 1 nor -1.
    """

    arithmetic, weight_bits = "binary", 1

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, _BinaryWeight.apply(self.weight), self.bias)


class AdderConv2d(ArithmeticConv2d):
    """The negative L1 distance of each patch to each filter; see this module's text. Weights begin as N(0, 1).

    In float32 or wider, also under mixed precision. The padding's zeros are inputs like others, |0 - w| each. Beside
    input and output it needs memory for a few million numbers, whatever the size of the layer.
    """

    arithmetic, accumulates, is_product = "adder", 2, False

    @classmethod
    def take_over(cls, conv: nn.Conv2d) -> Self:
        layer = super().take_over(conv)
        layer.reset_parameters()
        return layer

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    # Of the loop over slices the compiler would make as many copies. `torch.compiler.disable` would import the compiler
    # with this module, this one does when it is called.
    @torch._disable_dynamo
    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        geometry = {key: getattr(self, key) for key in ("kernel_size", "dilation", "padding", "stride")}
        with torch.autocast(x.device.type, enabled=False):
            y = _Distance.apply(x.to(wide), self.weight.to(wide), geometry)
        y = y.to(self.weight.dtype)  # narrower in a network of 16 bits
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    @torch.no_grad()
    def before_step(self) -> None:
        gradient = self.weight.grad
        if gradient is not None:
            gradient.mul_(ETA * math.sqrt(gradient.numel()) / gradient.norm().clamp_min(1e-12))


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        sides = zip(x.shape[2:], *geometry.values(), strict=True)
        height, width = (
            (side + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for side, kernel, gap, pad, step in sides
        )
        filters, num_rows = weight.flatten(1), _slice_rows(weight)
        y = x.new_empty(len(x) * height * width, len(filters))
        start = 0
        for images in _groups(x, weight, height * width):
            for rows in _patches(images, geometry).split(num_rows):
                torch.sum((filters - rows[:, None]).abs_(), 2, out=y[start : start + len(rows)])
                start += len(rows)
        return y.neg_().view(len(x), height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        filters, num_rows = weight.flatten(1), _slice_rows(weight)
        dw, dx, start = -filters * gradient.sum((0, 2, 3))[:, None], [], 0
        for images in _groups(x, weight, gradient[0, 0].numel()):
            patches = _patches(images, ctx.geometry)
            dy = gradient[start : start + len(images)].flatten(2).transpose(1, 2).flatten(0, 1)
            start += len(images)
            dw.addmm_(dy.T, patches)
            if not ctx.needs_input_grad[0]:
                continue
            for rows, d in zip(patches.split(num_rows), dy.split(num_rows), strict=True):
                rows.copy_(torch.bmm(d[:, None], (filters - rows[:, None]).clamp_(-1, 1))[:, 0])  # not needed again
            columns = patches.view(len(images), -1, filters.shape[1]).transpose(1, 2)
            dx.append(F.fold(columns, x.shape[2:], **ctx.geometry))
        return torch.cat(dx) if dx else None, dw.view_as(weight), None


def _patches(images: Tensor, geometry: dict[str, Any]) -> Tensor:
    """Every patch as a row, padding included: (N, C, H, W) -> (N L, C kh kw), L outputs per image and channel."""
    return (
        F.unfold(images, **geometry).transpose(1, 2).reshape(-1, images.shape[1] * math.prod(geometry["kernel_size"]))
    )


def _slice_rows(weight: Tensor) -> int:
    return max(1, SLICE * (1 if weight.device.type == "cpu" else ON_GPU) // weight.numel())


def _groups(x: Tensor, weight: Tensor, num_outputs: int) -> Iterator[Tensor]:
    """Images in groups whose patches are there at one time."""
    most = PATCHES * (1 if x.device.type == "cpu" else ON_GPU)
    return iter(x.split(max(1, most // max(1, num_outputs * weight[0].numel()))))


class Arithmetic(NamedTuple):
    """An entry of `ARITHMETICS`.

    Attributes:
        layer: class of the convolutions; None: ordinary ones.
        activation: neuron of the network where none is named.
        words: the network in two or three words, for tables.
        shortcuts: whether convolutions of shortcuts are such ones, too.
    """

    layer: type[ArithmeticConv2d] | None
    activation: str
    words: str
    shortcuts: bool = True


ARITHMETICS = {
    "float": Arithmetic(None, "hoyer", "ordinary network"),
    "binary": Arithmetic(BinaryConv2d, "sign", "binary network", shortcuts=False),
    "adder": Arithmetic(AdderConv2d, "relu", "adder network"),
}
"""The kinds of convolutions by the names that recipes and `create` know; a further one is a further entry."""


def find_arithmetic(name: str) -> Arithmetic:
    """Return an entry of `ARITHMETICS`.

    Raises:
        ValueError: there is none of this name.
    """
    if not isinstance(name, str) or name not in ARITHMETICS:
        raise ValueError(f"arithmetic must be one of {', '.join(map(repr, ARITHMETICS))}, got {name!r}")
    return ARITHMETICS[name]


def convert(backbone: nn.Module, arithmetic: str) -> None:
    """Put convolutions of an arithmetic in the place of the ordinary ones of a new backbone, all but the first.

    Raises:
        ValueError: a convolution has several groups.
    """
    layer, _, _, shortcuts = find_arithmetic(arithmetic)
    if layer is None:
        return
    convs = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d)}
    for name, conv in list(convs.items())[1:]:
        if conv.groups > 1:
            raise ValueError(
                f"arithmetic {arithmetic!r}: not for depthwise convolutions, which {type(backbone).__name__} has "
                f"({name}); choose a network without them, such as vgg11 or resnet18"
            )
        if shortcuts or "shortcut" not in name.split("."):
            backbone.set_submodule(name, layer.take_over(conv))


def arithmetic_layers(model: nn.Module) -> dict[str, ArithmeticConv2d]:
    """Return the convolutions of another arithmetic of any module by name, in the order of their definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ArithmeticConv2d)}
