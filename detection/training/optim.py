"""Optimisers, learning-rate schedules, averaged weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from backbones import arithmetic_layers
from detection.config import schema
from detection.training.muon import Muon


def build_optimizer(
    model: nn.Module,
    config: schema.Optimizer,
    predictions: Collection[str] = (),
    factors: Mapping[str, float] | None = None,
) -> Optimizer:
    """Return AdamW, Adam with AMSGrad, SGD with momentum 0.9, or Muon for the hidden convolutions.

    Weight decay only on tensors of two or more dimensions. Steps scale gradients as the arithmetic of a layer wants it.

    Args:
        model: its parameters that require a gradient.
        config: of the recipe.
        predictions: parts of names of the layers whose outputs are predictions, which Muon is not meant for.
        factors: on the learning rate, by parameter; 1 where there is none. The groups without one come first.
    """
    factors = factors or {}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    hidden = hidden_convolutions(model, predictions) & parameters.keys() if config.name == "muon" else set()

    def groups(names: Iterable[str], decay: float, lr: float) -> list[dict[str, Any]]:
        """A group for each factor, that of 1 first."""
        chosen: dict[float, list[nn.Parameter]] = {1.0: []}
        for name in names:
            chosen.setdefault(factors.get(name, 1.0), []).append(parameters[name])
        return [{"params": some, "weight_decay": decay, "lr": lr * factor} for factor, some in chosen.items()]

    rest = [name for name in parameters if name not in hidden]
    decayed = [name for name in rest if parameters[name].dim() >= 2]
    others = [name for name in rest if parameters[name].dim() < 2]
    adapted = groups(decayed, config.weight_decay, config.lr) + groups(others, 0.0, config.lr)
    match config.name:
        case "sgd":
            optimizer: Optimizer = SGD(adapted, lr=config.lr, momentum=0.9)
        case "adam":
            optimizer = Adam(adapted, lr=config.lr, amsgrad=True)
        case "adamw":
            optimizer = AdamW(adapted, lr=config.lr)
        case "muon":
            optimizer = Muon(
                groups([name for name in parameters if name in hidden], config.muon_decay, config.muon_lr),
                adapted,
                lr=config.lr,
                muon_lr=config.muon_lr,
                momentum=config.muon_momentum,
                newton_steps=config.muon_newton_steps,
                interval=config.muon_interval,
            )
    for layer in arithmetic_layers(model).values():
        optimizer.register_step_pre_hook(lambda *_, layer=layer: layer.before_step())
    return optimizer


def hidden_convolutions(model: nn.Module, predictions: Collection[str] = ()) -> set[str]:
    """Return the names of the weights of all convolutions but the first, depthwise ones and those of prediction.

    Convolutions that are no product of weights and inputs are left out, too.
    """
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    hidden = list(convolutions)[1:]
    return {
        f"{name}.weight"
        for name in hidden
        if convolutions[name].groups == 1
        and getattr(convolutions[name], "is_product", True)
        and not any(part in name.split(".") for part in predictions)
    }


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
