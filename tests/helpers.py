"""What several test files call."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import detection.tasks.run
from detection.config.schema import Data
from detection.data import DetectionDataset, read_split
from detection.runs import Run
from detection.tasks.run import leave_pictures

ROOT = Path(__file__).parents[1]


def run_tool(monkeypatch, name: str, *arguments) -> None:
    """Run tools/NAME.py, or FOLDER/NAME.py, in this process, as the command line would."""
    monkeypatch.setattr(sys, "argv", sys.argv)  # put back afterwards
    tool(name, *arguments)


def draw_curves(monkeypatch) -> None:
    """Let trainings draw the curves of their log, which conftest.py keeps them from."""
    monkeypatch.setattr("detection.tasks.run.leave_pictures", leave_pictures)


def build_datasets(data: Data) -> tuple[DetectionDataset, DetectionDataset]:
    """Training data, augmented but for what mixes images, and validation data, as stored."""
    from detection.data.transforms import build_transform

    train = read_split(data, "train")
    val = read_split(data, "val", train.annotations.categories)
    return DetectionDataset(train.annotations, build_transform(data.augment)), val


def log_lines(folder: Path) -> list[dict]:
    """The lines of a run's log as its file has them."""
    return [line.to_json() for line in Run.open(folder).history()]


# Processes that start in a moment: forked from a server that has imported everything already.

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["detection.tasks.run", "pycocotools.cocoeval"])
# Of this test; none outlives it, see conftest.py.
STARTED: list[multiprocessing.Process] = []
RESERVED: list[socket.socket] = []


def start(function: Callable[..., None], *arguments, log: Path, **environment: str) -> multiprocessing.Process:
    """A process that runs `function`, its output in `log`, with these variables set beforehand."""
    process = SERVER.Process(target=_run, args=(function, arguments, log, environment))
    process.start()
    STARTED.append(process)
    return process


def kill_started() -> None:
    """A test that failed leaves no process behind, for which this one would wait at its end, and no port."""
    while RESERVED:
        RESERVED.pop().close()
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.join()


def wait_until(condition: Callable[[], bool], processes: Sequence[multiprocessing.Process], log: Path) -> None:
    """Until it holds; fails with their output where one of the processes ends before that, or none of it comes."""
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline and all(process.is_alive() for process in processes), log.read_text()
        time.sleep(0.01)


def start_together(number: int, function: Callable[..., None], *arguments, log: Path) -> list[multiprocessing.Process]:
    """As many processes as one training on the CPU, as torchrun would start them."""
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    return [
        start(function, *arguments, log=log, **common, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number))
        for rank in range(number)
    ]


def free_port() -> int:
    """A port of this machine that stays free until the test ends."""
    reserved = socket.socket()  # bound until then, so that nobody else is given the port
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as that which will listen there does
    reserved.bind(("localhost", 0))
    RESERVED.append(reserved)
    return reserved.getsockname()[1]


def run_together(number: int, function: Callable[..., None], *arguments, log: Path) -> None:
    """Runs them to their end, which must be a good one."""
    processes = start_together(number, function, *arguments, log=log)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * number, log.read_text()


def tool(name: str, *arguments) -> None:
    """Run tools/NAME.py, or FOLDER/NAME.py, as the command line would: for the functions above."""
    script = f"{name}.py" if "/" in name else f"tools/{name}.py"
    sys.argv = [script, *map(str, arguments)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def _run(function: Callable[..., None], arguments: tuple, log: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # as at the command line, for the loader's processes
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(90)  # where it hangs, for the log
    torch.set_num_threads(1)
    detection.tasks.run.leave_pictures = lambda run: None  # as in conftest.py
    function(*arguments)
