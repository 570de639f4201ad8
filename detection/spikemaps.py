"""The places where a spiking network fires: the share of channels that fire at each place, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbones import hook_layers, spike_layers

MAX_ROWS = 8  # of time steps in a picture


@dataclass(frozen=True, eq=False)
class SpikeMap:
    """The places where one spike layer fires, on the part of its map that the image covers.

    Attributes:
        name: "stem", "c1", "c2", ... for the last spike layer in that part of the backbone, "neck c3", ... for the
            spikes that leave for the neck at that level.
        rate: (H', W') float32 in [0, 1], the share of channels that fire at each place, mean over the time steps.
        activity: share of all these neurons that fire, the mean of `rate`.
        steps: the maps of the single steps, in their order; none for one step.
    """

    name: str
    rate: np.ndarray
    activity: float
    steps: tuple[SpikeMap, ...] = ()


def rows_of(maps: Sequence[SpikeMap]) -> dict[int, list[SpikeMap]]:
    """Return the maps of at most `MAX_ROWS` time steps by number, evenly spread; none for a network of one step."""
    total = max((len(entry.steps) for entry in maps), default=0)
    chosen = dict.fromkeys(np.linspace(1, total, min(total, MAX_ROWS)).round().astype(int).tolist())
    return {step: [entry.steps[step - 1] for entry in maps] for step in chosen}


@torch.no_grad()
def spike_maps(model: nn.Module, image: Tensor) -> list[SpikeMap]:
    """Return the spike maps of one image, from the first layer to the last; none for a network without spike layers.

    A detector pads images on the right and below; what lies there is cut off the maps.

    Args:
        model: a detector or a `backbones.Classifier`, in evaluation mode.
        image: (3, H, W) in [0, 1], of the right size for a classifier.

    Raises:
        RuntimeError: the model is in training mode.
        ValueError: the image has another shape.
    """
    if model.training:
        raise RuntimeError("spike_maps: the model is in training mode; call model.eval() first")
    if image.dim() != 3 or not image.is_floating_point():
        raise ValueError(f"image: expected floats of shape (3, H, W), got {image.dtype} of shape {tuple(image.shape)}")
    image = image.to(next(model.parameters()).device)
    with record_spike_maps(model) as maps:
        model([image]) if hasattr(model, "transform") else model(image[None])
    return maps()


@contextmanager
def record_spike_maps(model: nn.Module) -> Iterator[Callable[[], list[SpikeMap]]]:
    """Watch passes over one image each; what it yields returns the spike maps of the last one, see `spike_maps`."""
    parts = {name: spike_layers(part) for name, part in model.backbone.parts().items()}
    layers = {name: list(found.values())[-1] for name, found in parts.items() if found}
    rates: dict[str, Tensor] = {}
    covered = [1.0, 1.0]  # share of the network's input that the image covers, vertically and horizontally

    def record(name: str, layer: nn.Module, u: Tensor, spikes: Tensor) -> None:
        rates[name] = (spikes != 0).float().mean(1)  # one image in all its time steps

    def note_padding(name: str, transform: nn.Module, images: Any, output: Any) -> None:
        batch = output[0]
        covered[:] = (size / whole for size, whole in zip(batch.image_sizes[0], batch.tensors.shape[-2:], strict=True))

    resizing = {"transform": model.transform} if hasattr(model, "transform") else {}  # a detector's
    with hook_layers(layers, after=record), hook_layers(resizing, after=note_padding):
        yield lambda: [_cut(name, rates[name].cpu().numpy(), covered) for name in layers if name in rates]


def _cut(name: str, rates: np.ndarray, covered: Sequence[float]) -> SpikeMap:
    rows, columns = (
        min(size, max(1, math.ceil(share * size - 1e-6))) for share, size in zip(covered, rates.shape[1:], strict=True)
    )
    rates = rates[:, :rows, :columns]
    steps = [SpikeMap(name, rate, float(rate.mean())) for rate in rates] if len(rates) > 1 else []
    mean = rates.mean(0) if steps else rates[0]
    return SpikeMap(name, mean, float(mean.mean()), tuple(steps))
