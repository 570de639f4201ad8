"""Weights of a network with one threshold for each potential, for the same network with several."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .activations import SeveralThresholds


def add_thresholds(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights with which a network of several thresholds begins as the one of one threshold.

    As in Net2Net (Chen et al., arXiv:1511.05641), a wider network starts from the function of a narrower one. Of the
    neurons of a potential the middle one takes over the threshold, the others fire earlier and later, at equal
    distances over one standard deviation (by the norm in front), and the weights behind these are 0 until trained.
    The function is the old one but for the extremum, which is now taken over all neurons.

    Args:
        state: of a backbone, classifier or detector with one threshold; one of `model`'s own kind is returned as it is.
        model: with `SeveralThresholds` of the same structure. A layer of it that no BN or GroupNorm stands in front of
            begins with its own values.

    Shape: where `model` has k neurons in place of one, (k C,) of (C,) and (out, k C, ...) of (out, C, ...).
    """
    state, wanted, times = dict(state), model.state_dict(), 1
    norm: tuple[str, nn.Module] | None = None
    for name, module in model.named_modules():
        if isinstance(module, SeveralThresholds) and f"{name}.2.v_th" not in state and f"{name}.v_th" in state:
            times = module.thresholds
            state |= _neurons(name, module, state, norm)
            for key in [key for key in state if key.startswith(f"{name}.") and key not in wanted]:
                del state[key]
        elif not isinstance(module, nn.Sequential):
            norm = (name, module) if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) else None
    for key, value in wanted.items():
        if times > 1 and key in state and value.dim() > 1:
            state[key] = _behind(state[key], value.shape, times)
    return state


def _neurons(
    name: str, layer: SeveralThresholds, state: Mapping[str, Tensor], norm: tuple[str, nn.Module] | None
) -> dict[str, Tensor]:
    """The values of a layer of several thresholds, by its keys, from those of one threshold and of the norm before."""
    own = {f"{name}.{key}": value.clone() for key, value in layer.state_dict().items()}
    times = layer.thresholds
    if norm is None or (scale := state.get(f"{norm[0]}.weight")) is None:
        return own
    # Behind a BN these are the mean and the variance of every channel of a batch, with which the next changes nothing.
    mean, variance = state[f"{norm[0]}.bias"].repeat(times), scale.square().repeat(times)
    deviation = (variance + layer[1].eps).sqrt()
    distance = torch.linspace(0.5, -0.5, times)
    distance = (distance - distance[times // 2]).repeat_interleave(len(scale))
    norm_values = {"running_mean": mean, "running_var": variance}
    norm_values |= {"weight": deviation, "bias": mean + distance * deviation}
    own |= {f"{name}.1.{key}": value for key, value in norm_values.items()}
    for key in own:
        theirs = state.get(key.replace(f"{name}.2.", f"{name}."))  # none for the leak of several time steps
        if theirs is not None:
            own[key] = theirs if theirs.shape == own[key].shape else theirs.repeat(times)
    return own


def _behind(weight: Tensor, shape: torch.Size, times: int) -> Tensor:
    """The weights of a layer behind several neurons: those of the middle one, 0 for the others."""
    if shape != (weight.shape[0], times * weight.shape[1], *weight.shape[2:]):
        return weight
    wide = weight.new_zeros(shape).unflatten(1, (times, -1))
    wide[:, times // 2] = weight
    return wide.flatten(1, 2)
