"""Trainings that are killed, stopped, starved of disk or fed with damaged files, and go on."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers import run_tool, start, tool, wait_until

from backbones import HoyerSpike, create, load_weights, read_tensors, tensors_to_bytes
from detection import engine
from detection.checkpoint import Run
from detection.config import ClassificationConfig, flatten, load_config, require_same
from detection.distillation import load_teacher
from detection.files import write_whole
from detection.resume import SaveClock, load_state, save_state

CLOCK = {"seconds", "images_per_second", "eval_seconds"}  # what no two runs have in common

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
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in run.history()]


def expect_equal(found: Path, expected: Path) -> None:
    """Both runs have the same weights to the last bit, and the same log but for the times."""
    found, expected = Run.open(found), Run.open(expected)
    assert without_clock(found) == without_clock(expected)
    assert found.checksums() == expected.checksums()
    assert found.finished
    assert not list(found.folder.glob("*.part")) and not (found.folder / "state.safetensors").exists()


# Killed


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(tmp_path):
    recipe, log = write_recipe(tmp_path, DETECTION), tmp_path / "log.txt"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(tool, "train_det", recipe, "--out", whole, log=log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()
    rng, num_kills, in_a_write = random.Random(0), 0, 0
    state, part = killed / "state.safetensors", killed / "state.safetensors.part"

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

    while num_kills < 25:
        part.unlink(missing_ok=True)
        before = modified()
        arguments = ["--resume", killed] if (killed / "config.yaml").exists() else [recipe, "--out", killed]
        process = start(tool, "train_det", *arguments, log=log)
        kind = rng.choice(["soon", "write", "write", "later"])
        if kind == "write":  # while a state is being written
            wait(part.exists)
        else:
            if kind == "later":  # between one state and the next, evaluation and end of an epoch included
                wait(lambda: modified() != before)  # noqa: B023, called at once
            time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"ended after {num_kills} kills: {log.read_text()}"
        num_kills += 1
        in_a_write += part.exists()
    assert in_a_write >= 5
    process = start(tool, "train_det", "--resume", killed, log=log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()
    expect_equal(killed, whole)
    info = Run.open(killed).info()
    assert info["sha256"] == Run.open(killed).checksums()
    assert info["resumed"] and str(killed) in info["resumed"][-1]


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
        ("train_det", DETECTION, ["model.detector=fasterrcnn", "train.epochs=2", "data.workers=0"], 4),
        ("train_det", DETECTION, ["data.augment.crop=1", "train.epochs=2"], 7),
    ],
)
def test_a_stopped_run_goes_on_exactly(monkeypatch, capsys, tmp_path, name, values, overrides, step):
    recipe = write_recipe(tmp_path, values)
    run_tool(monkeypatch, name, recipe, *overrides, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(SystemExit) as stop:
            run_tool(monkeypatch, name, recipe, *overrides, "--out", tmp_path / "run")
    assert stop.value.code == 128 + signal.SIGTERM
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("stopped ") and f"python tools/{name}.py --resume {tmp_path / 'run'}" in sentence
    run_tool(monkeypatch, name, "--resume", tmp_path / "run")
    expect_equal(tmp_path / "run", tmp_path / "whole")
    run_tool(monkeypatch, name, "--resume", tmp_path / "run")
    assert "finished already" in capsys.readouterr().out


def test_ctrl_c_in_an_evaluation_breaks_it_off(monkeypatch, capsys, tmp_path):
    recipe = write_recipe(tmp_path, CLASSIFICATION)
    run_tool(monkeypatch, "train_cls", recipe, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "evaluate_both", lambda *_: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
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
        patch.setattr(engine.Training, "save", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit) as stop:
            run_tool(monkeypatch, "train_cls", recipe, "--out", tmp_path / "run")
    assert stop.value.code == 130


# What does not fit


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A classification run that stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_after(monkeypatch, 12)
        with pytest.raises(SystemExit):
            run_tool(monkeypatch, "train_cls", write_recipe(folder, CLASSIFICATION), "--out", folder / "run")
    return folder / "run"


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


def test_another_recipe_is_refused_by_its_key(stopped, monkeypatch, capsys, tmp_path):
    run = copy_of(stopped, tmp_path)
    message = refusal(monkeypatch, capsys, "train_cls", "--resume", run, "--train.epochs", "5")
    assert "trained with train.epochs 2, wanted is 5" in message
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("ema_decay: 0.9", "ema_decay: 0.0"))
    message = refusal(monkeypatch, capsys, "train_cls", "--resume", run)
    assert "state.safetensors: trained with train.ema_decay 0.9, wanted is 0.0" in message
    assert "--resume" in refusal(monkeypatch, capsys, "train_cls", "recipe.yaml", "--resume", run)
    assert "task is 'classification'" in refusal(monkeypatch, capsys, "train_det", "--resume", run)
    message = refusal(monkeypatch, capsys, "train_cls", write_recipe(tmp_path, CLASSIFICATION).name, "--out", run)
    assert "no such config file" in message or "or go on with --resume" in message


def test_what_may_differ_does(stopped, monkeypatch, tmp_path):
    run = copy_of(stopped, tmp_path)
    run_tool(monkeypatch, "train_cls", "--resume", run, "--train.save_steps", "3", "--train.save_minutes", "0")
    assert Run.open(run).finished
    assert Run.open(run).config.train.save_steps == 3


def test_no_run_to_go_on_with(monkeypatch, capsys, tmp_path):
    assert "is not a run folder" in refusal(monkeypatch, capsys, "train_cls", "--resume", tmp_path)


def test_a_run_without_state_starts_from_its_beginning(stopped, monkeypatch, capsys, tmp_path):
    recipe = write_recipe(tmp_path, CLASSIFICATION)
    run_tool(monkeypatch, "train_cls", recipe, "--out", tmp_path / "whole")
    run = copy_of(stopped, tmp_path)
    (run / "state.safetensors").unlink()
    run_tool(monkeypatch, "train_cls", "--resume", run)
    assert "no state saved yet" in capsys.readouterr().err
    assert Run.open(run).checksums() == Run.open(tmp_path / "whole").checksums()
    assert [line["epoch"] for line in Run.open(run).history()] == [1, 2]


def test_a_log_without_its_state_is_not_overwritten(stopped, monkeypatch, capsys, tmp_path):
    run = copy_of(stopped, tmp_path)
    (run / "state.safetensors").unlink()
    log = run / "metrics.jsonl"
    log.write_text(2 * log.read_text())
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


def tool_in_its_own_group(*arguments) -> None:
    os.setpgid(0, 0)
    tool(*arguments)


def test_state_of_another_network(stopped, monkeypatch, capsys, tmp_path):
    run = copy_of(stopped, tmp_path)
    state = load_state(Run.open(run))
    state["network"]["another.weight"] = state["network"].pop("backbone.stages.0.0.weight")
    save_state(Run.open(run), state)
    message = refusal(monkeypatch, capsys, "train_cls", "--resume", run)
    assert "does not fit the network" in message and "another.weight" in message
    state["processes"] *= 2
    save_state(Run.open(run), state)
    assert "saved by 2 processes, started with 1" in refusal(monkeypatch, capsys, "train_cls", "--resume", run)


def damage(content: bytes, rng: random.Random) -> bytes:
    """One bit of it is another."""
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_a_single_wrong_bit_anywhere_is_found(stopped, tmp_path):
    rng = random.Random(0)
    for name in ("state.safetensors", "last.safetensors"):
        content = (stopped / name).read_bytes()
        head = 8 + int.from_bytes(content[:8], "little")
        for number in range(100):
            # The header is small and every bit of it matters in its own way: half of the damage goes there.
            at = head if number % 2 else len(content)
            changed = damage(content[:at], rng) + content[at:]
            path = tmp_path / name
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"safetensors: damaged weights file"):
                read_tensors(path)


class Malicious:
    """What an attacker would put into a pickle: here it only leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("how", ["pickle", "torch", "truncated", "empty", "text", "bit"])
