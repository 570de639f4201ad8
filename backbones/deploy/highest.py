"""Several thresholds of a potential with one spike at most: that of the highest threshold reached.

A potential beyond a threshold is beyond all lower ones. So of the bits s_1 >= ... >= s_k of its neurons the last 1 says
everything, and with s'_j = s_j (1 - s_{j+1}) and W'_j = W_1 + ... + W_j a layer behind them adds up the same,

    sum of W_j s_j = sum of W'_j s'_j,

from one spike in place of up to k.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from .fold import ChannelThreshold, add_module, clean_up, copies_of, module_of

MOST = 8  # thresholds of a potential: `MAX_OUTPUTS` of the kernels, whose package imports this module


class Highest(nn.Module):
    """Of the neurons of each potential only the last that fires, one set of channels behind the other.

    Shape: 0/1, k times (N, C, *) -> (N, k C, *).
    """

    def forward(self, *spikes: Tensor) -> Tensor:
        above, kept = torch.zeros_like(spikes[0]), []
        for each in reversed(spikes):
            kept.append(each * (1 - above))
            above = torch.maximum(above, each)
        return torch.cat(kept[::-1], dim=1)


def fire_once(folded: fx.GraphModule) -> fx.GraphModule:
    """Return the same network with one spike for each potential, wherever convolutions alone see those of several.

    Args:
        folded: of `fold`; not changed.
    """
    network = copy.deepcopy(folded)
    for node in list(network.graph.nodes):
        layer = module_of(network, node)
        times = copies_of(node.args[0]) if isinstance(layer, ChannelThreshold) else 0
        behind = [module_of(network, user) for user in node.users]
        if not 1 < times <= MOST or not all(isinstance(each, nn.Conv2d) and each.groups == 1 for each in behind):
            continue
        level, sign = layer.threshold.double().view(times, -1), layer.sign.double().view(times, -1)
        rising, falling = (((sign == way) & level.isfinite()).any(0) for way in (1, -1))
        if bool((rising & falling).any()):
            continue
        sign = torch.where(falling, -1.0, 1.0).double()
        order = level.argsort(dim=0, stable=True)
        source, level = node.args[0].args[0][0], level.gather(0, order)
        with network.graph.inserting_before(node):
            parts = []
            for index, each in enumerate(level):
                threshold = ChannelThreshold(each, sign, dtype=layer.threshold.dtype)
                name = add_module(network, f"{node.target}_{index}", threshold)
                parts.append(network.graph.call_module(name, (source,)))
            highest = network.graph.call_module(add_module(network, f"{node.target}_highest", Highest()), tuple(parts))
        for user, conv in zip(list(node.users), behind, strict=True):
            user.target = add_module(network, f"{user.target}_summed", _summed(conv, order))
        node.replace_all_uses_with(highest)
        network.graph.erase_node(node)
    clean_up(network)
    return network


def _summed(conv: nn.Conv2d, order: Tensor) -> nn.Conv2d:
    """`conv` with the sums of its weights for the neurons up to each, in the order (k, C) of their thresholds."""
    summed = copy.deepcopy(conv)
    weight = conv.weight.detach().double().unflatten(1, order.shape)
    weight = weight.gather(1, order[None, ..., None, None].expand_as(weight)).cumsum(1).flatten(1, 2)
    summed.weight = nn.Parameter(weight.to(conv.weight.dtype))
    return summed
