"""Trainings that are killed or stopped and go on, and what a run does not go on with."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import log_lines, run_tool, start, tool, wait_until
from torch.utils.data import Dataset

from detection.config import flatten, require_same, set_values
from detection.data.loaders import Loader, LoaderError, loader_options
from detection.runs import Run
from detection.tasks.classification import ClassificationTask
from detection.tasks.recipes import ClassificationRecipe
from detection.training import trainer
from detection.training.checkpoint import Checkpoint
from detection.training.signals import SaveClock

CLOCK = {"seconds", "images_per_second", "memory_mib", "eval_seconds"}  # what no two runs have in common

DETECTION = {
    "model": {
        "backbone": {"name": "resnet18", "width": 0.125},
        "neck": {"levels": ["c3", "c4"], "extra_levels": 0, "out_channels": 16},
        "head": {"num_convs": 1, "norm": "group", "representation_size": 16},
        "min_size": [48, 64],
        "max_size": 96,
    },
    "data": {"format": "synthetic", "scenes": {"num_train": 12, "num_val": 4, "size": 64}, "workers": 2},
    "hoyer": {"weight": 0.01},
    "optimizer": {"lr": 0.003, "warmup_steps": 2, "clip_norm": 1.0},
    "train": {"epochs": 8, "batch_size": 2, "eval_every": 2, "ema_decay": 0.9, "save_steps": 1},
}
CLASSIFICATION = {
    "task": "classification",
    "model": {"backbone": {"name": "vgg11", "width": 0.125, "stem": "cifar"}, "dropout": 0.2},
    "data": {"format": "synthetic", "size": 32, "num_train": 64, "num_val": 24},
    "hoyer": {"weight": 0.01},
    "optimizer": {"lr": 0.003, "warmup_steps": 2, "clip_norm": 1.0},
    "train": {"epochs": 2, "batch_size": 8, "ema_decay": 0.9},
}


def write_recipe(folder: Path, values: dict, **sections) -> Path:
    """A recipe file of `values` with `sections` merged in; drawn scenes lie beside it."""
    values = {key: value | sections.get(key, {}) if isinstance(value, dict) else value for key, value in values.items()}
    if values["data"]["format"] == "synthetic":
        values["data"] = values["data"] | {"root": str(folder / "scenes")}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def without_clock(run: Run) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in log_lines(run.folder)]


def expect_equal(found: Path, expected: Path) -> None:
    """Both runs have the same weights to the last bit, and the same log but for the times."""
    found, expected = Run.open(found), Run.open(expected)
    assert without_clock(found) == without_clock(expected)
    assert found.checksums() == expected.checksums()
    assert found.finished
    assert not list(found.folder.glob("*.part")) and not (found.folder / "state.safetensors").exists()


# Killed


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(attempt, tmp_path):
    recipe, log = write_recipe(tmp_path, DETECTION), tmp_path / "log.txt"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(tool, "train_det", recipe, "--out", whole, log=log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()
    with attempt("kills", 15):
        rng, num_kills, in_a_write = random.Random(0), 0, 0
        state = killed / "state.safetensors"

        def parts() -> set[Path]:
            """States that are being written, or were when their process was killed."""
            return set(killed.glob(".state.safetensors.*.part"))

        def wait(until) -> None:
            deadline = time.monotonic() + 60
            while process.is_alive() and not until():
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.0002)

        def modified() -> int:
            try:
                return state.stat().st_mtime_ns
            except FileNotFoundError:
                return 0

        while num_kills < 15:
            before, left = modified(), parts()
            arguments = ["--resume", killed] if (killed / "config.yaml").exists() else [recipe, "--out", killed]
            process = start(tool, "train_det", *arguments, log=log)
            kind = rng.choice(["soon", "write", "write", "later"])
            if kind == "write":  # while a state is being written
                wait(lambda: parts() - left)  # noqa: B023, called at once
            else:
                if kind == "later":  # between one state and the next, evaluation and end of an epoch included
                    wait(lambda: modified() != before)  # noqa: B023, called at once
                time.sleep(rng.uniform(0, 0.4))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL, f"ended after {num_kills} kills: {log.read_text()}"
            num_kills += 1
            in_a_write += bool(parts() - left)
            assert len(parts()) <= 1  # the next writer removes what the one before left
        assert in_a_write >= 3
        process = start(tool, "train_det", "--resume", killed, log=log)
        process.join(300)
        assert process.exitcode == 0, log.read_text()
        expect_equal(killed, whole)
        info = Run.open(killed).info()
        assert info.sha256 == Run.open(killed).checksums()
        assert info.resumed and str(killed) in info.resumed[-1]


# Stopped by a signal


def stop_after(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal in the middle of the given optimiser step."""
    due, calls = SaveClock.due, [0]

    def count(self: SaveClock) -> bool:
        calls[0] += 1
        if calls[0] == step:
            os.kill(os.getpid(), number)
        return due(self)

    monkeypatch.setattr(SaveClock, "due", count)


