"""Batches that BatchNorm cannot learn of, thin images, loader processes that die: a run ends well or goes on."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_data import write_image
from helpers import log_lines, run_tool, start, tool, wait_until
from test_check_data import check
from test_resume import CLASSIFICATION, DETECTION, expect_equal, stop_after, write_recipe
from torch.utils.data import Dataset

from detection.data.loaders import LoaderError, build_loader

# Down to one cell of the deepest map, where a batch of one image has one value per channel.
SMALL = DETECTION["model"] | {
    "neck": {"levels": ["c3", "c5"], "extra_levels": 0, "out_channels": 16},
    "min_size": [32],
    "max_size": 64,
}


def write_set(root: Path, name: str, sizes: list[tuple[int, int]]) -> None:
    """A COCO file NAME.json of images with a cat each, whose ids are the names of their files."""
    files = [f"{name}{index}.png" for index in range(len(sizes))]
    pairs = list(zip(files, sizes, strict=True))
    for file, size in pairs:
        write_image(root / "images" / file, *size)
    content = {
        "images": [{"id": file, "file_name": file, "width": w, "height": h} for file, (w, h) in pairs],
        "annotations": [
            {"id": index + 1, "image_id": file, "category_id": 1, "bbox": [1, 1, w // 2, h // 2]}
            for index, (file, (w, h)) in enumerate(pairs)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (root / f"{name}.json").write_text(json.dumps(content))


def small_recipe(root: Path, sizes: list[tuple[int, int]], val_sizes: list[tuple[int, int]], **train) -> Path:
    """A recipe of a small detector on images of these sizes."""
    write_set(root, "train", sizes)
    write_set(root, "val", val_sizes)
    files = {"train": ["train.json"], "val": ["val.json"], "train_images": "images", "val_images": "images"}
    data = {"format": "coco", "root": str(root), "workers": 0, **files}
    return write_recipe(root, DETECTION | {"model": SMALL, "data": data, "train": train})


# Batches of one image


@pytest.mark.parametrize("name", ["train_det", "train_cls"])
def test_a_last_batch_of_one_image_is_left_out_and_a_run_goes_on(monkeypatch, tmp_path, attempt, name):
    """Five images in batches of two: two steps an epoch, before and behind a stop."""
    train = {"epochs": 2, "batch_size": 2, "save_steps": 1, "eval_every": 2}
    if name == "train_det":
        recipe = small_recipe(tmp_path, [(32, 32)] * 5, [(32, 32)], **train)
    else:
        for index in range(5):
            write_image(tmp_path / f"train/{'ab'[index % 2]}/{index}.png", 32, 32, index)
            write_image(tmp_path / f"val/{'ab'[index % 2]}/{index}.png", 32, 32, index)
        data = {"format": "folder", "root": str(tmp_path), "size": 32, "in_memory": False, "workers": 0}
        recipe = write_recipe(tmp_path, CLASSIFICATION | {"data": data, "train": train})
    with attempt("mutated images"):
        run_tool(monkeypatch, name, recipe, "--out", tmp_path / "whole")
        assert [line["step"] for line in log_lines(tmp_path / "whole")] == [2, 4]
    with attempt("kills"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_after(patch, 2)
            run_tool(patch, name, recipe, "--out", tmp_path / "run")
        assert len(log_lines(tmp_path / "run")) < 2
        run_tool(monkeypatch, name, "--resume", tmp_path / "run")
        expect_equal(tmp_path / "run", tmp_path / "whole")


def test_a_batch_that_batch_norm_cannot_learn_of(monkeypatch, capsys, tmp_path, attempt):
    """Of batches of one image, one whose deepest map is one cell is left out by name; if none is larger, an error."""
    train = {"epochs": 1, "batch_size": 1, "seed": 0}
    wide, square = (64, 32), (32, 32)
    with attempt("mutated images"):
        recipe = small_recipe(tmp_path, [wide, wide, square, wide], [wide], **train)
        run_tool(monkeypatch, "train_det", recipe, "--out", tmp_path / "run")
        (warning,) = (line for line in capsys.readouterr().err.splitlines() if "left out" in line)
        assert warning.startswith("warning: epoch 1, step ") and warning.endswith("; image ids train2.png")
        (line,) = log_lines(tmp_path / "run")
        assert line["step"] == 4 and line["loss"] > 0.5
    with attempt("mutated images"):
        recipe = small_recipe(tmp_path / "b", [square], [wide], **train)
        with pytest.raises(SystemExit) as stop:
            run_tool(monkeypatch, "train_det", recipe, "--out", tmp_path / "none")
        (error,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and not (tmp_path / "none").exists()
        assert error.startswith(
            "error: epoch 1, step 1: a BatchNorm has one value per channel in a batch of 1 image(s)"
        )
        assert "a larger train.batch_size" in error and error.endswith("; image ids train0.png")


def test_a_batch_that_is_left_out_makes_no_step_smaller(monkeypatch, capsys, tmp_path):
    train = {"epochs": 1, "batch_size": 1, "seed": 0, "ema_decay": 0.0}
    wide, square = (64, 32), (32, 32)
    losses = {}
    for accumulate in (1, 2):
        recipe = small_recipe(tmp_path / str(accumulate), [wide, wide, square, wide], [wide], **train)
        override = ["optimizer.lr=1e-12", "optimizer.name=sgd", f"train.accumulate={accumulate}", "hoyer.weight=0"]
        override.append("data.augment.hflip=0")  # so that all images but one are the same
        run_tool(monkeypatch, "train_det", recipe, *override, "--out", tmp_path / str(accumulate) / "run")
        assert "left out" in capsys.readouterr().err
        losses[accumulate] = log_lines(tmp_path / str(accumulate) / "run")[0]["loss"]
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)


# Thin images


def test_thin_images_train_and_validate(monkeypatch, capsys, tmp_path, attempt):
    sizes = [(3000, 10), (40, 30), (10, 3000), (40, 30)]
    recipe = small_recipe(tmp_path, sizes, sizes[:2], epochs=1, batch_size=2)
    with attempt("mutated images", 2):
        status, lines = check(monkeypatch, capsys, recipe)
        assert (status, lines[-1]) == (0, "training can go on")
        assert "train: left out or mended: 0" in lines and "train: image width: 10 to 3000 pixels, median 40" in lines
        run_tool(monkeypatch, "train_det", recipe, "--out", tmp_path / "run")
        (line,) = log_lines(tmp_path / "run")
        assert line["step"] == 2 and 0 < line["loss"] < 10 and 0 <= line["AP"] <= 1


# Loader processes that die


class Numbers(Dataset):
    """Images whose pixels are the number of the process that read them."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        return torch.full((3, 2, 2), os.getpid(), dtype=torch.long), {"image_id": index}


