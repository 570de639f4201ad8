"""Muon for hidden convolutions, AdamW for everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, Jordan et al. 2024: steepest at 0


class Muon(AdamW):
    """Momentum orthogonalised by Newton-Schulz steps, after K. Jordan et al., "Muon" (2024).

    With the gradient G of a weight, flattened to a matrix (output channels, the rest), and its momentum M:

        M <- mu M + (1 - mu) G,   U = mu M + (1 - mu) G          Nesterov's
        O = the nearest matrix to U with equal singular values, U = S V D -> S D, nearly
        W <- (1 - lr decay) W - lr sqrt(max(1, rows / columns)) O

    torch.optim.Muon takes matrices alone, one after the other in every process. Here weights of convolutions are taken
    too, equal shapes are orthogonalised together, the processes of a training share that work, and `interval` spreads
    it over several steps. In bfloat16, as published.

    Args:
        matrices: groups for Muon, as torch's optimisers take them: weights of two or more dimensions.
        others: groups for AdamW.
        lr: of `others` that have none of their own.
        muon_lr: of such `matrices`.
        momentum: mu.
        newton_steps: of the iteration.
        interval: steps between two orthogonalisations of a weight; the last O is applied in between.
    """

    def __init__(
        self,
        matrices: Iterable[dict[str, Any]],
        others: Iterable[dict[str, Any]],
        *,
        lr: float,
        muon_lr: float,
        momentum: float = 0.95,
        newton_steps: int = 3,
        interval: int = 1,
    ) -> None:
        own = {"muon": True, "lr": muon_lr, "momentum": momentum, "newton_steps": newton_steps, "interval": interval}
        groups = [own | group for group in matrices] + [group | {"muon": False} for group in others]
        super().__init__([group for group in groups if group["params"]], lr=lr)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step; see `torch.optim.Optimizer.step`."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step(group)
        return loss

    def _step(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        due: dict[tuple[int, int], list[int]] = defaultdict(list)
        states = [self.state[parameter] for parameter in parameters]
        for number, (parameter, state) in enumerate(zip(parameters, states, strict=True)):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.int64)
                state["momentum"] = torch.zeros_like(parameter)
            # In turn, so that every step has its part of the work; all of them in the first step.
            if "update" not in state or (int(state["step"]) + number) % group["interval"] == 0:
                rows = parameter.shape[0]
                due[rows, parameter.numel() // rows].append(number)
            state["step"] += 1
        # All at once: on a GPU the number of kernels counts.
        momenta, grads = [state["momentum"] for state in states], [parameter.grad for parameter in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        for same in due.values():
            blends = torch._foreach_lerp([grads[i] for i in same], [momenta[i] for i in same], group["momentum"])
            matrices = torch.stack([blend.flatten(1).bfloat16() for blend in blends])
            for number, update in zip(same, orthogonalise_shared(matrices, group["newton_steps"]), strict=True):
                parameter = parameters[number]
                # In its shape, type and memory order.
                states[number]["update"] = torch.empty_like(parameter).copy_(update.view(parameter.shape))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        scales: dict[float, list[int]] = defaultdict(list)
        for number, parameter in enumerate(parameters):
            scales[math.sqrt(max(1.0, parameter.shape[0] ** 2 / parameter.numel()))].append(number)
        for scale, same in scales.items():
            updates = [states[number]["update"] for number in same]
            torch._foreach_add_([parameters[number] for number in same], updates, alpha=-group["lr"] * scale)


def orthogonalise_shared(matrices: Tensor, steps: int) -> Tensor:
    """Return what `orthogonalise` does, its work shared by the processes of torch.distributed.

    Every process must call it with equal matrices; all get the same bits.

    Shape: (K, rows, columns) bfloat16 -> the same.
    """
    number = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if number == 1:
        return orthogonalise(matrices, steps)
    share = -(-len(matrices) // number)
    start = dist.get_rank() * share
    own = orthogonalise(matrices[start : start + share], steps) if start < len(matrices) else matrices[:0]
    padded = torch.zeros(share, *matrices.shape[1:], dtype=torch.float32, device=matrices.device)
    padded[: len(own)] = own.float()
    parts = [torch.empty_like(padded) for _ in range(number)]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[: len(matrices)].to(matrices.dtype)


def orthogonalise(matrices: Tensor, steps: int) -> Tensor:
    """Return matrices with the singular vectors of the given ones and singular values near 1 (0.7 to 1.2).

    X <- a X + (b A + c A^2) X with A = X X^T, from X / |X|.

    Shape: (K, rows, columns) bfloat16 -> the same.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp_min(1e-7).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
