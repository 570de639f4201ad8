"""Images resized and padded and overlapping boxes left out, for detectors, by the kernels.

Results have the bits of torch's and torchvision's own operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import library


def has_vision(x: Tensor) -> bool:
    """Return whether the functions of this module take a tensor: float32 on the CPU, and no gradient is wanted."""
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled())
    return plain and library.current() != "torch"


def resize_and_pad(image: Tensor, mean: Tensor, size: tuple[int, int], out: Tensor) -> None:
    """Write interpolate(image - mean) + mean, bilinear without aligned corners, into `out`, and the mean behind it.

    Args:
        image: float32 (C, H, W), none of them 0.
        mean: float32 (C,).
        size: height and width of what is resized.
        out: float32 (C, H', W'), contiguous, not smaller.

    Raises:
        MemoryError: there is not enough memory.
    """
    image, mean = image.contiguous(), mean.contiguous()
    call = library.EventResize(*image.shape, *size, *out.shape[1:], torch.get_num_threads())
    call.input, call.mean, call.output = image.data_ptr(), mean.data_ptr(), out.data_ptr()
    if library.LIBRARY.events_resize(call):
        raise MemoryError(f"not enough memory to resize an image of {tuple(image.shape)}")


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor | None, threshold: float, most: int) -> Tensor:
    """Return the numbers of up to `most` boxes, the best first, that overlap with no better one of their label.

    Those of equal scores are in torchvision's order: with labels, in that of torch's sorting, which depends on all.

    Args:
        boxes: float32 (N, 4), x1, y1, x2, y2.
        scores: float32 (N,).
        labels: int64 (N,) of 32 bits; None: all are alike.
        threshold: of the overlap, over the union; larger ones are left out.
        most: of the boxes.

    Raises:
        MemoryError: there is not enough memory.
    """
    boxes, order = boxes.contiguous(), scores.sort(stable=True, descending=True).indices
    if labels is None:
        return _left(boxes, order, None, threshold, most)
    kept = _left(boxes, order, labels, threshold, most + 1)
    ranked = scores[kept]
    if bool((ranked[1:] == ranked[:-1]).any()):
        kept = _left(boxes, order, labels, threshold, len(boxes)).sort().values
        kept = kept[scores[kept].sort(descending=True).indices]
    return kept[:most]


def _left(boxes: Tensor, order: Tensor, labels: Tensor | None, threshold: float, most: int) -> Tensor:
    kept = torch.empty(min(most, len(boxes)), dtype=torch.int64)
    call = library.EventBoxes(len(boxes), len(kept), boxes.data_ptr(), order.data_ptr())
    call.labels = None if labels is None else labels.data_ptr()
    call.threshold, call.kept = threshold, kept.data_ptr()
    number = library.LIBRARY.events_suppress(call)
    if number < 0:
        raise MemoryError(f"not enough memory for {len(boxes)} boxes")
    return kept[:number]
