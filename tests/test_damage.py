"""Damaged and malicious files, full disks, folders that cannot be written: a sentence, and nothing is lost."""

import ast
import errno
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from helpers import run_tool
from test_resume import CLASSIFICATION, copy_of, expect_equal, refusal, stop_in_its_second_epoch, write_recipe

from backbones import create, load_weights, read_tensors, tensors_to_bytes
from detection.config import load_config
from detection.files import write_whole
from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.run import find_teacher, load_model


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return stop_in_its_second_epoch(tmp_path_factory.mktemp("stopped"))


def damage(content: bytes, rng: random.Random) -> bytes:
    """One bit of it is another."""
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_a_single_wrong_bit_anywhere_is_found(attempt, stopped, tmp_path):
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
            with attempt("damaged files"), pytest.raises(ValueError, match=r"safetensors: damaged weights file"):
                read_tensors(path)


class Malicious:
    """What an attacker would put into a pickle: here it only leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("how", ["pickle", "torch", "truncated", "empty", "text", "bit"])
def test_no_loader_takes_damaged_or_malicious_files(attempt, stopped, monkeypatch, capsys, tmp_path, how):
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
    sentence = "safetensors: written by torch.save" if how == "torch" else "safetensors: damaged weights file"
    with attempt("damaged files", 5):
        assert sentence in refusal(monkeypatch, capsys, "train_cls", "--resume", run)
        assert sentence in refusal(monkeypatch, capsys, "evaluate", run)
        with pytest.raises(ValueError, match=sentence):
            load_weights(create("vgg11", width=0.125, stem="cifar"), run / "last.safetensors")
        recipe = write_recipe(tmp_path, CLASSIFICATION)
        options = ["--model.backbone.weights", run]
        assert sentence in refusal(
            monkeypatch, capsys, "train_cls", str(recipe), "--out", str(tmp_path / "new"), *options
        )
        task = task_of(load_config(recipe, ["distillation.teacher=" + str(run)]))
        with pytest.raises(ValueError, match=sentence):
            load_model(find_teacher(task.with_classes(Run.open(run).config.data.classes)))
        assert not trace.exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "what"), [("run.json", "{"), ("metrics.jsonl", '{"epoch": 1}\n[1]\n')])
def test_damaged_json_is_named(attempt, stopped, monkeypatch, capsys, tmp_path, name, what):
    run = copy_of(stopped, tmp_path)
    (run / name).write_text(what)
    tool_name, option = ("train_cls", ["--resume"]) if name == "run.json" else ("evaluate", [])
    with attempt("damaged files"):
        message = refusal(monkeypatch, capsys, tool_name, *option, run)
        assert f"{name}" in message and "damaged" in message


def test_pickles_are_nowhere_read():
    """torch.load, pickle and their kin are called and imported nowhere in the code."""
    for folder in ("backbones", "detection", "tools"):
        for path in (Path(__file__).parents[1] / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                words = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
                words += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                words += [ast.unparse(node.func)] if isinstance(node, ast.Call) else []
                words += [str(node.arg)] if isinstance(node, ast.keyword) else []
                assert not {"torch.load", "pickle", "allow_pickle", "joblib", "dill"} & set(words), path


# A full disk, an unwritable folder


def test_a_full_disk_leaves_what_was_there(attempt, monkeypatch, tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with attempt("full disks"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match=r"file: not written .No space left on device.; what was there before"):
                write_whole(path, b"after")
        assert path.read_bytes() == b"before" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_during_training(attempt, monkeypatch, capsys, tmp_path):
    recipe = write_recipe(tmp_path, CLASSIFICATION, train={"save_steps": 1})
    run_tool(monkeypatch, "train_cls", recipe, "--out", tmp_path / "whole")
    calls, fsync = [0], os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with attempt("full disks"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(SystemExit) as stop:
                run_tool(monkeypatch, "train_cls", recipe, "--out", tmp_path / "run")
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert "not written (No space left on device)" in error and "Traceback" not in error
        run_tool(monkeypatch, "train_cls", "--resume", tmp_path / "run")
        expect_equal(tmp_path / "run", tmp_path / "whole")


def test_a_folder_that_cannot_be_made(attempt, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    recipe = str(write_recipe(tmp_path, CLASSIFICATION))
    with attempt("full disks"):
        message = refusal(monkeypatch, capsys, "train_cls", recipe, "--out", tmp_path / "file" / "run")
        assert f"{tmp_path / 'file' / 'run'}: no files can be written there" in message


def test_files_of_others_are_read_and_ours_have_a_checksum(attempt, tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(4.0), "b": torch.ones((), dtype=torch.long)}
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    with attempt("damaged files"):
        found, text = read_tensors(tmp_path / "theirs.safetensors")
        assert text == "" and found.keys() == tensors.keys()
        content = tensors_to_bytes(tensors, "text")
        assert content == tensors_to_bytes(dict(reversed(tensors.items())), "text")
        (tmp_path / "ours.safetensors").write_bytes(content)
        found, text = read_tensors(tmp_path / "ours.safetensors")
        assert text == "text" and all(torch.equal(found[name], tensors[name]) for name in tensors)
