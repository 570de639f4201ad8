"""Runs: train a recipe into one, open the network of one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import nn

from backbones import zoo
from detection.config import Recipe, flatten, require_same
from detection.files import require_writable
from detection.models import check_origin
from detection.records import DataFingerprint, EpochLog, RunInfo, Start, Weights
from detection.runs import Run, describe_environment
from detection.tasks import task_of
from detection.tasks.base import Dataset, Task
from detection.tasks.start import (
    describe,
    extended,
    find_extension,
    require_same_anchors,
    start_from,
    without_weights,
)
from detection.text import plural, say
from detection.training import checkpoint, loggers
from detection.training.callbacks import Callback
from detection.training.distillation import learn_from
from detection.training.distributed import is_broken_connection, synchronise
from detection.training.precision import choose_precision, widen_narrow_maps
from detection.training.trainer import Losses, Trainer


def train_run(
    config: Recipe,
    folder: str | Path,
    command: Sequence[str],
    *,
    download: bool = False,
    resume: bool = False,
    extend: int = 0,
    lr_factor: float = 0.5,
    callbacks: Sequence[Callback] = (),
) -> EpochLog:
    """Train the network of a recipe into a run folder and return the last line of its log.

    A new folder is made only once data and model are known to be sound.

    Args:
        config: the recipe.
        folder: where the run goes; must not exist, or be empty, or with `resume` be a run of this recipe.
        command: how the run was started, for its log.
        download: fetch the data if they are missing.
        resume: go on with the run in `folder` from its last checkpoint, or from the beginning if it has none.
        extend, lr_factor: with `resume`, begin so many epochs behind the end, at such a part of the learning rates.
        callbacks: called at the turns of the training.

    Raises:
        BlockingIOError: another training is writing into the folder.
        CallbackError: a callback failed; the state is saved.
        ConnectionError: another process of the training has ended, or does not answer.
    """
    check_run(config, folder, resume=resume)
    if resume and extend and not Run.open(folder).finished:
        if os.environ.get("WORLD_SIZE", "1") != "1":  # whose connection ends with the first training
            raise ValueError(f"{folder}: not finished; several processes go on with --resume first, then with --extend")
        say(f"{folder}: not finished; first to its end, then {plural(extend, 'epoch')} more")
        train_run(config, folder, command, download=download, resume=True, callbacks=callbacks)
    extension = find_extension(Run.open(folder), extend, lr_factor) if resume else None
    task = task_of(config if extension is None else extended(config, extension))
    accelerator = make_accelerator(config)
    run, main = Run(Path(folder), config), accelerator.is_main_process
    if main and resume:
        run.lock()
    try:
        if main and resume and run.finished and not extend:  # by another process, just now
            raise FileExistsError(f"{folder}: finished already, nothing to go on with")
        task, train, val = read_splits(task, accelerator, download=download)
        run.config = task.config
        set_seed(config.train.seed)
        goes_on = resume and (extend > 0 or (run.folder / checkpoint.FILE).is_file())
        called = [*callbacks, *([loggers.Loggers(accelerator)] if loggers.wanted(config) else [])]
        options = {"goes_on": goes_on, "extension": extension, "callbacks": called}
        trainer, start = build_trainer(task, (train, val), run, accelerator, **options)
        info = describe_run(task, train, val, command, start)
        line = fit(trainer, info, resume=resume, extend=bool(resume and extend))
        if main:
            finish(task, trainer.network, val, run)
    finally:
        run.unlock()
    return line


def build_trainer(
    task: Task, splits: tuple[Dataset, Dataset], run: Run, accelerator: Accelerator, *, goes_on: bool, **options: Any
) -> tuple[Trainer, Start | None]:
    """Return the trainer of a network, and what it has of model.weights; one that `goes_on` brings its own weights."""
    train, val = splits
    model = build_model(without_weights(task) if goes_on else task)
    start = None if goes_on else start_from(task, model)
    model, losses = prepare_model(task, model, accelerator)
    batches, val_batches = task.training_batches(train, accelerator), task.evaluation_batches(val, accelerator)
    trainer = Trainer(
        model,
        batches,
        losses=losses,
        evaluate=lambda network: task.evaluate(network, val_batches, val, accelerator),
        goal=task,
        config=task.config,
        run=run,
        accelerator=accelerator,
        **options,
    )
    return trainer, start


def finish(task: Task, model: nn.Module, val: Dataset, run: Run) -> None:
    """Leave pictures and checksums of the trained network in its run, which has finished then."""
    leave_pictures(run)
    task.finish(model, val, run)
    run.write_info(run.info().model_copy(update={"sha256": run.checksums()}))
    (run.folder / checkpoint.FILE).unlink(missing_ok=True)


def read_splits(task: Task, accelerator: Accelerator, *, download: bool = False) -> tuple[Task, Dataset, Dataset]:
    """Return the task with the class names filled in, and training and validation data; tell what was left out."""
    if download:
        task.download()
    with accelerator.main_process_first() if download else nullcontext():  # the main one fetches what the others find
        train = task.read("train")
        task = task.with_classes(train.classes)
        val = task.read("val")
    if accelerator.is_main_process:
        tell_dropped(train=train, val=val)
    return task, train, val


def describe_run(
    task: Task, train: Dataset, val: Dataset, command: Sequence[str], start: Start | None = None
) -> RunInfo:
    """Return what run.json has from the beginning."""
    splits = {"train": train, "val": val}
    data = {name: DataFingerprint(images=len(each), fingerprint=each.fingerprint()) for name, each in splits.items()}
    facts = {"precision": choose_precision(task.config.train.precision), "data": data, "start": start}
    return describe_environment(command).model_copy(update=facts | task.facts(val))


def check_run(config: Recipe, folder: str | Path, *, resume: bool = False) -> None:
    """Raise if a folder cannot take the run, or a package that the recipe asks for is missing.

    Raises:
        FileExistsError: there is something in it already.
        FileNotFoundError: with `resume`, there is no run; without it, no such weights to start from; or no teacher.
        ImportError: the package of a logger is missing.
        ValueError: the recipe names something that is not registered, or a teacher that cannot teach its network; or
            with `resume`, the run has another recipe.
    """
    task = task_of(config)
    task.check_names()
    if resume:
        require_same(flatten(Run.open(folder).config), config, str(folder))
    else:
        require_writable(Run.check_free(folder))
        for source in (getattr(config.model, "weights", None), config.model.backbone.weights):
            if source is not None and not zoo.locate(source).exists():
                raise FileNotFoundError(f"{source}: no such weights file")
        check_origin(config.model.backbone)
    if config.distillation.teacher is not None:
        find_teacher(task)
    loggers.require_packages(config)


def make_accelerator(config: Recipe) -> Accelerator:
    """Return device, precision, algorithms and processes of a run."""
    train = config.train
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
    torch.use_deterministic_algorithms(train.deterministic)
    # accelerate keeps the first precision for the whole process, in which runs of others may follow.
    AcceleratorState._reset_state()
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    if several and not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        _refuse_processes("no process has a RANK and a MASTER_ADDR")
    accelerator = Accelerator(
        # Without a GPU several processes have to be told to use the CPU, or each would train for itself.
        cpu=several and not torch.cuda.is_available(),
        mixed_precision=choose_precision(train.precision),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=train.timeout_minutes))],
    )
    if str(accelerator.num_processes) != os.environ.get("WORLD_SIZE", "1"):
        _refuse_processes(f"{plural(accelerator.num_processes, 'process', 'processes')} would train together")
    if train.precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would train in float32 without a word; torch knows fp16 on a CPU, slow as it is.
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator


def _refuse_processes(what: str) -> NoReturn:
    raise ValueError(
        f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, but {what}: start all of them with torchrun or accelerate "
        "launch, or unset WORLD_SIZE"
    )


def prepare_model(task: Task, model: nn.Module, accelerator: Accelerator) -> tuple[nn.Module, Losses]:
    """Return the network, synchronised, in channels-last order, compiled as the recipe says, and its losses."""
    config, losses = task.config, task.losses
    model = synchronise(model, spikes=config.hoyer.sync, batch_norm=config.train.sync_batchnorm)
    if config.distillation.teacher is not None:
        losses = learn_from(load_model(find_teacher(task)), model, task, accelerator)
    if config.train.channels_last:  # of the weights; the feature maps follow them
        model.to(memory_format=torch.channels_last)
    if accelerator.device.type == "cpu" and accelerator.mixed_precision != "no":
        widen_narrow_maps(model)
    if config.train.compile:
        model.backbone.compile()
    return model, losses


def build_model(task: Task) -> nn.Module:
    """Return the new network of a task.

    Raises:
        ValueError: it cannot be built as the recipe says, or there is no memory for it.
    """
    try:
        return task.build_model()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        reason = (str(error).strip() or "no memory").splitlines()[0]
        raise ValueError(
            f"the network of this recipe does not fit into the memory ({reason}); a smaller model.backbone.width or "
            "narrower neck and head may"
        ) from None


def find_teacher(task: Task) -> Run:
    """Return the run of distillation.teacher.

    Raises:
        FileNotFoundError: it is no run folder.
        ValueError: it was trained for another task or other classes, or cannot teach this network.
    """
    run = Run.open(task.config.distillation.teacher)
    place, theirs, ours = f"distillation.teacher {run.folder}", run.config, task.config
    if theirs.task != ours.task:
        raise ValueError(f"{place}: trained for {theirs.task}, not for {ours.task}")
    known, wanted = list(theirs.data.classes), list(ours.data.classes)
    if wanted and known != wanted:  # without any they are those of data that are not read yet
        raise ValueError(
            f"{place}: knows the classes {', '.join(known[:5])} ({len(known)} in all), "
            f"this recipe has {', '.join(wanted[:5])} ({len(wanted)} in all)"
        )
    try:
        task.learn_from(task_of(theirs))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    require_same_anchors(place, theirs, ours)
    return run


def fit(trainer: Trainer, info: RunInfo, *, resume: bool, extend: bool = False) -> EpochLog:
    """Train into the trainer's run; a new run that ends before anything of it is saved leaves no folder.

    With `extend`, a finished run begins the trainer's extension.

    Raises:
        ConnectionError: another process of the training has ended, or does not answer.
    """
    run, accelerator, main = trainer.run, trainer.accelerator, trainer.is_main
    if resume:
        require_same_origin(run, info)
        checkpoint.extend(trainer) if extend else checkpoint.resume(trainer)  # before anything else is written
    try:
        if main and resume:
            run.forget_after(trainer.progress.epoch - 1)
            run.note_resumption(info, trainer.extension if extend else None)
        elif main:
            if info.start is not None:
                say(describe(info.start))
            run.begin(info)
        loggers.start(accelerator, run, trainer.progress.epoch)
        line = trainer.fit()
    except BaseException as error:
        loggers.stop(accelerator)
        if main and not resume:
            run.discard_if_empty()
        if accelerator.num_processes > 1 and is_broken_connection(error):
            raise ConnectionError(
                f"another process of this training has ended or does not answer ({str(error).splitlines()[0]}); go on "
                f"from the last saved state with as many processes and --resume {run.folder}"
            ) from error
        raise
    accelerator.end_training()
    return line


def require_same_origin(run: Run, info: RunInfo) -> None:
    """Raise ValueError where data or precision are not those that a run began with; older runs do not know."""
    if not (run.folder / "run.json").is_file():
        return
    before, precision = run.info().data, run.info().precision
    if precision is not None and precision != info.precision:
        raise ValueError(
            f"{run.folder}: trained in the precision {precision}, for which train.precision auto stood; here it stands "
            f"for {info.precision}: go on where it stands for the same, or begin a new run"
        )
    for split, now in info.data.items():
        if split in before and before[split] != now:
            raise ValueError(
                f"{run.folder}: the data have changed since the run began: {split} had {before[split].images} usable "
                f"images, now {now.images}, or other boxes or pixels; put the data back, or begin a new run"
            )


def leave_pictures(run: Run) -> None:
    """Draw the curves of a run's log into its folder."""
    # Which bring matplotlib, slow to import.
    from detection.curves import draw_anytime, draw_curves, draw_dynamics, draw_potentials
    from detection.figures import save_png

    task, history = task_of(run.config), run.history()
    logged = [line.evaluation for line in history if line.evaluation]
    early = draw_anytime({key: logged[-1].after_steps(key) for key in task.headline} if logged else {})
    save_png(draw_curves(history, task.metrics, task.score) + early, run.folder / "curves.png")
    dynamics = draw_dynamics(history)
    if dynamics:
        save_png(dynamics + draw_potentials(history), run.folder / "dynamics.png")


