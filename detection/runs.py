"""A run on disk: one folder with the recipe, the log, the weights and the pictures of one training."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from backbones import read_tensors, tensors_to_bytes, zoo
from backbones.weights import require_finite
from detection import files
from detection.config import Recipe, read_recipe, save_config
from detection.records import EpochLog, Extension, Machine, RunInfo, Weights
from detection.text import plural, say

MAX_INFO, MAX_LOG = 2**24, 2**29  # bytes of a run.json and of a log
PACKAGES = ("torch", "torchvision", "numpy", "albumentations", "pycocotools", "accelerate", "safetensors")


class Run:
    """The folder of one training.

    Files: config.yaml (the whole recipe), run.json (`RunInfo`), metrics.jsonl (an `EpochLog` per line),
    best.safetensors, last.safetensors and, where there is one, the average ema.safetensors, curves.png, dynamics.png
    (with spike layers), predictions.png (a detector's). Until the training has ended also state.safetensors, from which
    it can go on, see `detection.training.checkpoint`.

    Attributes:
        folder: where all that lies.
        config: the recipe, class names filled in.
    """

    def __init__(self, folder: Path, config: Recipe) -> None:
        self.folder, self.config = folder, config
        self._is_own = self._begun = False  # whether this process made the folder, and the files in it

    def __repr__(self) -> str:
        number = (self.folder / "metrics.jsonl").read_bytes().count(b"\n") if self.has_log else 0
        return f"Run({self.address!r}: {plural(number, 'epoch')})"

    @staticmethod
    def check_free(folder: str | Path) -> Path:
        """Return `folder` as a path that a new run may take.

        Raises:
            BlockingIOError: another training is writing into it.
            FileExistsError: there is something already.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or not files.is_empty(folder)):
            if folder.is_dir():
                files.require_no_writer(folder)
            go_on = f", or go on with hoyer-det train --resume {folder}" if (folder / "config.yaml").is_file() else ""
            raise FileExistsError(f"{folder} exists already; name another folder, or remove it first{go_on}")
        return folder

    @classmethod
    def create(cls, folder: str | Path, config: Recipe, info: RunInfo) -> Run:
        """Return a new run; see `begin`."""
        run = cls(Path(folder), config)
        run.begin(info)
        return run

    def begin(self, info: RunInfo) -> None:
        """Make the folder of a new run, with config.yaml and run.json in it; its lock is held from then on.

        Raises:
            BlockingIOError: another training is writing into it.
            FileExistsError: there is something already.
        """
        try:
            self.folder.mkdir(parents=True)
            self._is_own = True
        except FileExistsError:
            self.check_free(self.folder)
        self.lock()
        try:
            self.check_free(self.folder)  # now that no other process can write into it
        except FileExistsError:
            self.unlock()
            raise
        self._begun = True
        save_config(self.config, self.folder / "config.yaml")
        self.write_info(info)

    def lock(self) -> None:
        """Become the one writer of the folder, and remove what killed ones were writing.

        Raises:
            BlockingIOError: another training is writing into it; says which.
        """
        if not files.lock_folder(self.folder):
            say(f"warning: {self.folder}: no locks on this file system; let no other training write there", error=True)
        files.remove_parts(self.folder)

    def unlock(self) -> None:
        """Let others write, if this process is the one writer."""
        files.unlock_folder(self.folder)

    @classmethod
    def open(cls, folder: str | Path, data_root: str | Path | None = None) -> Run:
        """Return an existing run.

        Args:
            folder: where it lies, or "zoo:NAME" for an entry of `backbones.zoo`.
            data_root: where its data lie now, for `config.data.root`; None: where they lay when it was trained.

        Raises:
            FileNotFoundError: `folder` is no run folder.
            ValueError: its config.yaml does not fit this version, or there is no such entry of the zoo.
        """
        files.require_path("run", folder, "a run folder or zoo:NAME")
        folder = zoo.locate(folder)
        if not (folder / "config.yaml").is_file():
            more = "it is a file" if folder.is_file() else "it has no config.yaml"
            raise FileNotFoundError(f"{folder} is not a run folder: {more}")
        run = cls(folder, read_recipe(folder / "config.yaml"))
        if data_root is not None:
            files.require_path("data_root", data_root)
            run.config.data.root = Path(data_root)
        return run

    @property
    def address(self) -> str:
        """Name by which `open` finds this run: "zoo:NAME" or the folder."""
        name = zoo.name_of(self.folder)
        return str(self.folder) if name is None else f"{zoo.PREFIX}{name}"

    @property
    def products(self) -> Path:
        """Folder of what is made from the run by default: its own, or runs/zoo/NAME for an entry of the zoo.

        That one's own folder is part of the package. It need not exist yet, and is none that a training would take.
        """
        name = zoo.name_of(self.folder)
        return self.folder if name is None else Path("runs") / "zoo" / name

    def note_resumption(self, info: RunInfo, extension: Extension | None = None) -> None:
        """Add to run.json that the training went on, by `info.command`; config.yaml takes what may have changed.

        A finished run that an `extension` is begun of is not finished any longer.
        """
        save_config(self.config, self.folder / "config.yaml")
        started = (self.folder / "run.json").is_file()  # not if it was killed before its first step
        before = self.info() if started else info
        changed: dict[str, Any] = {"resumed": [*before.resumed, info.command]}
        if extension is not None:
            changed |= {"extended": [*before.extended, extension], "sha256": {}}
        self.write_info(before.model_copy(update=changed))

    def info(self) -> RunInfo:
        """Return what run.json holds; errors as in `read_info`."""
        return read_info(self.folder / "run.json")

    def write_info(self, info: RunInfo) -> None:
        """Replace run.json."""
        files.write_whole(self.folder / "run.json", (json.dumps(info.to_json(), indent=2) + "\n").encode())

    def log(self, line: EpochLog) -> None:
        """Append one line to metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        whole = path.read_bytes() if path.is_file() else b""
        files.write_whole(path, whole + (json.dumps(line.to_json()) + "\n").encode())

    def forget_after(self, num_epochs: int) -> None:
        """Take the lines of later epochs out of metrics.jsonl: they were logged after the last saved state."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            lines = path.read_bytes().splitlines(keepends=True)
            files.write_whole(path, b"".join(lines[:num_epochs]))

    @property
    def finished(self) -> bool:
        """Whether the training went to its end; one that was killed at its very beginning has no run.json yet."""
        return (self.folder / "run.json").is_file() and bool(self.info().sha256)

    def discard_if_empty(self) -> None:
        """Take back what `begin` did if nothing has come of it: a failure at once leaves no trace."""
        if not self._begun or any((self.folder / name).exists() for name in ("metrics.jsonl", "state.safetensors")):
            return
        if self._is_own:
            shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("config.yaml", "run.json"):
            (self.folder / name).unlink(missing_ok=True)

    @property
    def has_log(self) -> bool:
        """Whether an epoch was logged."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return bool(file.read(1024).strip())

    def history(self) -> list[EpochLog]:
        """Return the lines of metrics.jsonl, oldest first, at least one.

        Raises:
            FileNotFoundError: the run has not finished an epoch.
            ValueError: a line is damaged.
        """
        path = self.folder / "metrics.jsonl"
        if not self.has_log:
            raise FileNotFoundError(f"{path}: no such log; the run has not finished its first epoch")
        files.require_size(path, MAX_LOG)
        lines = path.read_bytes().splitlines()
        places = [f"{path}, line {number}" for number in range(1, len(lines) + 1)]
        return [EpochLog.parse(_parse(line, place), place) for line, place in zip(lines, places, strict=True)]

    def logged(self, weights: Weights, metric: str) -> EpochLog:
        """Return the line that has the metrics of these weights; its `evaluation` is that of the average for "ema".

        Args:
            weights: "last" or "ema": the last evaluated epoch; "best": that of the highest `metric`.
            metric: one that every evaluation of the task has.

        Raises:
            FileNotFoundError: the run has no such weights, or no log.
            ValueError: there are no weights of that name.
        """
        require_kind(weights)
        history = [line for line in self.history() if metric in line.metrics]
        if not history:
            raise FileNotFoundError(f"{self.folder}: its log has no {metric} yet; it ended before its first evaluation")
        if weights == "best":
            return max(history, key=lambda line: line.metrics[metric])
        if weights == "last":
            return history[-1]
        if history[-1].ema is None:
            raise FileNotFoundError(f"{self.folder}: no such weights as ema; it was trained without train.ema_decay")
        return history[-1].model_copy(update={"evaluation": history[-1].ema})

    def save(self, model: nn.Module, which: Weights) -> None:
        """Write the weights and buffers of `model`; the file is replaced in one step or not at all."""
        files.write_whole(self.folder / f"{which}.safetensors", tensors_to_bytes(model.state_dict()))

    def read(self, which: Weights = "last") -> dict[str, Tensor]:
        """Return saved weights by their names.

        Raises:
            FileNotFoundError: the run has no such weights.
            ValueError: no weights are called so, or the file is damaged, not the training's, or has infinite numbers.
        """
        require_kind(which)
        path = self.folder / f"{which}.safetensors"
        state, _ = read_tensors(path)
        check_weights(path)
        require_finite(state, str(path))
        return state

    def load(self, model: nn.Module, which: Weights = "last") -> None:
        """Load saved weights into `model`, strictly.

        Raises:
            FileNotFoundError: the run has no such weights.
            ValueError: as in `read`, or a key is missing, unknown or of another shape.
        """
        state = self.read(which)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            what = " ".join(str(error).split())
            raise ValueError(
                f"{self.folder / which}.safetensors does not fit the model of its config.yaml: "
                f"{what[:300]}{' ...' if len(what) > 300 else ''}"
            ) from None

    def checksums(self) -> dict[str, str]:
        """Return the SHA-256 of each weights file by its name."""
        paths = [self.folder / f"{which}.safetensors" for which in sorted(get_args(Weights))]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def require_kind(weights: str) -> None:
    """Raise ValueError for a name that is none of `Weights`."""
    if weights not in get_args(Weights):
        raise ValueError(f"weights: expected one of {', '.join(get_args(Weights))}, got {weights!r}")


def check_weights(path: Path) -> None:
    """Raise ValueError for weights beside a run.json that has another SHA-256 of them."""
    if not path.is_file() or not (path.parent / "run.json").is_file():
        return
    logged = read_info(path.parent / "run.json").sha256.get(path.name)
    if logged is not None and logged != hashlib.sha256(path.read_bytes()).hexdigest():
        raise ValueError(
            f"{path}: its SHA-256 is not the one in run.json ({logged[:16]}...): not the weights of this training; "
            "put those back, or take the entry out of run.json to use these"
        )


def read_info(path: Path) -> RunInfo:
    """Return what a run.json holds.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run folder has one from its beginning")
    files.require_size(path, MAX_INFO)
    return RunInfo.parse(_parse(path.read_bytes(), str(path)), str(path))


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{where}: damaged, no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: damaged, expected a JSON object, got {type(value).__name__}")
    return value


def describe_environment(command: Sequence[str]) -> RunInfo:
    """Return command, versions and machine, for a log that says where its numbers come from."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():  # platform.processor() is empty on most Linux systems
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return RunInfo(
        command=shlex.join(command) if len(command) > 1 else "".join(command),
        versions={"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
        machine=Machine(
            system=f"{platform.system()} {platform.machine()}",
            cpu=cpu,
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        ),
    )


def command_line() -> list[str]:
    """Return the command that started this process, as a user would type it."""
    program, *arguments = sys.argv
    ours = Path(program).name in ("hoyer-det", "__main__.py")  # the latter: python -m detection
    return ["hoyer-det", *arguments] if ours else ["python", program, *arguments]
