"""The training loop, one for every task."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from backbones import HoyerSpike, hoyer_penalties
from detection import config as settings
from detection.checkpoint import Run

ComputeLosses = Callable[[nn.Module, Any], dict[str, Tensor]]
Evaluate = Callable[[nn.Module], dict[str, Any]]


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    compute_losses: ComputeLosses,
    evaluate: Evaluate,
    best_by: str,
    config: settings.Recipe,
    run: Run,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Trains `model` and gives the last line of the run's log.

    Loss = sum of the task's losses + hoyer.weight * sum over spike layers of H. The model need not know of the
    second term: it is taken from the spike layers here, after each forward pass, for every task and head alike.

    Args:
        model: trained in place.
        batches: training batches, with a length that sets the schedule. Several processes share those of a
            `DataLoader`; of anything else each is given its own.
        compute_losses: (model, batch) -> scalar losses by name.
        evaluate: model -> metrics by name; called in evaluation mode every `train.eval_every` epochs and at the end.
        best_by: the metric whose highest value decides which weights are kept as "best".
        config: the recipe.
        run: takes the log line of each epoch and the weights.
        accelerator: device, mixed precision and processes.

    Raises:
        ValueError: there are no batches.
        FloatingPointError: the loss is not finite; names epoch, step, each loss and the images.
    """
    optimizer = build_optimizer(model, config.optimizer)
    model, prepared, batches = accelerator.prepare(model, optimizer, batches)
    if not len(batches):
        raise ValueError("no training batches: there are fewer images than processes")
    # From here on a process sees its share of the batches: the schedule counts those.
    schedule = build_schedule(optimizer, config.optimizer, len(batches) * config.train.epochs)
    console = Console(highlight=False, soft_wrap=True, quiet=not accelerator.is_main_process)
    average = average_weights(accelerator.unwrap_model(model), config.train.ema_decay)
    best, line, evaluated = -math.inf, {}, False
    with progress_bar(console) as progress:
        bar = progress.add_task("", total=len(batches))
        for epoch in range(1, config.train.epochs + 1):
            progress.reset(bar, description=f"epoch {epoch}/{config.train.epochs}")
            line = {"epoch": epoch, "step": epoch * len(batches), "lr": schedule.get_last_lr()[0]}
            line |= train_epoch(
                model,
                batches,
                prepared,
                schedule,
                compute_losses=compute_losses,
                hoyer=config.hoyer,
                clip_norm=config.optimizer.clip_norm,
                accelerator=accelerator,
                where=f"epoch {epoch}",
                after_step=lambda: average and average.update_parameters(accelerator.unwrap_model(model)),
                advance=lambda: progress.advance(bar),
            )
            if epoch % config.train.eval_every == 0 or epoch == config.train.epochs:
                started = time.perf_counter()
                model.eval()
                share_buffers(accelerator.unwrap_model(model))
                line |= evaluate(accelerator.unwrap_model(model))
                if average:
                    share_buffers(average.module)
                    line["ema"] = evaluate(average.module.eval())
                    line["ema"].pop("potentials", None)
                line["eval_seconds"] = round(time.perf_counter() - started, 3)
                if evaluated and epoch < config.train.epochs:
                    line.pop("potentials", None)  # histograms: the first and the last say how they moved
                evaluated = True
            if accelerator.is_main_process:
                whole = accelerator.unwrap_model(model)
                run.save(whole, "last")
                if average:
                    run.save(average.module, "ema")
                if line.get(best_by, -math.inf) > best:
                    best = line[best_by]
                    run.save(whole, "best")
                run.log(line)
            accelerator.log({key: value for key, value in line.items() if isinstance(value, float)}, step=epoch)
            console.print(summary(line, config.train.epochs))
    return line


