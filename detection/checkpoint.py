"""A run on disk: one folder with the recipe, the log, the weights and the pictures of one training."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detection.config import Recipe, read_recipe, save_config

Weights = Literal["best", "last", "ema"]
PACKAGES = ("torch", "torchvision", "numpy", "albumentations", "pycocotools", "accelerate", "safetensors")


class Run:
    """The folder of one training.

    Files: config.yaml (the whole recipe), run.json (command, versions, machine; weights' checksums at the end),
    metrics.jsonl (a line per epoch), best.safetensors, last.safetensors and, where there is one, the
    average ema.safetensors, curves.png, dynamics.png (with spike layers), predictions.png (a detector's).

    Attributes:
        folder: where all that lies.
        config: the recipe, class names filled in.
    """

    def __init__(self, folder: Path, config: Recipe) -> None:
        self.folder, self.config = folder, config

    @staticmethod
    def check_free(folder: str | Path) -> Path:
        """`folder` as a path that a new run may take.

        Raises:
            FileExistsError: there is something already.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists already; name another folder, or remove it first")
        return folder

    @classmethod
    def create(cls, folder: str | Path, config: Recipe, command: list[str]) -> Run:
        """A new run folder with config.yaml and run.json in it.

        Raises:
            FileExistsError: there is something already.
        """
        run = cls(cls.check_free(folder), config)
        run.folder.mkdir(parents=True, exist_ok=True)
        save_config(config, run.folder / "config.yaml")
        run.write_info({"command": " ".join(command), **describe_environment()})
        return run

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """An existing run.

        Raises:
            FileNotFoundError: `folder` is no run folder.
            ValueError: its config.yaml does not fit this version.
        """
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no config.yaml")
        return cls(folder, read_recipe(folder / "config.yaml"))

    def info(self) -> dict[str, Any]:
        """What run.json holds."""
        return json.loads((self.folder / "run.json").read_text(encoding="utf-8"))

    def write_info(self, info: Mapping[str, Any]) -> None:
        """Replaces run.json."""
        write_whole(self.folder / "run.json", (json.dumps(info, indent=2) + "\n").encode())

    def log(self, line: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def discard_if_empty(self) -> None:
        """Removes the folder again if no epoch was logged: a run that failed at once leaves nothing behind."""
        if not (self.folder / "metrics.jsonl").exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, oldest first.

        Raises:
            FileNotFoundError: the run has not finished an epoch.
        """
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such log; the run has not finished its first epoch")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def save(self, model: nn.Module, which: Weights) -> None:
        """Writes the weights and buffers of `model`; the file is replaced in one step or not at all."""
        path = self.folder / f"{which}.safetensors"
        part = path.with_suffix(".part")
        save_file({key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}, part)
        os.replace(part, path)

    def load(self, model: nn.Module, which: Weights = "last") -> None:
        """Loads saved weights into `model`, strictly.

        Raises:
            FileNotFoundError: the run has no such weights.
            ValueError: the file is damaged, or a key is missing, unknown or of another shape.
        """
        path = self.folder / f"{which}.safetensors"
        state = read_weights(path)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{path} does not fit the model of its config.yaml: {' '.join(str(error).split())}"
            ) from None

    def checksums(self) -> dict[str, str]:
        """SHA-256 of each weights file by its name."""
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.glob("*.safetensors"))
        }


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged weights file ({error})") from None


def describe_environment() -> dict[str, Any]:
    """Versions and machine, for a log that says where its numbers come from."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():  # platform.processor() is empty on most Linux systems
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": cpu,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def command_line() -> list[str]:
    """The command that started this process, as a user would type it."""
    return ["python", *sys.argv]


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file in one step or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_bytes(content)
    os.replace(part, path)
