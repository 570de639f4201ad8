"""Where a spiking network fires: for one image, the share of channels that fire at each place, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from backbones import hook_layers, spike_layers

DPI = 100  # pixels per inch


@dataclass(frozen=True, eq=False)
class SpikeMap:
    """Where one spike layer fires, on the part of its map that the image covers.

    Attributes:
        name: "stem", "c1", "c2", ... for the last spike layer in that part of the backbone, "neck c3", ... for the
            spikes that leave for the neck at that level.
        rate: (H', W') float32 in [0, 1], the share of channels that fire at each place.
        activity: share of all these neurons that fire, the mean of `rate`.
    """

    name: str
    rate: np.ndarray
    activity: float


@torch.no_grad()
def spike_maps(model: nn.Module, image: Tensor) -> list[SpikeMap]:
    """The spike maps of one image, from the first layer to the last; none for a network without spike layers.

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
    parts = {name: spike_layers(part) for name, part in model.backbone.parts().items()}
    layers = {name: list(found.values())[-1] for name, found in parts.items() if found}
    rates: dict[str, Tensor] = {}
    covered = [1.0, 1.0]  # share of the network's input that the image covers, vertically and horizontally

    def record(name: str, layer: nn.Module, u: Tensor, spikes: Tensor) -> None:
        rates[name] = (spikes[0] != 0).float().mean(0)

    def note_padding(name: str, transform: nn.Module, images: Any, output: Any) -> None:
        batch = output[0]
        covered[:] = (size / whole for size, whole in zip(batch.image_sizes[0], batch.tensors.shape[-2:], strict=True))

    resizing = {"transform": model.transform} if hasattr(model, "transform") else {}  # a detector's
    image = image.to(next(model.parameters()).device)
    with hook_layers(layers, after=record), hook_layers(resizing, after=note_padding):
        model([image]) if resizing else model(image[None])
    return [_cut(name, rates[name].cpu().numpy(), covered) for name in layers if name in rates]


def draw_spike_maps(
    image: Tensor | np.ndarray,
    maps: Sequence[SpikeMap],
    *,
    title: str | None = None,
    columns: int = 4,
    vmax: float | None = None,
) -> Figure:
    """A figure of the image beside its spike maps, each titled with stage, size and activity.

    All maps share one colour scale, so that a dark map is one that fires little.

    Args:
        image: (3, H, W) tensor or (H, W, 3) array, floats in [0, 1] or uint8.
        maps: what `spike_maps` gives, or that of several images one after the other.
        title: above the picture.
        columns: pictures per row.
        vmax: rate of the brightest colour, in (0, 1]; None: what only a hundredth of the cells of some map exceeds.

    Raises:
        ValueError: there are no maps, as for a network without spike layers.
    """
    if not maps:
        raise ValueError("maps: there are none; a network without spike layers (activation relu) has no spike maps")
    if isinstance(image, Tensor):
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    height, width = image.shape[:2]
    if vmax is None:
        vmax = min(1.0, max(0.01, *(float(np.quantile(entry.rate, 0.99)) for entry in maps)))
    columns = min(columns, len(maps) + 1)
    num_rows = math.ceil((len(maps) + 1) / columns)
    cell = 2.8  # inches; very long images are drawn less long than they are
    ratio = min(max(height / width, 1 / 3), 2)
    figure = Figure(
        figsize=(columns * cell + 0.8, num_rows * (cell * ratio + 0.45) + (0.5 if title else 0.2)),
        dpi=DPI,
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.08)
    FigureCanvasAgg(figure)
    grid = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
        axes.set_box_aspect(ratio)
    grid[0].imshow(image, aspect="auto")
    grid[0].set_title(f"image\n{width}\N{MULTIPLICATION SIGN}{height} pixels", fontsize=9)
    for axes, entry in zip(grid[1:], maps, strict=False):
        rows, cells = entry.rate.shape
        shown = axes.imshow(entry.rate, cmap="inferno", vmin=0, vmax=vmax, aspect="auto", interpolation="nearest")
        axes.set_title(
            f"{entry.name}\n{cells}\N{MULTIPLICATION SIGN}{rows}, {100 * entry.activity:.1f} % active", fontsize=9
        )
    bar = figure.colorbar(shown, ax=list(grid), aspect=30, pad=0.01, extend="max" if vmax < 1 else "neither")
    bar.set_label("share of channels that fire", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _cut(name: str, rate: np.ndarray, covered: Sequence[float]) -> SpikeMap:
    rows, columns = (
        min(size, max(1, math.ceil(share * size - 1e-6))) for share, size in zip(covered, rate.shape, strict=True)
    )
    rate = rate[:rows, :columns]
    return SpikeMap(name, rate, float(rate.mean()))