def train_epoch(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: Optimizer,
    schedule: LRScheduler,
    *,
    compute_losses: ComputeLosses,
    hoyer: settings.Hoyer,
    clip_norm: float,
    accelerator: Accelerator,
    where: str,
    after_step: Callable[[], Any],
    advance: Callable[[], None],
) -> dict[str, Any]:
    """One pass over the data: "loss", "loss/NAME", H per layer (means over steps and processes), thresholds, speed."""
    model.train()
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))
    layer_sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))

    def mean(total: Tensor) -> float:
        return accelerator.reduce(total / step, "mean").item()

    num_images, started = 0, time.perf_counter()
    for step, batch in enumerate(batches, start=1):
        losses = compute_losses(model, batch)
        penalties = hoyer_penalties(accelerator.unwrap_model(model), hoyer.reduction)
        if penalties:
            losses["hoyer"] = hoyer.weight * torch.stack(list(penalties.values())).sum()
        loss = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(explain(losses, batch, f"{where}, step {step}"))
        accelerator.backward(loss)
        if clip_norm:
            accelerator.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        after_step()
        sums["loss"] += loss.detach()
        for name, value in losses.items():
            sums[f"loss/{name}"] += value.detach()
        for name, value in penalties.items():
            layer_sums[name] += value.detach()
        num_images += len(batch[0])
        advance()
    seconds = time.perf_counter() - started
    line: dict[str, Any] = {name: mean(value) for name, value in sums.items()}
    speed = num_images * accelerator.num_processes / seconds
    line |= {"seconds": round(seconds, 3), "images_per_second": round(speed, 3)}
    layers = spike_layers(accelerator.unwrap_model(model))
    if layers:
        line["hoyer_per_layer"] = {name: mean(value) for name, value in layer_sums.items()}
        line["v_th"] = {name: abs(layer.v_th.item()) for name, layer in layers.items()}
        line["extremum"] = {name: layer.extremum.mean().item() for name, layer in layers.items()}
    return line


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Gives every process the main one's running averages, which are saved: since the last step each has its own."""
    for buffer in model.buffers():
        buffer.copy_(broadcast(buffer))


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


def spike_layers(model: nn.Module) -> dict[str, HoyerSpike]:
    """Spike layers by module name, in the order of their definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HoyerSpike)}


def build_optimizer(model: nn.Module, config: settings.Optimizer) -> Optimizer:
    """AdamW, Adam with AMSGrad, or SGD with momentum 0.9; weight decay only on tensors of two or more dimensions."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    if config.name == "adam":
        return torch.optim.Adam(groups, lr=config.lr, amsgrad=True)
    return torch.optim.AdamW(groups, lr=config.lr)


def build_schedule(optimizer: Optimizer, config: settings.Optimizer, num_steps: int) -> LRScheduler:
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


def explain(losses: dict[str, Tensor], batch: Any, where: str) -> str:
    """The sentence for a loss that is not finite."""
    values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
    message = f"the loss is not finite in {where}: {values}"
    images = [target["image_id"] for target in batch[1] if isinstance(target, dict) and "image_id" in target]
    if images:
        message += f"; image ids {', '.join(str(int(image)) for image in images)}"
    return message + "; a lower optimizer.lr or optimizer.clip_norm may help"


def summary(line: dict[str, Any], num_epochs: int) -> str:
    """One epoch as one line of text."""
    parts = [f"epoch {line['epoch']}/{num_epochs}", f"loss {line['loss']:.4f}"]
    terms = [f"{key.removeprefix('loss/')} {value:.4f}" for key, value in line.items() if key.startswith("loss/")]
    parts.append(f"({', '.join(terms)})")
    parts += [f"{key} {line[key]:.4f}" for key in ("AP", "AP50", "top1", "activity") if key in line]
    parts += [f"ema {key} {line['ema'][key]:.4f}" for key in ("AP", "top1") if key in line.get("ema", {})]
    parts.append(f"{line['seconds'] + line.get('eval_seconds', 0.0):.1f} s")
    return "  ".join(parts)


def progress_bar(console: Console) -> Progress:
    """A bar for terminals; elsewhere nothing but the lines printed between."""
    columns: Sequence[Any] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
