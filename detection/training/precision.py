"""Precision: what "auto" stands for, passes without an accelerator, numbers that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below it even the least gradients of a sane loss would be lost: what overflows then is not the precision's fault.
LEAST_SCALE = 2.0**-10


def choose_precision(precision: str) -> str:
    """Return the precision that "auto" stands for here, bf16 where it is multiplied natively; others as they are."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "no"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context of passes in a recipe's `train.precision` on a device."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choose_precision(precision))
    usable = dtype is not None and not (dtype == torch.float16 and device.type == "cpu")
    return torch.autocast(device.type, dtype if usable else None, enabled=usable)


class _OfNarrowMaps(nn.Conv2d):
    """A convolution that sees a map narrower than its stride beside columns of zeros: they change no output."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        missing = self.stride[1] - x.shape[-1]
        return super()._conv_forward(F.pad(x, (0, missing)) if missing > 0 else x, weight, bias)


def widen_narrow_maps(model: nn.Module) -> None:
    """Let strided convolutions train on maps narrower than the stride in bfloat16 on a CPU; changes their class.

    oneDNN leaves parts of the gradient of such a convolution's weights unwritten (seen with torch 2.11 and 2.14, for
    kernels of 3, 5 and 7): what is in the memory by chance would be learnt.
    """
    for module in model.modules():
        strided = isinstance(module, nn.Conv2d) and module.stride[1] > 1
        if strided and module.kernel_size[1] == 2 * module.padding[1] + 1:
            module.__class__ = _with_narrow_maps(type(module))


@cache
def _with_narrow_maps(kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    return type(kind.__name__, (_OfNarrowMaps, kind), {})


def require_finite(
    loss: Tensor, norm: Tensor, losses: Mapping[str, Tensor], scaler: Any, where: str, images: str
) -> None:
    """Raise FloatingPointError if the loss of a step, or the norm of its gradient, is not finite.

    With fp16 a gradient may overflow: the scaler then skips the step and scales less. Only at a scale that leaves
    nothing to blame but the network it is an error.

    Args:
        loss, norm: shape ().
        losses: by name, for the message.
        scaler: of the gradients; None: not fp16.
        where: the step, in words.
        images: of the step, in words.
    """
    finite_loss, finite_norm = torch.isfinite(torch.stack([loss, norm.to(loss.device)])).tolist()
    overflow = scaler is not None and scaler.get_scale() >= LEAST_SCALE
    if finite_loss and (finite_norm or overflow):
        return
    values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
    raise FloatingPointError(
        f"the {'gradient' if finite_loss else 'loss'} is not finite in {where}: {values}"
        f"{f'; {images}' if images else ''}; a lower optimizer.lr or optimizer.clip_norm may help"
    )
