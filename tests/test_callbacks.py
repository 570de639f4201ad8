"""Callbacks and loggers of a training: when they are called, what they get, what happens where one fails."""

import csv
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import log_lines, run_together, start_together
from test_resume import CLASSIFICATION, expect_equal

import detection
from detection.config import parse_recipe
from detection.runs import Run
from detection.training.callbacks import Callbacks
from detection.training.checkpoint import Checkpoint

EVENTS = ("on_train_begin", "on_epoch_begin", "on_step_end", "on_evaluation", "on_epoch_end", "on_train_end")


def recipe(folder: Path, **train):
    """Two epochs of four steps, the second evaluated; folder for the drawn images."""
    values = json.loads(json.dumps(CLASSIFICATION))
    values["data"] |= {"root": str(folder / "data"), "num_train": 32, "num_val": 8}
    values["train"] |= {"ema_decay": 0.0, "eval_every": 2, **train}
    return parse_recipe(values, "recipe")


class Recorder(detection.Callback):
    """Keeps what it is told, and fails at the event `at` for the `number`-th time."""

    def __init__(self, at: str = "", number: int = 1) -> None:
        self.told: list[tuple] = []
        for event in EVENTS:
            setattr(self, event, lambda run, *told, event=event: self.note(event, run, *told))
        self.at, self.number = at, number

    def note(self, event: str, run: Run, *told) -> None:
        assert isinstance(run, Run)
        self.told.append((event, *told))
        if event == self.at and [name for name, *_ in self.told].count(event) == self.number:
            raise KeyError("too late")


class Evaluator(detection.Callback):
    """Evaluates a run after each epoch."""

    def __init__(self, run: Path) -> None:
        self.run, self.metrics, self.exact = run, [], []

    def on_epoch_begin(self, run: Run, epoch: int) -> None:
        self.exact.append(torch.are_deterministic_algorithms_enabled())

    def on_epoch_end(self, run: Run, line) -> None:
        self.metrics.append(detection.evaluate(self.run).metrics["top1"])


