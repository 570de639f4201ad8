"""The part that the Hoyer regulariser has in the gradients of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..hoyer import LEAST, add_surrogate_, num_processes, regulariser_gradient
from ..spiking import SpikeLayer, spike_layers
from .record import hook_layers


@contextmanager
def record_gradient_shares(model: nn.Module) -> Iterator[dict[str, dict[str, float]]]:
    """Record the regulariser's share in the gradients of each Hoyer layer, over the passes while the context is open.

    share = sum |ours| / (sum |ours| + sum |task's|), in [0, 1], for "potential" over the neurons and for "threshold"
    over the v_th; 0 where there is no gradient at all. Nothing but sums is kept for it, and no gradient changes. Layers
    of several time steps are left out: there the task's gradient comes through time, too.

    Yields:
        {"potential": {layer: share}, "threshold": {layer: share}}, filled when the context closes.
    """
    found: dict[str, dict[str, float]] = {"potential": {}, "threshold": {}}
    sums: dict[str, tuple[Tensor, ...]] = {}  # of both quantities, ours and the task's in turn
    nodes: list[Any] = []  # of the graph, whose gradients are still to come

    def watch(name: str, layer: SpikeLayer, u: Tensor, spikes: Tensor) -> None:
        if spikes.grad_fn is not None and spikes.grad_fn.name() in ("SpikesAndPenaltyBackward", "_LayerBackward"):
            index = len(nodes)
            nodes.append(spikes.grad_fn)
            spikes.grad_fn.register_prehook(lambda gradients: count(name, layer, index, *gradients))

    def count(name: str, layer: SpikeLayer, index: int, ds: Tensor | None, dh: Tensor | None) -> None:
        z, v, *pair = nodes[index].saved_tensors
        if not pair:  # of `fused_layer`
            pair = [torch.as_tensor(value, dtype=torch.float32, device=z.device) for value in nodes[index].sums]
            z = z / v.abs().clamp_min(LEAST).to(z.dtype) if nodes[index].native else z
        sum_c, sum_c2 = pair
        nodes[index] = None  # which holds its hook, and this the node
        z = z.to(sum_c.dtype)
        share = num_processes() if layer.sync else 1
        ours, task = torch.zeros_like(z), torch.zeros_like(z)
        if dh is not None:
            ours = regulariser_gradient(z, sum_c, sum_c2, dh * share)
        if ds is not None:
            add_surrogate_(task, ds, z, layer.window)
        over_thresholds = [(z * each).sum_to_size(v.shape) for each in (ours, task)]
        parts = ours.abs().sum(), task.abs().sum(), *over_thresholds
        before = sums.get(name, (0, 0, 0, 0))
        sums[name] = tuple(one + other for one, other in zip(before, parts, strict=True))

    layers = spike_layers(model)
    with hook_layers(layers, after=watch):
        yield found
    for name in [name for name in layers if name in sums]:
        for quantity, ours, task in zip(found, sums[name][::2], sums[name][1::2], strict=True):
            ours, task = ours.abs().sum(), task.abs().sum()
            found[quantity][name] = (ours / (ours + task)).item() if ours + task > 0 else 0.0