@pytest.mark.parametrize(
    ("name", "values", "overrides", "step"),
    [
        ("train_cls", CLASSIFICATION, [], 5),
        ("train_cls", CLASSIFICATION, ["train.precision=fp16", "train.accumulate=3", "hoyer.reduction=sum"], 4),
        ("train_cls", CLASSIFICATION, ["train.precision=bf16", "train.channels_last=True", "optimizer.name=adam"], 3),
        ("train_cls", CLASSIFICATION, ["optimizer.name=sgd", "optimizer.schedule=step", "train.deterministic=True"], 8),
        ("train_cls", CLASSIFICATION, ["optimizer.schedule=step", "optimizer.warmup_steps=6"], 2),
        ("train_cls", CLASSIFICATION, ["model.backbone.time_steps=2", "train.low_memory=True"], 4),
        ("train_det", DETECTION, ["model.detector=fasterrcnn", "train.epochs=2", "data.workers=0"], 4),
        ("train_det", DETECTION, ["data.augment.crop=1", "train.epochs=2"], 7),
    ],
)
def test_a_stopped_run_goes_on_exactly(attempt, monkeypatch, capsys, tmp_path, name, values, overrides, step):
    recipe = write_recipe(tmp_path, values)
    run_tool(monkeypatch, name, recipe, *overrides, "--out", tmp_path / "whole")
    with attempt("kills"):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(SystemExit) as stop:
                run_tool(monkeypatch, name, recipe, *overrides, "--out", tmp_path / "run")
        assert stop.value.code == 128 + signal.SIGTERM
        sentence = capsys.readouterr().err.splitlines()[-1]
        assert sentence.startswith("stopped ") and f"hoyer-det train --resume {tmp_path / 'run'}" in sentence
        run_tool(monkeypatch, name, "--resume", tmp_path / "run")
        expect_equal(tmp_path / "run", tmp_path / "whole")
        run_tool(monkeypatch, name, "--resume", tmp_path / "run")
        assert "finished already" in capsys.readouterr().out


def test_ctrl_c_in_an_evaluation_breaks_it_off(attempt, monkeypatch, capsys, tmp_path):
    recipe = write_recipe(tmp_path, CLASSIFICATION)
    run_tool(monkeypatch, "train_cls", recipe, "--out", tmp_path / "whole")
    with attempt("kills"):
        with monkeypatch.context() as patch:
            patch.setattr(
                ClassificationTask, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5)
            )
            with pytest.raises(SystemExit) as stop:
                run_tool(monkeypatch, "train_cls", recipe, "--out", tmp_path / "run")
        assert stop.value.code == 128 + signal.SIGINT
        assert "stopped in epoch 1 of 2 after step 8 of 8" in capsys.readouterr().err
        run_tool(monkeypatch, "train_cls", "--resume", tmp_path / "run")
        expect_equal(tmp_path / "run", tmp_path / "whole")


def test_a_second_ctrl_c_does_not_wait(monkeypatch, tmp_path):
    recipe = write_recipe(tmp_path, CLASSIFICATION)
    with monkeypatch.context() as patch:
        patch.setattr(SaveClock, "due", lambda self: os.kill(os.getpid(), signal.SIGINT) or True)
        patch.setattr(trainer, "save", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit) as stop:
            run_tool(monkeypatch, "train_cls", recipe, "--out", tmp_path / "run")
    assert stop.value.code == 130


# What does not fit