def test_no_loader_takes_damaged_or_malicious_files(stopped, monkeypatch, capsys, tmp_path, how):
    trace = tmp_path / "trace"

    def spoil(path: Path) -> None:
        content = path.read_bytes()
        match how:
            case "pickle":
                path.write_bytes(pickle.dumps(Malicious(trace)))
            case "torch":
                torch.save({"weight": Malicious(trace)}, path)
            case "truncated":
                path.write_bytes(content[: len(content) // 2])
            case "empty":
                path.write_bytes(b"")
            case "text":
                path.write_text("not weights")
            case "bit":
                path.write_bytes(damage(content, random.Random(1)))

    run = copy_of(stopped, tmp_path)
    for name in ("state", "last"):
        spoil(run / f"{name}.safetensors")
    sentence = "safetensors: damaged weights file"
    assert sentence in refusal(monkeypatch, capsys, "train_cls", "--resume", run)
    assert sentence in refusal(monkeypatch, capsys, "evaluate", run)
    with pytest.raises(ValueError, match=sentence):
        load_weights(create("vgg11", width=0.125, stem="cifar"), run / "last.safetensors")
    recipe = write_recipe(tmp_path, CLASSIFICATION)
    options = ["--model.backbone.weights", run]
    assert sentence in refusal(monkeypatch, capsys, "train_cls", str(recipe), "--out", str(tmp_path / "new"), *options)
    config = load_config(recipe, ["distillation.teacher=" + str(run)], kind=ClassificationConfig)
    config.data.classes = Run.open(run).config.data.classes
    with pytest.raises(ValueError, match=sentence):
        load_teacher(config.distillation, config)
    assert not trace.exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "what"), [("run.json", "{"), ("metrics.jsonl", '{"epoch": 1}\n[1]\n')])
