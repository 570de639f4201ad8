"""The training loop, one for every task."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object, send_to_device
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from backbones import HoyerSpike, hoyer_penalties, recompute_activations
from detection import config as settings
from detection import resume as going_on
from detection.checkpoint import Run
from detection.distributed import any_process, share_buffers
from detection.resume import Interrupted, SaveClock, StopSignals, random_states

ComputeLosses = Callable[[nn.Module, Any], dict[str, Tensor]]
Evaluate = Callable[[nn.Module], dict[str, Any]]

# Below it even the least gradients of a sane loss would be lost: what overflows then is not the precision's fault.
LEAST_SCALE = 2.0**-10


class Batches(Protocol):
    """Training batches of this process, as many in every epoch and in every process."""

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """The next pass is that of `epoch`, from 1, without its first `first` batches."""

    def __iter__(self) -> Any: ...

    def __len__(self) -> int: ...


@dataclass
class Training:
    """Everything that changes while a network is trained: what goes on, must have all of it.

    Attributes:
        model: as accelerate prepared it, wrapped where there are several processes.
        optimizer: likewise.
        schedule: of the learning rate, by optimiser steps.
        average: of the weights, or None.
        accelerator: of the run.
        progress: how far it is.
    """

    model: nn.Module
    optimizer: AcceleratedOptimizer
    schedule: LRScheduler
    average: AveragedModel | None
    accelerator: Accelerator
    progress: going_on.Progress = field(default_factory=going_on.Progress)

    @property
    def network(self) -> nn.Module:
        """The model without wrapping."""
        return self.accelerator.unwrap_model(self.model)

    def save(self, run: Run, randoms: Mapping[str, Any]) -> None:
        """Writes the state of all processes; all of them call it, with their `random_states`."""
        progress = dataclasses.asdict(self.progress)
        own = {"random": randoms, "sums": progress.pop("sums"), "num_images": progress.pop("num_images")}
        processes = gather_object([own])
        if self.accelerator.is_main_process:
            state = {
                "config": settings.flatten(run.config),
                "progress": progress,
                "processes": processes,
                "network": self.network.state_dict(),
                "average": self.average and self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.accelerator.scaler and self.accelerator.scaler.state_dict(),
            }
            going_on.save_state(run, state)

    def restore(self, run: Run, state: Mapping[str, Any]) -> None:
        """Takes over what `save` wrote.

        Raises:
            ValueError: it belongs to another network, recipe or number of processes.
        """
        path = going_on.state_path(run)
        settings.require_same(state["config"], run.config, str(path))
        processes = state["processes"]
        if len(processes) != self.accelerator.num_processes:
            raise ValueError(
                f"{path}: saved by {len(processes)} processes, started with {self.accelerator.num_processes}; an "
                "exact continuation needs as many"
            )
        try:
            self.network.load_state_dict(state["network"])
            if self.average:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} does not fit the network of {run.folder / 'config.yaml'}: {' '.join(str(error).split())}"
            ) from None
        # As when they were made: in the memory order of their weights, or else sums would round otherwise.
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter).copy_(value)
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        own = processes[self.accelerator.process_index]
        sums = {name: value.to(self.accelerator.device) for name, value in own["sums"].items()}
        self.progress = going_on.Progress(**state["progress"], sums=sums, num_images=own["num_images"])
        going_on.set_random_states(own["random"])


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    compute_losses: ComputeLosses,
    evaluate: Evaluate,
    best_by: str,
    config: settings.Recipe,
    run: Run,
    accelerator: Accelerator,
    begin: Callable[[], None] = lambda: None,
    resume: bool = False,
) -> dict[str, Any]:
    """Trains `model` and gives the last line of the run's log.

    Loss = sum of the task's losses + hoyer.weight * sum over spike layers of H. The model need not know of the
    second term: it is taken from the spike layers here, after each forward pass, for every task and head alike.

    Args:
        model: trained in place.
        batches: this process's training batches; their number sets the schedule.
        compute_losses: (model, batch) -> scalar losses by name.
        evaluate: model -> metrics by name; called in evaluation mode every `train.eval_every` epochs and at the end.
        best_by: the metric whose highest value decides which weights are kept as "best".
        config: the recipe.
        run: takes the log line of each epoch, the weights and the state.
        accelerator: device, mixed precision and processes.
        begin: called once everything is known to fit, before anything is written.
        resume: go on from the run's state, if it has one; weights and log then become those of a run that was never
            interrupted (bit for bit on a CPU, see the README).

    Raises:
        ValueError: there are no batches, or the state does not fit.
        FloatingPointError: loss or gradient is not finite; names epoch, step, each loss and the images. The state on
            disk is an earlier one.
        Interrupted: SIGTERM or Ctrl-C; the step under way was finished and the state saved.
    """
    train = config.train
    if not len(batches):
        raise ValueError("no training batches: there are too few images")
    num_steps = math.ceil(len(batches) / train.accumulate)
    optimizer = build_optimizer(model, config.optimizer)
    schedule = build_schedule(optimizer, config.optimizer, num_steps * train.epochs)
    model, prepared = accelerator.prepare(model, optimizer)
    average = average_weights(accelerator.unwrap_model(model), train.ema_decay)
    training = Training(model, prepared, schedule, average, accelerator)
    state = going_on.load_state(run) if resume else None
    if state is not None:
        training.restore(run, state)
    elif resume:
        require_beginning(run)
    progress, main = training.progress, accelerator.is_main_process
    begin()
    if resume and main:
        run.forget_after(progress.epoch - 1)
    line = run.history()[-1] if resume and main and progress.epoch > 1 else {}
    signals, clock = StopSignals(), SaveClock(train.save_minutes, train.save_steps)
    console = Console(highlight=False, soft_wrap=True, quiet=not main)

    def interruption() -> Interrupted:
        sentence = goodbye(run, progress, num_steps, train.epochs) if main else ""
        return Interrupted(sentence, signals.received or signal.SIGTERM)  # a signal that came to another process

    def stop_or_save(always: bool = False) -> None:
        stop, due = any_process(accelerator, bool(signals.received), always or clock.due())
        if stop or due:
            training.save(run, random_states())
            clock.restart()
        if stop:
            raise interruption()

    def after_step() -> None:
        bar.advance(task)
        clock.num_steps += 1
        stop_or_save()

    with signals.watch(), progress_bar(console) as bar:
        task = bar.add_task("", total=num_steps)
        while progress.epoch <= train.epochs:
            epoch = progress.epoch
            bar.reset(task, completed=progress.step, description=f"epoch {epoch}/{train.epochs}")
            if progress.step == 0:
                progress.lr = schedule.get_last_lr()[0]
            line = {"epoch": epoch, "step": epoch * num_steps, "lr": progress.lr}
            try:
                line |= train_epoch(
                    training, batches, compute_losses=compute_losses, config=config, after_step=after_step
                )
            except RuntimeError as error:
                if not (signals.received and "DataLoader worker" in str(error)):
                    raise
                # All processes were told to stop, the loader's too: in the middle of a step there is nothing to save.
                sentence = f"stopped together with its loader processes; go on with: {how_to_go_on(run)}"
                raise Interrupted(sentence if main else "", signals.received) from None
            if epoch % train.eval_every == 0 or epoch == train.epochs:
                started, randoms = time.perf_counter(), random_states()
                try:
                    with signals.interruptible(accelerator.num_processes == 1):
                        line |= evaluate_both(training, evaluate)
                except KeyboardInterrupt:  # the epoch's steps are done, its evaluation is not
                    if accelerator.num_processes > 1:  # a second Ctrl-C: the others are not here to save with
                        raise
                    training.save(run, randoms)
                    raise interruption() from None
                line["eval_seconds"] = round(time.perf_counter() - started, 3)
                if progress.evaluated and epoch < train.epochs:
                    line.pop("potentials", None)  # histograms: the first and the last say how they moved
                progress.evaluated = True
            silent = silent_layers(line)
            if silent:
                line["silent"] = silent
            better = line.get(best_by, -math.inf) > progress.best
            progress.best = max(progress.best, line.get(best_by, -math.inf))
            if main:
                run.save(training.network, "last")
                if average:
                    run.save(average.module, "ema")
                if better:
                    run.save(training.network, "best")
                run.log(line)
                if silent:
                    print(f"warning: spike layers silent in epoch {epoch}: {', '.join(silent)}", file=sys.stderr)
            accelerator.log({key: value for key, value in line.items() if isinstance(value, float)}, step=epoch)
            console.print(summary(line, train.epochs))
            progress.next_epoch()
            if progress.epoch <= train.epochs:
                stop_or_save(always=epoch == 1)  # from then on the log never is without a state
    return line


def train_epoch(
    training: Training,
    batches: Batches,
    *,
    compute_losses: ComputeLosses,
    config: settings.Recipe,
    after_step: Callable[[], None],
) -> dict[str, Any]:
    """The rest of an epoch: "loss", "loss/NAME", H per layer (means over steps and processes), thresholds, speed.

    An optimiser step takes the mean gradient of `train.accumulate` batches. H of the reduction "sum" grows with the
    batch, so there the batches' H are added up, as for one batch of all their images.
    """
    model, progress, accelerator = training.model.train(), training.progress, training.accelerator
    accumulate, hoyer = config.train.accumulate, config.hoyer
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_steps = math.ceil(len(batches) / accumulate)
    batches.set_epoch(progress.epoch, progress.step * accumulate)
    source = iter(batches) if progress.step < num_steps else iter(())
    started = time.perf_counter() - progress.seconds

    for step in range(progress.step + 1, num_steps + 1):
        parts = min(accumulate, len(batches) - (step - 1) * accumulate)
        growth = parts if hoyer.reduction == "sum" else 1
        seen, step_losses = [], []
        for part in range(1, parts + 1):
            batch = send_to_device(next(source), accelerator.device)
            # Gradients are averaged over the processes once a step.
            with accelerator.no_sync(model) if part < parts else contextlib.nullcontext():
                with recompute_activations() if config.train.low_memory else contextlib.nullcontext():
                    losses = compute_losses(model, batch)
                penalties = hoyer_penalties(training.network, hoyer.reduction)
                if penalties:
                    each = growth * torch.stack(list(penalties.values()))
                    losses["hoyer"] = hoyer.weight * each.sum()
                    progress.count("layers", each / parts)
                loss = torch.stack(list(losses.values())).sum() / parts
                accelerator.backward(loss)
            seen.append(batch)
            step_losses.append({name: value.detach() / parts for name, value in losses.items()})
            progress.num_images += len(batch[0])
        losses = {name: torch.stack([each[name] for each in step_losses]).sum() for name in step_losses[0]}
        loss = torch.stack(list(losses.values())).sum()
        accelerator.unscale_gradients(training.optimizer)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        check_finite(loss, norm, losses, seen, f"epoch {progress.epoch}, step {step}", accelerator)
        if config.optimizer.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.optimizer.clip_norm, norm)
        training.optimizer.step()
        training.optimizer.zero_grad()
        if not training.optimizer.step_was_skipped:  # by the gradient scaler of fp16
            training.schedule.step()
            if training.average:
                training.average.update_parameters(training.network)
        progress.count("loss", loss)
        for name, value in losses.items():
            progress.count(f"loss/{name}", value)
        progress.step, progress.seconds = step, time.perf_counter() - started
        after_step()
    return describe_epoch(training, num_steps)


def describe_epoch(training: Training, num_steps: int) -> dict[str, Any]:
    """What the log says of an epoch's steps, see `train_epoch`."""
    progress, accelerator = training.progress, training.accelerator
    means = {name: accelerator.reduce(value / num_steps, "mean") for name, value in progress.sums.items()}
    layers = spike_layers(training.network)
    per_layer = means.pop("layers").tolist() if layers else []
    line: dict[str, Any] = {name: value.item() for name, value in means.items()}
    speed = progress.num_images * accelerator.num_processes / progress.seconds
    line |= {"seconds": round(progress.seconds, 3), "images_per_second": round(speed, 3)}
    if layers:
        line["hoyer_per_layer"] = dict(zip(layers, per_layer, strict=True))
        line["v_th"] = {name: abs(layer.v_th.item()) for name, layer in layers.items()}
        line["extremum"] = {name: layer.extremum.mean().item() for name, layer in layers.items()}
    return line