@pytest.mark.parametrize("train", [{"precision": "fp16"}, {"precision": "bf16", "deterministic": True}])
def test_a_callback_may_evaluate_another_run(whole, tmp_path, train):
    values = recipe(whole, **train).model_dump(mode="json")
    values["model"] |= {"dropout": 0.0}  # whose random numbers an evaluation may draw
    values["optimizer"] |= {"clip_norm": 0.01}  # below what it is: in fp16 the scale would be clipped, too
    detection.train(values, tmp_path / "alone")
    evaluator = Evaluator(whole / "run")
    detection.train(values, tmp_path / "beside", callbacks=evaluator)
    assert len(evaluator.metrics) == 2 and evaluator.exact == [train.get("deterministic", False)] * 2
    expect_equal(tmp_path / "beside", tmp_path / "alone")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A training without callbacks."""
    folder = tmp_path_factory.mktemp("whole")
    detection.train(recipe(folder), folder / "run")
    return folder


def test_callbacks_are_told_of_every_turn_and_change_nothing(whole, tmp_path):
    recorder = Recorder()
    run = detection.train(recipe(whole), tmp_path / "run", callbacks=[recorder])
    expect_equal(tmp_path / "run", whole / "run")
    epoch = ["on_epoch_begin", *["on_step_end"] * 4]
    names = [event for event, *_ in recorder.told]
    expected = ["on_train_begin", *epoch, "on_epoch_end", *epoch, "on_evaluation", "on_epoch_end", "on_train_end"]
    assert names == expected
    steps = [told[1] for told in recorder.told if told[0] == "on_step_end"]
    assert [(step.epoch, step.number, step.num_steps) for step in steps] == [
        (e, s, 4) for e in (1, 2) for s in (1, 2, 3, 4)
    ]
    assert all(step.loss.shape == () and not step.loss.requires_grad for step in steps)
    lines = run.history()
    for line in lines:
        losses = [step.loss.item() for step in steps if step.epoch == line.epoch]
        assert sum(losses) / 4 == pytest.approx(line.loss, rel=1e-5)
    assert [told for event, *told in recorder.told if event == "on_epoch_begin"] == [[1], [2]]
    ends = [told[1] for told in recorder.told if told[0] == "on_epoch_end"]
    assert [line.to_json() for line in ends] == log_lines(run.folder)
    ((number, evaluation),) = [told for event, *told in recorder.told if event == "on_evaluation"]
    assert number == 2 and evaluation.metrics["top1"] == lines[-1].metrics["top1"]
    assert recorder.told[-1][1].epoch == 2


@pytest.mark.parametrize(
    ("event", "number", "step"),
    [
        ("on_train_begin", 1, (1, 0)),
        ("on_epoch_begin", 2, (2, 0)),
        ("on_step_end", 6, (2, 2)),
        ("on_evaluation", 1, (3, 0)),
        ("on_epoch_end", 1, (2, 0)),
        ("on_train_end", 1, (3, 0)),
    ],
)
def test_one_that_fails_ends_the_run_by_name_and_it_goes_on(whole, tmp_path, event, number, step):
    with pytest.raises(detection.CallbackError, match=rf"^callback Recorder\.{event}: KeyError: 'too late'$") as error:
        detection.train(recipe(whole), tmp_path / "run", callbacks=[Recorder(event, number), Recorder()])
    assert isinstance(error.value.__cause__, KeyError)
    progress = Checkpoint.load(tmp_path / "run").progress
    assert (progress["epoch"], progress["step"]) == step
    detection.train(resume=tmp_path / "run", callbacks=[Recorder()])
    expect_equal(tmp_path / "run", whole / "run")


def test_what_is_no_callback_is_refused(whole, tmp_path):
    with pytest.raises(TypeError, match=r"callbacks: expected instances of detection\.Callback, got <class"):
        detection.train(recipe(whole), tmp_path / "run", callbacks=[Recorder])
    with pytest.raises(TypeError, match=r"Callback, got 3"):  # before the data are read
        detection.train("voc_retinanet_resnet34", tmp_path / "run", callbacks=3, data__root=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()
    silent = Callbacks([Recorder("on_epoch_begin")], Run.open(whole / "run"), active=False)  # no main process
    silent.tell("on_epoch_begin", 1)
    assert silent.error is None


class Witness(detection.Callback):
    """Leaves a line in a file at each end of an epoch, with the rank of its process, and may fail then."""

    def __init__(self, folder: Path, fails: bool) -> None:
        self.folder, self.fails = folder, fails

    def on_epoch_end(self, run: Run, line) -> None:
        with (self.folder / "witness.txt").open("a") as file:
            file.write(f"{os.environ['RANK']}:{line.epoch} ")
        if self.fails:
            raise OSError("disk full")


def train_together(folder: Path, fails: bool) -> None:
    source = (
        {"resume": folder / "run"} if (folder / "run").exists() else {"recipe": recipe(folder), "out": folder / "run"}
    )
    detection.train(**source, callbacks=[Witness(folder, fails)])


def test_of_two_processes_the_main_one_calls_and_both_end_where_it_fails(tmp_path):
    log = tmp_path / "log.txt"
    processes = start_together(2, train_together, tmp_path, True, log=log)
    for process in processes:
        process.join(100)
    assert all(process.exitcode == 1 for process in processes), log.read_text()
    assert "CallbackError: callback Witness.on_epoch_end: OSError: disk full" in log.read_text()
    assert Checkpoint.load(tmp_path / "run").progress["epoch"] == 2
    run_together(2, train_together, tmp_path, False, log=log)
    assert (tmp_path / "witness.txt").read_text() == "0:1 0:2 "
    assert Run.open(tmp_path / "run").finished and len(log_lines(tmp_path / "run")) == 2


# Loggers


def test_csv_and_tensorboard_have_each_epoch_once(whole, tmp_path):
    loggers = ["csv", "tensorboard", "csv"]
    with pytest.raises(detection.CallbackError):  # in the second epoch's evaluation
        detection.train(
            recipe(whole, loggers=loggers, epochs=3), tmp_path / "run", callbacks=[Recorder("on_step_end", 6)]
        )
    folder = tmp_path / "run"
    (folder / "log.csv").write_text((folder / "log.csv").read_text() + "2,0.5\n")  # of after the saved state
    run = detection.train(resume=folder)
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = log_lines(folder)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and len(lines) == 3
    for row, line in zip(rows, lines, strict=True):
        for key in ("loss", "loss/classification", "loss/hoyer", "lr", "seconds"):
            assert float(row[key]) == line[key]
        assert row["top1"] == ("" if line["epoch"] == 1 else str(line["top1"]))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [each.step for each in events.Scalars("loss")] == [1, 2, 3]
    assert [each.value for each in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    assert run.config.train.loggers == loggers


def test_an_epoch_is_logged_where_another_callback_failed_at_its_end(whole, tmp_path):
    loggers = ["csv", "tensorboard"]
    with pytest.raises(detection.CallbackError):
        detection.train(
            recipe(whole, loggers=loggers, epochs=3), tmp_path / "run", callbacks=[Recorder("on_epoch_end", 2)]
        )
    detection.train(resume=tmp_path / "run")
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [each.step for each in events.Scalars("loss")] == [1, 2, 3]


class FakeMLflow(types.ModuleType):
    """As much of MLflow as accelerate's tracker asks for; runs are kept as numbers by step."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = types.SimpleNamespace(name="mlflow")
        self.params, self.rows, self.open = {}, [], None
        self.utils = types.SimpleNamespace(
            validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        )
        self.MlflowClient = lambda: self
        self.get_metric_history = lambda run_id, key: [types.SimpleNamespace(step=step) for step, _ in self.rows]
        self.search_experiments = lambda filter_string: []
        self.create_experiment = lambda **options: "7"
        self.log_params = self.params.update
        self.log_metrics = lambda values, step: self.rows.append((step, values))

    def start_run(self, run_id, **options):
        assert self.open is None, "a run is active"
        self.open = types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "run-1"))
        return self.open

    def end_run(self) -> None:
        self.open = None