def test_damaged_json_is_named(stopped, monkeypatch, capsys, tmp_path, name, what):
    run = copy_of(stopped, tmp_path)
    (run / name).write_text(what)
    tool_name, option = ("train_cls", ["--resume"]) if name == "run.json" else ("evaluate", [])
    message = refusal(monkeypatch, capsys, tool_name, *option, run)
    assert f"{name}" in message and "damaged" in message


def test_pickles_are_nowhere_read():
    """torch.load, pickle and their kin do not occur in the code at all."""
    for folder in ("backbones", "detection", "tools"):
        for path in (Path(__file__).parents[1] / folder).rglob("*.py"):
            text = path.read_text()
            assert not any(word in text for word in ("torch.load(", "import pickle", "allow_pickle", "joblib")), path


# A full disk, an unwritable folder


def test_a_full_disk_leaves_what_was_there(monkeypatch, tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"file: not written .No space left on device.; what was there before"):
            write_whole(path, b"after")
    assert path.read_bytes() == b"before" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_during_training(monkeypatch, capsys, tmp_path):
    recipe = write_recipe(tmp_path, CLASSIFICATION, train={"save_steps": 1})
    run_tool(monkeypatch, "train_cls", recipe, "--out", tmp_path / "whole")
    calls, fsync = [0], os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit) as stop:
            run_tool(monkeypatch, "train_cls", recipe, "--out", tmp_path / "run")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "not written (No space left on device)" in error and "Traceback" not in error
    run_tool(monkeypatch, "train_cls", "--resume", tmp_path / "run")
    expect_equal(tmp_path / "run", tmp_path / "whole")


