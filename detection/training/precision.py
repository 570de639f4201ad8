"""Mixed precision: what "auto" stands for, and passes without an accelerator."""

from __future__ import annotations

import torch


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