class FakeWandB(types.ModuleType):
    """As much of wandb as accelerate's tracker asks for."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")
        self.started, self.rows = [], []
        self.config = types.SimpleNamespace(update=lambda values, **options: setattr(self, "values", values))

    def init(self, **options):
        self.started.append(options)
        log = lambda values, step: self.rows.extend({step} - {*self.rows})  # noqa: E731, a step once, as W&B itself
        return types.SimpleNamespace(id=options.get("id", "abc"), log=log, finish=lambda: None)


def test_mlflow_and_wandb_go_on_with_their_runs(whole, monkeypatch, tmp_path):
    mlflow, wandb = FakeMLflow(), FakeWandB()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    chosen = recipe(whole, loggers=["mlflow", "wandb"])
    with pytest.raises(detection.CallbackError, match=r"Recorder\.on_step_end"):
        detection.train(chosen, tmp_path / "run", callbacks=[Recorder("on_step_end", 6)])
    assert mlflow.open is None and mlflow.params["train.batch_size"] == 8 and wandb.values["train.epochs"] == 2
    assert Run.open(tmp_path / "run").info().trackers == {"mlflow": "run-1", "wandb": "abc"}
    mlflow.rows.append((2, {}))  # an epoch that the state does not have
    detection.train(resume=tmp_path / "run")
    assert [step for step, _ in mlflow.rows] == [1, 2] and wandb.rows == [1, 2]
    assert mlflow.rows[0][1]["loss"] == log_lines(tmp_path / "run")[0]["loss"]
    first, second = wandb.started
    assert first["project"] == "hoyer-det" and first["name"] == "run" and "id" not in first
    assert second["id"] == "abc" and second["resume"] == "allow"
    expect_equal_numbers(tmp_path / "run", whole / "run")


def expect_equal_numbers(found: Path, expected: Path) -> None:
    assert Run.open(found).checksums() == Run.open(expected).checksums()


def test_a_logger_that_fails_ends_the_run_by_name(whole, monkeypatch, tmp_path):
    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    plain = wandb.init

    def refuse(values, step):
        raise OSError("no network")

    def init(**options):
        run = plain(**options)
        run.log = refuse
        return run

    wandb.init = init
    chosen = recipe(whole, loggers=["wandb"])
    with pytest.raises(detection.CallbackError, match=r"callback Loggers\.on_epoch_end: OSError: no network"):
        detection.train(chosen, tmp_path / "run")
    detection.train(resume=tmp_path / "run", train={"loggers": []})
    expect_equal(tmp_path / "run", whole / "run")


def test_bad_loggers_are_one_sentence(whole, monkeypatch, tmp_path):
    with pytest.raises(
        ValueError, match=r"train\.loggers\.0: .*'tensorboard', 'csv', 'wandb' or 'mlflow'.*\(got 'neptune'"
    ):
        detection.train(recipe(whole), tmp_path / "run", train={"loggers": ["neptune"]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    for name in ("tensorboard", "wandb", "mlflow"):
        with pytest.raises(ImportError, match=rf"train\.loggers: {name} is not .*pip install hoyer-det\[{name}\]"):
            detection.train(recipe(whole), tmp_path / "run", train={"loggers": ["csv", name]})
    assert not (tmp_path / "run").exists()