def stop_in_its_second_epoch(folder: Path) -> Path:
    """A classification run that stopped there."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_after(monkeypatch, 12)
        with pytest.raises(SystemExit):
            run_tool(monkeypatch, "train_cls", write_recipe(folder, CLASSIFICATION), "--out", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return stop_in_its_second_epoch(tmp_path_factory.mktemp("stopped"))


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder / "run")
    return folder / "run"


def refusal(monkeypatch, capsys, name: str, *arguments) -> str:
    """The one sentence with which a tool refuses; nothing in the run folder changes by it."""
    (folder,) = {argument for argument in arguments if isinstance(argument, Path)}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, name, *arguments)
    assert stop.value.code == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


def test_another_recipe_is_refused_by_its_key(attempt, stopped, monkeypatch, capsys, tmp_path):
    run = copy_of(stopped, tmp_path)
    with attempt("wrong values", 4):
        message = refusal(monkeypatch, capsys, "train_cls", "--resume", run, "--train.epochs", "5")
        assert "trained with train.epochs 2, wanted is 5" in message
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("ema_decay: 0.9", "ema_decay: 0.0"))
        message = refusal(monkeypatch, capsys, "train_cls", "--resume", run)
        assert "state.safetensors: trained with train.ema_decay 0.9, wanted is 0.0" in message
        assert "--resume" in refusal(monkeypatch, capsys, "train_cls", "recipe.yaml", "--resume", run)
        message = refusal(monkeypatch, capsys, "train_cls", write_recipe(tmp_path, CLASSIFICATION).name, "--out", run)
        assert "no such config file" in message or "or go on with --resume" in message


def test_what_may_differ_does(stopped, monkeypatch, tmp_path):
    run = copy_of(stopped, tmp_path)
    run_tool(monkeypatch, "train_cls", "--resume", run, "--train.save_steps", "3", "--train.save_minutes", "0")
    assert Run.open(run).finished
    assert Run.open(run).config.train.save_steps == 3


def test_no_run_to_go_on_with(monkeypatch, capsys, tmp_path):
    assert "is not a run folder" in refusal(monkeypatch, capsys, "train_cls", "--resume", tmp_path)


def test_a_run_without_state_starts_from_its_beginning(attempt, stopped, monkeypatch, capsys, tmp_path):
    recipe = write_recipe(tmp_path, CLASSIFICATION)
    run_tool(monkeypatch, "train_cls", recipe, "--out", tmp_path / "whole")
    run = copy_of(stopped, tmp_path)
    (run / "state.safetensors").unlink()
    with attempt("damaged files"):
        run_tool(monkeypatch, "train_cls", "--resume", run)
        assert "no state saved yet" in capsys.readouterr().err
        assert Run.open(run).checksums() == Run.open(tmp_path / "whole").checksums()
        assert [line.epoch for line in Run.open(run).history()] == [1, 2]


def test_a_log_without_its_state_is_not_overwritten(attempt, stopped, monkeypatch, capsys, tmp_path):
    run = copy_of(stopped, tmp_path)
    (run / "state.safetensors").unlink()
    log = run / "metrics.jsonl"
    log.write_text(2 * log.read_text())
    with attempt("damaged files"):
        message = refusal(monkeypatch, capsys, "train_cls", "--resume", run)
        assert "2 epochs in its log but no state.safetensors" in message


@pytest.mark.parametrize("everyone", [False, True])
def test_a_stop_of_the_whole_group_or_of_every_process(tmp_path, everyone):
    """The group's loader processes are left alone; where they are told too, the step under way cannot be finished."""
    recipe, log = write_recipe(tmp_path, DETECTION, train={"save_minutes": 10}), tmp_path / "log.txt"
    run = tmp_path / "run"
    process = start(tool_in_its_own_group, "train_det", recipe, "--out", run, log=log)
    wait_until((run / "state.safetensors").exists, [process], log)
    if everyone:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        for pid in (process.pid, *map(int, children)):
            os.kill(pid, signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM, log.read_text()
    (sentence,) = [line for line in log.read_text().splitlines() if line.startswith("stopped ")]
    assert "Traceback" not in log.read_text() and f"--resume {run}" in sentence
    assert everyone or "state saved" in sentence


class Numbers(Dataset):
    """0, 1, 2 as tensors."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(index))


def test_a_loader_process_that_ends_is_an_error_where_it_is_waited_for(attempt):
    for _ in range(3):
        loader = Loader(Numbers(), **loader_options(1) | {"prefetch_factor": 1})
        batches = iter(loader)
        assert next(batches).tolist() == [0.0]
        with attempt("batch jobs"):
            (process,) = loader._iterator._workers
            os.kill(process.pid, signal.SIGKILL)
            state = Path(f"/proc/{process.pid}/stat")
            while state.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)  # its end is signalled here, where a step or a write may be under way
            started = time.monotonic()
            with pytest.raises(LoaderError, match=r"a loader process ended .*data\.workers 0 the main process reads"):
                list(batches)
            assert time.monotonic() - started < 10


def tool_in_its_own_group(*arguments) -> None:
    os.setpgid(0, 0)
    tool(*arguments)


def test_state_of_another_network(attempt, stopped, monkeypatch, capsys, tmp_path):
    run = copy_of(stopped, tmp_path)
    state = Checkpoint.load(run)
    state.network["another.weight"] = state.network.pop("backbone.stages.0.0.weight")
    state.save(run)
    with attempt("damaged files", 2):
        message = refusal(monkeypatch, capsys, "train_cls", "--resume", run)
        assert "does not fit the network" in message and "another.weight" in message
        state.processes *= 2
        state.save(run)
        assert "saved by 2 processes, started with 1" in refusal(monkeypatch, capsys, "train_cls", "--resume", run)


def test_recipes_are_compared_key_by_key():
    config = ClassificationRecipe.model_validate(CLASSIFICATION)
    values = json.loads(json.dumps(flatten(config)))
    require_same(values, config, "here")
    require_same(
        values | {"train.save_steps": 7, "removed.key": 1}, config, "here", free={"train.save_steps", "removed.key"}
    )
    with pytest.raises(ValueError, match=r"here: trained with train.seed 9, wanted is 0"):
        require_same(values | {"train.seed": 9}, config, "here")
    with pytest.raises(ValueError, match=r"train\.epochs 3, wanted is \d+; name .* --extend for epochs behind its end"):
        require_same(values | {"train.epochs": 3}, config, "here")
    with pytest.raises(ValueError, match=r"here: trained with model.backbone.options \{\}"):
        require_same(values, set_values(config, {"model.backbone.options": {"at": 0.9}}), "here")