def test_a_folder_that_cannot_be_made(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    recipe = str(write_recipe(tmp_path, CLASSIFICATION))
    message = refusal(monkeypatch, capsys, "train_cls", recipe, "--out", tmp_path / "file" / "run")
    assert f"{tmp_path / 'file' / 'run'}: no files can be written there" in message


# Numbers that went wrong


class Batches:
    """Four batches of two images, by the loop's contract."""

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        self.first = first

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        for index in range(self.first, 4):
            yield torch.full((2, 1, 4, 4), 1.0 + index), [{"image_id": 10 * index}, {"image_id": 10 * index + 1}]


def fit(model: torch.nn.Module, compute_losses, folder: Path, **train) -> Run:
    """Trains by the loop itself, with evaluations that find nothing."""
    values = CLASSIFICATION | {"train": {"epochs": 2, "save_steps": 2} | train, "hoyer": {"weight": 0.01}}
    config = ClassificationConfig.model_validate(values)
    run = Run.create(folder, config, ["test"])
    engine.fit(
        model,
        Batches(),
        compute_losses=compute_losses,
        evaluate=lambda model: {},
        best_by="none",
        config=config,
        run=run,
        accelerator=Accelerator(),
    )
    return run


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path):
    model = torch.nn.Conv2d(1, 1, 1)

    def losses(model, batch):
        images, _ = batch
        out = model(images).mean()
        # The root of 0 has no finite slope, though the loss is 0.
        return {"task": out, "root": (0 * out.square()).sqrt() if images[0, 0, 0, 0] == 4 else out * 0}

    with pytest.raises(FloatingPointError, match=r"gradient is not finite in epoch 1, step 4: task .*, root 0; image"):
        fit(model, losses, tmp_path / "run")
    state = load_state(Run.open(tmp_path / "run"))
    assert state["progress"]["step"] == 2
    assert all(value.isfinite().all() for value in state["network"].values())


def test_a_loss_that_is_not_finite_names_its_images(tmp_path):
    def losses(model, batch):
        out = model(batch[0]).mean()
        return {"task": out * float("nan") if batch[0][0, 0, 0, 0] == 2 else out}

    with pytest.raises(FloatingPointError, match="loss is not finite in epoch 1, step 2: task nan; image ids 10, 11"):
        fit(torch.nn.Conv2d(1, 1, 1), losses, tmp_path / "run")


def test_a_silent_layer_is_named(tmp_path, capsys):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), HoyerSpike(1), torch.nn.Conv2d(1, 1, 1), HoyerSpike(1))
    with torch.no_grad():
        for layer, bias in ((model[0], 2.0), (model[2], -50.0)):
            layer.weight.fill_(1)
            layer.bias.fill_(bias)
    run = fit(model, lambda model, batch: {"task": model(batch[0]).mean()}, tmp_path / "run", epochs=1)
    assert [line["silent"] for line in run.history()] == [["3"]]
    assert "warning: spike layers silent in epoch 1: 3\n" in capsys.readouterr().err


def test_accumulated_batches_have_the_hoyer_term_of_one_batch(tmp_path):
    """Equal batches: two of them, accumulated, are one of twice the size, in both reductions, to the last digits."""

    class Same(Batches):
        def __init__(self, repeat: int, number: int) -> None:
            self.repeat, self.number = repeat, number

        def __len__(self) -> int:
            return self.number

        def __iter__(self):
            for _ in range(self.number):
                yield torch.linspace(-1, 3, 16).view(1, 1, 4, 4).repeat(self.repeat, 1, 1, 1), []

    for reduction in ("sum", "mean"):
        lines = []
        for repeat, number, accumulate in ((4, 1, 1), (2, 2, 2), (1, 4, 4)):
            values = CLASSIFICATION | {
                "train": {"epochs": 2, "accumulate": accumulate},
                "hoyer": {"weight": 0.5, "reduction": reduction},
            }
            config = ClassificationConfig.model_validate(values)
            run = Run.create(tmp_path / f"{reduction}{repeat}", config, ["test"])
            torch.manual_seed(0)
            engine.fit(
                torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), HoyerSpike(2), torch.nn.Conv2d(2, 1, 1)),
                Same(repeat, number),
                compute_losses=lambda model, batch: {"task": model(batch[0]).square().mean()},
                evaluate=lambda model: {},
                best_by="none",
                config=config,
                run=run,
                accelerator=Accelerator(),
            )
            lines.append(run.history())
        for epoch in range(2):
            for other in lines[1:]:
                for key in ("loss", "loss/task", "loss/hoyer"):
                    assert other[epoch][key] == pytest.approx(lines[0][epoch][key], rel=1e-5)
                assert other[epoch]["v_th"] == pytest.approx(lines[0][epoch]["v_th"], rel=1e-5)
                assert other[epoch]["hoyer_per_layer"] == pytest.approx(lines[0][epoch]["hoyer_per_layer"], rel=1e-5)


