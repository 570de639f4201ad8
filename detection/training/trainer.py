"""The training loop, one for every task."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from backbones import hoyer_penalties, logged_state, recompute_activations, record_gradient_shares, spike_layers
from detection.config import Recipe
from detection.data.batches import Batches
from detection.data.loaders import LoaderError
from detection.records import EpochLog, Evaluation, Extension
from detection.runs import Run
from detection.text import plural, say
from detection.training.callbacks import Callback, Callbacks, Step
from detection.training.checkpoint import Progress, random_states, save
from detection.training.collapse import silent_layers, warnings_of
from detection.training.display import LineClock, progress_bar, resume_command, summary
from detection.training.distributed import any_process, share_buffers
from detection.training.memory import forget_peak_memory, peak_memory
from detection.training.optim import average_weights, build_optimizer, build_schedule
from detection.training.parts import describe_parts, factors_of, freeze
from detection.training.precision import require_finite
from detection.training.signals import CallbackError, Interrupted, SaveClock, Screen, StopSignals

if TYPE_CHECKING:
    from detection.tasks.base import Task

Losses = Callable[[nn.Module, Any], dict[str, Tensor]]
Evaluate = Callable[[nn.Module], Evaluation]


class SingleValueError(ValueError):
    """A batch of which BatchNorm cannot learn."""


class Trainer:
    """A training; all of its state that changes is in a checkpoint, from which it goes on bit for bit on a CPU.

    Loss = sum of the task's losses + hoyer.weight * sum over spike layers of H. The model need not know of the second
    term: it is taken from the spike layers here, after each forward pass, for every task and head alike.

    Args:
        model: trained in place.
        batches: this process's training batches; their number sets the schedule.
        losses: (model, batch) -> scalar losses by name.
        evaluate: model -> evaluation; called in evaluation mode every `train.eval_every` epochs and at the end.
        goal: the task.
        config: the recipe.
        run: takes the log line of each epoch, the weights and the checkpoints.
        accelerator: device, mixed precision and processes.
        extension: the further cycle of the schedule that the training is in; None: the recipe's own.
        callbacks: called at the turns of the training, in the main process.

    Raises:
        TypeError: something among the callbacks is none.
        ValueError: there are no batches, or a part that the recipe names is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        *,
        losses: Losses,
        evaluate: Evaluate,
        goal: Task,
        config: Recipe,
        run: Run,
        accelerator: Accelerator,
        extension: Extension | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if not len(batches):
            raise ValueError("no training batches: there are too few images")
        self.batches, self.losses, self._evaluate, self.goal = batches, losses, evaluate, goal
        self.config, self.run, self.accelerator, self.extension = config, run, accelerator, extension
        self.num_steps = math.ceil(len(batches) / config.train.accumulate)
        settings, epochs = config.optimizer, config.train.epochs
        if extension is not None:
            rates = {name: getattr(settings, name) * extension.lr_factor for name in ("lr", "muon_lr")}
            settings, epochs = settings.model_copy(update=rates), epochs - extension.after
        self.frozen = freeze(model, config.train.freeze, goal.parts)
        self.factors = factors_of(model, settings.lr_factors, goal.parts)
        optimizer = build_optimizer(model, settings, goal.prediction_layers, self.factors)
        self.schedule = build_schedule(optimizer, settings, self.num_steps * epochs)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.average = average_weights(self.network, config.train.ema_decay)
        self.progress = Progress()
        self.signals = StopSignals()
        self.clock = SaveClock(config.train.save_minutes, config.train.save_steps)
        self.console = Screen(highlight=False, markup=False, soft_wrap=True, quiet=not self.is_main)
        self._lines = LineClock(self.console)
        self.callbacks = Callbacks(callbacks, run, self.is_main)

    @property
    def network(self) -> nn.Module:
        """The model without the wrapping of several processes."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.accelerator.is_main_process

    def fit(self) -> EpochLog:
        """Train to the end of the last epoch and return its line of the log.

        Raises:
            CallbackError: a callback failed; the state was saved.
            FloatingPointError: loss or gradient is not finite; names epoch, step, each loss and the images. The
                checkpoint on disk is an earlier one.
            Interrupted: SIGTERM or Ctrl-C; the step under way was finished and the state saved.
        """
        line = None
        for sentence in describe_parts(self.network, self.factors):
            self.console.print(sentence)
        forget_peak_memory()
        with self.signals.watch(), progress_bar(self.console) as self.bar:
            self.task = self.bar.add_task("", total=self.num_steps)
            try:
                self.tell("on_train_begin", self.network)
                while not self.has_ended:
                    line = self.run_epoch()
                    self.progress.next_epoch()
                    if not self.has_ended:
                        self.save_or_stop(always=line.epoch == 1)  # from then on the log never is without a checkpoint
            except (LoaderError, RuntimeError) as error:  # such as torch's compiler raises
                told = self.signals.wait() if isinstance(error, LoaderError) else self.signals.received
                if not told or isinstance(error, CallbackError):
                    raise
                # All processes were told to stop, a loader's or compiler's too: amid a step there is nothing to save.
                sentence = f"stopped together with processes of its own; go on with: {resume_command(self.run)}"
                raise Interrupted(sentence if self.is_main else "", self.signals.received) from None
        if self.progress.epoch <= self.config.train.epochs:
            waited, best = self.progress.waited, f"{self.goal.best_by} {self.progress.best:.4f}"
            self.console.print(
                f"ended early: {plural(waited, 'evaluation')} without more than {best} (train.patience {waited})"
            )
        line = self.run.history()[-1] if line is None else line
        self.tell("on_train_end", line)
        return line

    def tell(self, event: str, *arguments: Any) -> None:
        """Tell the callbacks between two steps; if one fails, save and raise its error."""
        if self.callbacks.callbacks:
            self.callbacks.tell(event, *arguments)
            self.save_or_stop()

    @property
    def has_ended(self) -> bool:
        """Whether all epochs are done, or `train.patience` has run out."""
        train, progress = self.config.train, self.progress
        return progress.epoch > train.epochs or 0 < train.patience <= progress.waited

    def run_epoch(self) -> EpochLog:
        """Do the rest of an epoch, evaluate, log and keep the weights."""
        progress, train = self.progress, self.config.train
        self.bar.reset(self.task, completed=progress.step, description=f"epoch {progress.epoch}/{train.epochs}")
        if progress.step == 0:
            progress.lr = self.schedule.get_last_lr()[0]
        self.tell("on_epoch_begin", progress.epoch)
        line = self.train_epoch()
        if progress.epoch % train.eval_every == 0 or progress.epoch == train.epochs:
            self.evaluate(line)
            self.callbacks.tell("on_evaluation", progress.epoch, line.evaluation)
        line.silent = silent_layers(line)
        self.keep(line)
        self.callbacks.tell("on_epoch_end", line)  # an error waits until the epoch is done
        return line

    def train_epoch(self) -> EpochLog:
        """Do the rest of an epoch's steps and return what the log says of them: means over steps and processes."""
        progress, accumulate = self.progress, self.config.train.accumulate
        self.model.train()
        for module in self.frozen:
            module.eval()
        self.batches.set_epoch(progress.epoch, progress.step * accumulate)
        source = iter(self.batches) if progress.step < self.num_steps else iter(())
        started = time.perf_counter() - progress.seconds
        for step in range(progress.step + 1, self.num_steps + 1):
            num_parts = min(accumulate, len(self.batches) - (step - 1) * accumulate)
            asks = step == self.num_steps and not self.config.train.compile
            with record_gradient_shares(self.network) if asks else contextlib.nullcontext({}) as progress.shares:
                loss = self.step(source, num_parts, f"epoch {progress.epoch}, step {step}")
            progress.step, progress.seconds = step, time.perf_counter() - started
            self.bar.advance(self.task)
            where = f"epoch {progress.epoch}/{self.config.train.epochs}  step {step}/{self.num_steps}"
            self._lines.show(where, loss, progress.num_images * self.accelerator.num_processes / progress.seconds)
            self.clock.num_steps += 1
            if self.callbacks.callbacks:
                told = Step(progress.epoch, step, self.num_steps, loss.detach(), self.schedule.get_last_lr()[0])
                self.callbacks.tell("on_step_end", told)
            self.save_or_stop()
        return self.describe_epoch()

    def step(self, source: Iterator[Any], num_parts: int, where: str) -> Tensor:
        """Make one optimiser step from the mean gradient of so many batches, and return its loss.

        A batch of which BatchNorm cannot learn is left out with a warning, so that a run can go on behind it.

        Raises:
            ValueError: the first step of the training has such a batch, or one of several processes.
        """
        parts = []
        for part in range(1, num_parts + 1):
            batch = next(source)
            try:
                parts.append(self.backward(batch, part, num_parts))
            except SingleValueError as error:
                described = self.goal.describe_batch(batch)
                sentence = f"{error}{f'; {described}' if described else ''}"
                if self.accelerator.num_processes > 1 or (self.progress.epoch, self.progress.step) == (1, 0):
                    raise SingleValueError(f"{where}: {sentence}") from None
                say(f"warning: {where}: left out: {sentence}", error=True)
                for layer in spike_layers(self.network).values():
                    layer.drop_penalty()
        if not parts:
            self.progress.left_out += 1
            self.optimizer.zero_grad()
            self.schedule.step()
            return torch.zeros(())
        whole = num_parts / len(parts)  # where batches were left out, the mean is that of the others
        losses = {name: whole * torch.stack([losses[name] for _, losses in parts]).sum(0) for name in parts[0][1]}
        if (layers := losses.pop("layers", None)) is not None:
            self.progress.count("layers", layers)
        loss = torch.stack(list(losses.values())).sum()
        self.accelerator.unscale_gradients(self.optimizer)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = [each.grad for each in parameters if each.grad is not None]
        if whole > 1:
            torch._foreach_mul_(gradients, whole)
        norm = nn.utils.get_total_norm(gradients)
        images = ", ".join(filter(None, (self.goal.describe_batch(batch) for batch, _ in parts)))
        require_finite(loss, norm, losses, self.accelerator.scaler, where, images)
        if self.config.optimizer.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optimizer.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.optimizer.step_was_skipped:  # by the gradient scaler of fp16
            self.schedule.step()
            if self.average:
                self.average.update_parameters(self.network)
        self.progress.count("loss", loss)
        for name, value in losses.items():
            self.progress.count(f"loss/{name}", value)
        return loss

    def backward(self, batch: Any, part: int, num_parts: int) -> tuple[Any, dict[str, Tensor]]:
        """Add the gradients of one of the batches of a step; return the batch and its share of each loss.

        H of the reduction "sum" grows with the batch, so there the batches' H are added up, as for one batch of all
        their images.

        Raises:
            SingleValueError: a BatchNorm has a single value per channel to learn from.
        """
        hoyer, low_memory = self.config.hoyer, self.config.train.low_memory
        batch = send_to_device(batch, self.accelerator.device)
        # Gradients are averaged over the processes once a step.
        with self.accelerator.no_sync(self.model) if part < num_parts else contextlib.nullcontext():
            try:
                with recompute_activations() if low_memory else contextlib.nullcontext():
                    losses = self.losses(self.model, batch)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise SingleValueError(
                    f"a BatchNorm has one value per channel in a batch of {len(batch[0])} image(s): {error}; larger "
                    "images, or in a new run a larger train.batch_size, give it more"
                ) from None
            penalties = hoyer_penalties(self.network, hoyer.reduction)
            if penalties:
                each = (num_parts if hoyer.reduction == "sum" else 1) * torch.stack(list(penalties.values()))
                losses["hoyer"] = self.hoyer_weight() * each.sum()
            self.accelerator.backward(torch.stack(list(losses.values())).sum() / num_parts)
            losses |= {"layers": each} if penalties else {}
        self.progress.num_images += len(batch[0])
        return batch, {name: value.detach() / num_parts for name, value in losses.items()}

    def hoyer_weight(self) -> float:
        """Return the weight of the regulariser in the step under way, which rises over `hoyer.warmup_epochs`."""
        hoyer, progress = self.config.hoyer, self.progress
        if not hoyer.warmup_epochs:
            return hoyer.weight
        return hoyer.weight * min(1.0, (progress.epoch - 1 + progress.step / self.num_steps) / hoyer.warmup_epochs)

    def describe_epoch(self) -> EpochLog:
        """Return what the log says of an epoch's steps."""
        progress, num_processes = self.progress, self.accelerator.num_processes
        number = self.num_steps - progress.left_out
        means = {name: self.accelerator.reduce(value / number, "mean") for name, value in progress.sums.items()}
        layers = {}
        if "layers" in means:
            names = [name for name, layer in spike_layers(self.network).items() if layer.has_penalty]
            layers["hoyer_per_layer"] = dict(zip(names, means.pop("layers").tolist(), strict=True))
        layers |= logged_state(self.network)
        layers |= {f"hoyer_share_of_{name}": shares for name, shares in progress.shares.items() if shares}
        return EpochLog(
            epoch=progress.epoch,
            step=progress.epoch * self.num_steps,
            lr=progress.lr,
            loss=means.pop("loss", torch.tensor(math.nan)).item(),  # NaN: every batch was left out
            losses={name.removeprefix("loss/"): value.item() for name, value in means.items()},
            seconds=round(progress.seconds, 3),
            images_per_second=round(progress.num_images * num_processes / progress.seconds, 3),
            memory_mib=peak_memory(self.accelerator.device),
            layers=layers,
        )

    def evaluate(self, line: EpochLog) -> None:
        """Add the evaluation of the network and of its average to the line of an epoch."""
        started, randoms = time.perf_counter(), random_states()
        alone = self.accelerator.num_processes == 1
        try:
            with self.signals.interruptible(alone):
                share_buffers(self.network)
                line.evaluation = self._evaluate(self.network.eval())
                if self.average:
                    share_buffers(self.average.module)
                    line.ema = self._evaluate(self.average.module.eval())
                    line.ema.potentials = {}
        except KeyboardInterrupt:  # the epoch's steps are done, its evaluation is not
            if not alone:  # a second Ctrl-C: the others are not here to save with
                raise
            save(self, randoms)
            raise self.interruption() from None
        line.eval_seconds = round(time.perf_counter() - started, 3)
        may_end = 0 < self.config.train.patience <= self.progress.waited + 1
        if self.progress.evaluated and line.epoch < self.config.train.epochs and not may_end:
            line.evaluation.potentials = {}  # histograms: the first and the last say how they moved
        self.progress.evaluated = True

    def keep(self, line: EpochLog) -> None:
        """Log the line of an epoch, keep the weights, say it on the screen."""
        score = line.metrics.get(self.goal.best_by, -math.inf)
        better, self.progress.best = score > self.progress.best, max(self.progress.best, score)
        if line.evaluation is not None:
            self.progress.waited = 0 if better else self.progress.waited + 1
        if self.is_main:
            self.run.save(self.network, "last")
            if self.average:
                self.run.save(self.average.module, "ema")
            if better:
                self.run.save(self.network, "best")
            history = self.run.history() if self.run.has_log else []
            rising = min(self.config.optimizer.warmup_steps / self.num_steps, self.config.train.epochs / 2)
            warmup = max(self.config.hoyer.warmup_epochs, rising)
            line.warnings = warnings_of([*history, line], self.goal.is_at_chance, warmup)
            self.run.log(line)
            if line.silent:
                silent = ", ".join(line.silent)
                say(f"warning: spike layers silent in epoch {line.epoch}: {silent}", error=True)
            known = next((before.warnings for before in reversed(history) if before.evaluation is not None), {})
            for kind, sentence in line.warnings.items():
                if kind not in known:
                    say(f"warning: epoch {line.epoch}: {sentence}", error=True)
        self.console.print(summary(line, self.config.train.epochs, self.goal.best_by, self.goal.headline))

    # Checkpoints

    def save_or_stop(self, always: bool = False) -> None:
        """Save where a checkpoint is due; save and raise `Interrupted` where a signal has come to any process."""
        failed = self.callbacks.error
        stop, due = any_process(self.accelerator, bool(self.signals.received or failed), always or self.clock.due())
        if stop or due:
            save(self, random_states())
            self.clock.restart()
        if failed:
            raise failed
        if stop:
            raise self.interruption()

    def interruption(self) -> Interrupted:
        """Return the error that ends a training which was told to stop; of several processes one has a sentence."""
        sentence, progress, epochs = "", self.progress, self.config.train.epochs
        if self.is_main:
            where = f"after epoch {progress.epoch - 1} of {epochs}"
            if progress.step:
                where = f"in epoch {progress.epoch} of {epochs} after step {progress.step} of {self.num_steps}"
            sentence = f"stopped {where}, state saved; go on with: {resume_command(self.run)}"
        return Interrupted(sentence, self.signals.received or signal.SIGTERM)  # a signal that came to another process