def require_beginning(run: Run) -> None:
    """Says that a run without a state starts anew; ValueError if its log has more than the epoch that this may cost."""
    log = run.folder / "metrics.jsonl"
    number = len(run.history()) if log.is_file() else 0
    if number > 1:
        raise ValueError(
            f"{run.folder}: {number} epochs in its log but no state.safetensors to go on from: it has finished, or "
            "lost its state; name another folder for a new run"
        )
    print(f"{run.folder}: no state saved yet, starts from its beginning", file=sys.stderr)


def check_finite(
    loss: Tensor,
    norm: Tensor,
    losses: Mapping[str, Tensor],
    batches: Sequence[Any],
    where: str,
    accelerator: Accelerator,
) -> None:
    """Nothing; raises FloatingPointError if the loss, or the norm of the gradient, is not finite.

    With fp16 a gradient may overflow: the scaler then skips the step and scales less. Only at a scale that leaves
    nothing to blame but the network it is an error.
    """
    finite_loss, finite_norm = torch.isfinite(torch.stack([loss, norm.to(loss.device)])).tolist()
    scaler = accelerator.scaler
    overflow = scaler is not None and scaler.get_scale() >= LEAST_SCALE
    if finite_loss and (finite_norm or overflow):
        return
    what = "gradient" if finite_loss else "loss"
    values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
    message = f"the {what} is not finite in {where}: {values}"
    targets = [target for batch in batches for target in batch[1] if isinstance(target, dict)]
    images = [str(int(target["image_id"])) for target in targets if "image_id" in target]
    if images:
        message += f"; image ids {', '.join(images)}"
    raise FloatingPointError(message + "; a lower optimizer.lr or optimizer.clip_norm may help")


