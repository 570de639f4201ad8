"""The memory that a training takes."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path

import torch


def forget_peak_memory() -> None:
    """Let `peak_memory` begin anew, so that what reading the data took does not count; on Linux and GPUs alone."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> float:
    """Return the most memory of this process in MiB; on a GPU that of its tensors there."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    status = Path("/proc/self/status")
    # What getrusage says may be that of the process that started this one.
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return round(int(found[1] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / unit, 1)