def tell_dropped(**splits: Dataset) -> None:
    """Say on standard error what had to be left out of splits."""
    for name, dataset in splits.items():
        for sentence in dataset.dropped:
            say(f"{name}: {sentence}", error=True)


def load_model(run: Run, weights: Weights = "last") -> nn.Module:
    """Return the network of a saved run in evaluation mode.

    Raises:
        FileNotFoundError: the run has no such weights.
        ValueError: they are damaged or do not fit.
    """
    config = run.config
    model = build_model(without_weights(task_of(config)))
    run.load(model, weights)
    if config.train.channels_last:  # as in training, for the same rounding
        model.to(memory_format=torch.channels_last)
    return model.eval()


def load_for_evaluation(run: Run, weights: Weights = "last") -> tuple[nn.Module, Accelerator]:
    """Return the network of a saved run as its own evaluation had it: on its device, with its precision.

    Raises:
        FileNotFoundError: the run has no such weights.
        ValueError: they are damaged or do not fit.
    """
    accelerator = make_accelerator(run.config)
    # Layers without the name of a wrapper in front.
    return accelerator.unwrap_model(accelerator.prepare(load_model(run, weights))), accelerator


def read_evaluation_data(run: Run, num_images: int | None = None) -> Dataset:
    """Return the evaluation images of a run.

    Args:
        run: of any task.
        num_images: so many of them in equal distances, for the first ones of a folder are of one class; at most all
            there are. None: all.

    Raises:
        FileNotFoundError: they are not there; says how to name another place.
    """
    try:
        dataset = task_of(run.config).read("val")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; if the data lie elsewhere now, say where: --data.root FOLDER") from None
    if num_images is None:
        return dataset
    number = min(num_images, len(dataset))
    return dataset.choose([index * len(dataset) // number for index in range(number)])