def evaluate_both(training: Training, evaluate: Evaluate) -> dict[str, Any]:
    """The metrics of the network, and under "ema" those of its average."""
    network, average = training.network, training.average
    share_buffers(network)
    metrics = evaluate(network.eval())
    if average:
        share_buffers(average.module)
        metrics["ema"] = evaluate(average.module.eval())
        metrics["ema"].pop("potentials", None)
    return metrics


def silent_layers(line: Mapping[str, Any]) -> list[str]:
    """Spike layers that did not fire in an epoch: no potential above 0 in training, or no spike in evaluation."""
    training = {name for name, value in line.get("hoyer_per_layer", {}).items() if value == 0}
    evaluation = {name for name, rate in line.get("activity_per_layer", {}).items() if rate == 0}
    return sorted(training | evaluation)


def goodbye(run: Run, progress: going_on.Progress, num_steps: int, num_epochs: int) -> str:
    """The sentence for a training that was told to stop."""
    if progress.step:
        where = f"in epoch {progress.epoch} of {num_epochs} after step {progress.step} of {num_steps}"
    else:
        where = f"after epoch {progress.epoch - 1} of {num_epochs}"
    return f"stopped {where}, state saved; go on with: {how_to_go_on(run)}"


def how_to_go_on(run: Run) -> str:
    """The command that continues a run."""
    tool = "train_det" if run.config.task == "detection" else "train_cls"
    return f"python tools/{tool}.py --resume {run.folder}"


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
