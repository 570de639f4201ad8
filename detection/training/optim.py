"""Optimisers, learning-rate schedules, averaged weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detection.config import schema


def build_optimizer(model: nn.Module, config: schema.Optimizer) -> Optimizer:
    """AdamW, Adam with AMSGrad, or SGD with momentum 0.9; weight decay only on tensors of two or more dimensions."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return SGD(groups, lr=config.lr, momentum=0.9)
    if config.name == "adam":
        return Adam(groups, lr=config.lr, amsgrad=True)
    return AdamW(groups, lr=config.lr)


def build_schedule(optimizer: Optimizer, config: schema.Optimizer, num_steps: int) -> LRScheduler:
    """Learning rate by optimiser step: linear warm-up, then cosine to zero or steps."""
    warmup = min(config.warmup_steps, num_steps // 2)
    if config.schedule == "cosine":
        main: LRScheduler = CosineAnnealingLR(optimizer, max(1, num_steps - warmup))
    else:
        milestones = [max(1, round(fraction * num_steps) - warmup) for fraction in config.milestones]
        main = MultiStepLR(optimizer, milestones, config.gamma)
    if not warmup:
        return main
    start = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [start, main], [warmup])


def average_weights(model: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of weights and buffers, so of the extremum too; None for a decay of 0."""
    if not decay:
        return None
    blend = get_ema_multi_avg_fn(decay)

    def update(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            blend(averaged, current, num_averaged)
        else:  # counters of batches
            for count, value in zip(averaged, current, strict=True):
                count.copy_(value)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True).requires_grad_(False)
