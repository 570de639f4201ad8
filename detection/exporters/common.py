"""Optional packages, sessions and comparison of results, for all exporters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def import_extra(name: str) -> Any:
    """Return the optional package `name`.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return __import__(name)
    except ImportError:
        raise ImportError(f"this needs {name}: pip install hoyer-det[export]") from None


class ParityError(ValueError):
    """Error for a file that does not do what the network does that it was made of."""


def open_session(model: bytes, level: Any, threads: int = 0) -> Any:
    """Return ONNX Runtime's session for a file's bytes, on the CPU; 0 threads: its own choice."""
    runtime = import_extra("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads = level, threads
    options.log_severity_level = 3
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def difference_of(ours: Tensor, theirs: Tensor, name: str) -> float:
    """Return the largest difference over the largest absolute value.

    Raises:
        ParityError: shapes differ, or something is not finite.
    """
    if ours.shape != theirs.shape:
        raise ParityError(f"the file's {name} has the shape {tuple(theirs.shape)}, PyTorch's {tuple(ours.shape)}")
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        raise ParityError(f"{name} is not finite")
    scale = ours.abs().max().item() if ours.numel() else 0.0
    return (ours - theirs).abs().max().item() / (scale or 1.0) if ours.numel() else 0.0


def pair(value: int | Sequence[int]) -> list[int]:
    """Return height and width of what torch takes as one number or two."""
    return [value, value] if isinstance(value, int) else list(value)