def test_a_dead_loader_process_is_told_where_its_images_are_waited_for(attempt):
    """Not in the middle of a step, and with the remedy."""
    loader = build_loader(Numbers(), batch_size=2, workers=1, shuffle=False)
    steps = 0
    with (
        attempt("kills"),
        pytest.raises(LoaderError, match=r"process ended .*; with data\.workers 0 the main"),
    ):
        for images, _ in loader:
            os.kill(int(images[0][0, 0, 0]), signal.SIGKILL)
            time.sleep(0.2)
            steps += 1
    assert 1 <= steps < 6


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks Linux for the children of a process")
def test_a_killed_loader_process_ends_the_training_which_goes_on_without(monkeypatch, tmp_path, attempt):
    recipe, run, log = write_recipe(tmp_path, DETECTION, data={"workers": 1}), tmp_path / "run", tmp_path / "log.txt"
    long = ["train.epochs=3", "train.eval_every=3"]
    with attempt("kills"):
        process = start(tool, "train_det", recipe, *long, "--out", run, log=log)
        wait_until(lambda: (run / "metrics.jsonl").is_file(), [process], log)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        process.join(120)
        assert process.exitcode == 2, log.read_text()
        last = log.read_text().splitlines()[-1]
        assert last.startswith("error: a loader process ended or found no shared memory (DataLoader worker (pid")
        assert "; with data.workers 0 the main process reads, and needs neither;" in last
        run_tool(monkeypatch, "train_det", "--resume", run, "data.workers=0")
        run_tool(monkeypatch, "train_det", recipe, *long, "data.workers=0", "--out", tmp_path / "whole")
        expect_equal(run, tmp_path / "whole")


def tool_with_little_shared_memory(*arguments) -> None:
    """As `tool`, where /dev/shm has 64 kB, as in a container; status 77 where that may not be made."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private = 0x00020000, 1 << 18 | 1 << 14
    if (
        libc.unshare(new_mounts)
        or libc.mount(b"none", b"/", None, private, None)
        or libc.mount(b"shm", b"/dev/shm", b"tmpfs", 0, b"size=64k")
    ):
        sys.exit(77)
    tool(*arguments)


def test_a_training_without_shared_memory_ends_with_the_remedy(tmp_path, attempt):
    recipe, run, log = write_recipe(tmp_path, DETECTION, data={"workers": 1}), tmp_path / "run", tmp_path / "log.txt"
    process = start(tool_with_little_shared_memory, "train_det", recipe, "train.epochs=1", "--out", run, log=log)
    process.join(120)
    if process.exitcode == 77:
        pytest.skip("no right to mount")
    with attempt("full disks"):
        assert process.exitcode == 2, log.read_text()
        last = log.read_text().splitlines()[-1]
        assert last.startswith(
            "error: a loader process ended or found no shared memory (RuntimeError: unable to allocate "
        )
        assert "No space left on device (28)); with data.workers 0 the main process reads, and needs neither;" in last
    with attempt("full disks"):
        more = ["train.epochs=1", "data.workers=0", "--out", tmp_path / "other"]
        process = start(tool_with_little_shared_memory, "train_det", recipe, *more, log=log)
        process.join(120)
        assert process.exitcode == 0 and log_lines(tmp_path / "other")[0]["step"] == 6, log.read_text()