def test_precisions_agree(monkeypatch, tmp_path):
    """The same small recipe in three precisions: it learns, and the losses are within 10 % of float32's throughout.

    That is no rounding error: a potential that rounds to the other side of its threshold is another spike.
    """
    curves = {}
    for precision in ("no", "bf16", "fp16"):
        train = {"precision": precision, "epochs": 5, "batch_size": 4, "eval_every": 5, "ema_decay": 0}
        recipe = write_recipe(tmp_path, DETECTION, train=train)
        overrides = ["data.workers=0", "data.scenes.num_train=32", "--model.min_size", "64"]
        run_tool(monkeypatch, "train_det", recipe, *overrides, "--out", tmp_path / precision)
        curves[precision] = [line["loss"] for line in Run.open(tmp_path / precision).history()]
    assert curves["no"][-1] < 0.8 * curves["no"][0]
    assert curves["fp16"] != curves["no"] != curves["bf16"]  # they do compute otherwise
    for precision in ("bf16", "fp16"):
        assert curves[precision] == pytest.approx(curves["no"], rel=0.1)


def test_no_overflow_where_sums_exceed_fp16():
    layer = HoyerSpike(8)
    u = torch.full((4, 8, 64, 64), 0.9, dtype=torch.float16, requires_grad=True)  # sum c = 118,000 > 65,504
    out = layer(u)
    assert layer.extremum.item() == pytest.approx(0.9, rel=1e-3) and out.dtype == torch.float16
    layer._penalty.backward()
    assert layer._penalty.item() == pytest.approx(u.numel(), rel=1e-3)
    assert u.grad.isfinite().all() and layer.v_th.grad.isfinite()


def test_state_comes_back_as_it_was(tmp_path):
    run = Run.create(tmp_path / "run", ClassificationConfig.model_validate(CLASSIFICATION), ["test"])
    state = {
        "numbers": [1, -2.5, 0.1 + 0.2, float("-inf"), True, None, "text"],
        "pair": (1, ("a", 2)),
        3: {"tensor": torch.arange(3), "scalar": torch.tensor(0.5), "empty": torch.zeros(0, 4)},
        "bf16": torch.tensor([1.0, 3.0], dtype=torch.bfloat16),
    }
    save_state(run, state)
    found = load_state(run)
    assert found["numbers"] == state["numbers"] and found["pair"] == state["pair"] and found.keys() == state.keys()
    for name, value in state[3].items():
        assert torch.equal(found[3][name], value) and found[3][name].dtype == value.dtype
    assert torch.equal(found["bf16"], state["bf16"])
    with pytest.raises(TypeError, match="not set"):
        save_state(run, {"a": {1, 2}})


def test_files_of_others_are_read_and_ours_have_a_checksum(tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(4.0), "b": torch.ones((), dtype=torch.long)}
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    found, text = read_tensors(tmp_path / "theirs.safetensors")
    assert text == "" and found.keys() == tensors.keys()
    content = tensors_to_bytes(tensors, "text")
    assert content == tensors_to_bytes(dict(reversed(tensors.items())), "text")
    (tmp_path / "ours.safetensors").write_bytes(content)
    found, text = read_tensors(tmp_path / "ours.safetensors")
    assert text == "text" and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_recipes_are_compared_key_by_key():
    config = ClassificationConfig.model_validate(CLASSIFICATION)
    values = json.loads(json.dumps(flatten(config)))
    require_same(values, config, "here")
    require_same(
        values | {"train.save_steps": 7, "removed.key": 1}, config, "here", free={"train.save_steps", "removed.key"}
    )
    with pytest.raises(ValueError, match=r"here: trained with train.seed 9, wanted is 0"):
        require_same(values | {"train.seed": 9}, config, "here")
