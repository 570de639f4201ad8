"""One process at a time writes into a run: a second one says who does, and destroys nothing."""

import errno
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import start, tool, wait_until
from test_resume import CLASSIFICATION, copy_of, expect_equal, refusal, stop_in_its_second_epoch, write_recipe

from detection.cli import main
from detection.config import load_config
from detection.files import LOCK, atomic_writer, fcntl, is_empty, lock_folder, remove_parts, unlock_folder
from detection.runs import Run, describe_environment


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped in its second epoch, and beside it the same one that was not."""
    folder = tmp_path_factory.mktemp("stopped")
    run = stop_in_its_second_epoch(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sys.argv", ["hoyer-det"])
        main(["train", str(folder / "recipe.yaml"), "--out", str(folder / "whole")])
    return run


def hold(folder: Path) -> None:
    """Take the lock, and leave a child process behind that never ends by itself."""
    lock_folder(folder)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
    child.start()
    (folder / "child").write_text(str(child.pid))
    child.join()


def holder(folder: Path) -> int:
    """The process that a lock names, 0 before it does."""
    with suppress(OSError, ValueError):
        return json.loads((folder / LOCK).read_text())["process"]
    return 0


def ended(process: int) -> bool:
    """Whether there is no such process, or only what is left of it until its parent asks for its status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_for(condition, log: Path, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.01)


# The lock


def test_a_lock_names_its_process_and_dies_with_it(attempt, tmp_path):
    log, folder = tmp_path / "log.txt", tmp_path / "run"
    folder.mkdir()
    process = start(hold, folder, log=log)
    wait_until((folder / "child").exists, [process], log)
    with attempt("two processes"):
        with pytest.raises(BlockingIOError, match="another process is writing into it") as refused:
            lock_folder(folder)
        assert f"process {process.pid} on {socket.gethostname()}, since 20" in str(refused.value)
        assert f"{folder}: " in str(refused.value) and "name another folder" in str(refused.value)
    child = int((folder / "child").read_text())
    with attempt("two processes"):
        process.kill()
        process.join()
        assert not ended(child)  # it has not the lock, though it began as a copy of the one who had
        assert lock_folder(folder)
        os.kill(child, signal.SIGKILL)
    assert holder(folder) == os.getpid()
    with pytest.raises(BlockingIOError, match="this process is writing into it already"):
        lock_folder(folder)
    unlock_folder(folder)
    assert not (folder / LOCK).exists()


def test_a_link_to_a_folder_has_the_lock_of_the_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    lock_folder(tmp_path / "run")
    with pytest.raises(BlockingIOError, match="link: this process"):
        lock_folder(tmp_path / "link")
    unlock_folder(tmp_path / "link")
    assert is_empty(tmp_path / "run")


def take_turns(folder: Path) -> None:
    """Count to 200 in a file, each time with the lock."""
    for _ in range(200):
        while True:
            with suppress(BlockingIOError):
                lock_folder(folder)
                break
            time.sleep(0)
        number = int((folder / "count").read_text())
        time.sleep(0)
        (folder / "count").write_text(str(number + 1))
        unlock_folder(folder)


def test_two_processes_never_have_the_lock_at_once(attempt, tmp_path):
    (tmp_path / "count").write_text("0")
    with attempt("two processes", 600):
        together = [start(take_turns, tmp_path, log=tmp_path / "log.txt") for _ in range(3)]
        for process in together:
            process.join(60)
        assert [process.exitcode for process in together] == [0] * 3, (tmp_path / "log.txt").read_text()
        assert (tmp_path / "count").read_text() == "600"


def test_a_file_system_without_locks_is_told(stopped, monkeypatch, capsys, tmp_path):
    def none(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    run = Run.open(copy_of(stopped, tmp_path))
    monkeypatch.setattr(fcntl, "lockf", none)
    run.lock()
    assert capsys.readouterr().err == (
        f"warning: {run.folder}: no locks on this file system; let no other training write there\n"
    )
    run.unlock()


# New files


def test_two_writers_of_one_file_leave_one_of_the_two_whole(attempt, tmp_path):
    path, contents = tmp_path / "file", [bytes([number]) * 100_000 for number in range(4)]
    together = threading.Barrier(4)

    def write(content: bytes) -> None:
        for _ in range(20):
            with atomic_writer(path) as file:
                file.write(content[:50_000])
                together.wait()
                assert len(list(tmp_path.glob(".file.*.part"))) == 4
                together.wait()
                file.write(content[50_000:])

    with attempt("two processes", 20):
        threads = [threading.Thread(target=write, args=(content,)) for content in contents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert path.read_bytes() in contents and [each.name for each in tmp_path.iterdir()] == ["file"]


def test_only_what_a_killed_writer_left_is_removed(tmp_path):
    for name in (".state.safetensors.0123.part", "mine.part", ".hidden", "film.mp4.part"):
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.part", ".hidden", "film.mp4.part"}


# A folder of another


def new_run(folder: Path, tmp_path: Path) -> Run:
    return Run(folder, load_config(write_recipe(tmp_path, CLASSIFICATION), []))


@pytest.mark.parametrize("there", ["a folder just made", "a run just begun", "a run that was killed", "a file"])
def test_who_comes_second_takes_nothing_away(attempt, monkeypatch, tmp_path, there):
    """The second one has seen a free folder; then the first one came."""
    folder, info = tmp_path / "run", describe_environment(["here"])
    second = new_run(folder, tmp_path)
    make = Path.mkdir

    def come_first(path: Path, **options) -> None:
        make(path, **options)
        if there == "a file":
            (path / "mine.txt").write_text("mine")
        elif there != "a folder just made":
            monkeypatch.setattr(Path, "mkdir", make)
            path.rmdir()
            first.begin(info)
        else:
            lock_folder(path)
        if there == "a run that was killed":
            unlock_folder(path)

    first = new_run(folder, tmp_path)
    with attempt("two processes"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", come_first)
            with pytest.raises((BlockingIOError, FileExistsError)) as refused:
                second.begin(info)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        second.discard_if_empty()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        names = {"a file": {"mine.txt"}, "a folder just made": {LOCK}}.get(there, {"config.yaml", "run.json", LOCK})
        assert before.keys() == names - ({LOCK} if there == "a run that was killed" else set())
        blocked = there in ("a folder just made", "a run just begun")
        assert isinstance(refused.value, BlockingIOError if blocked else FileExistsError)
    first.unlock()


def test_a_folder_that_was_there_stays(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    run = new_run(folder, tmp_path)
    run.begin(describe_environment(["here"]))
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "run.json", LOCK}
    run.discard_if_empty()
    run.unlock()
    assert folder.is_dir() and not list(folder.iterdir())


# Trainings


def test_two_trainings_that_start_at_once_leave_one_whole_run(attempt, stopped, tmp_path):
    recipe, log, run = stopped.parent / "recipe.yaml", tmp_path / "log.txt", tmp_path / "run"
    with attempt("two processes"):
        together = [start(tool, "train_cls", recipe, "--out", run, log=log) for _ in range(2)]
        for process in together:
            process.join(100)
        assert sorted(process.exitcode for process in together) == [0, 2], log.read_text()
        (sentence,) = [line for line in log.read_text().splitlines() if "error: " in line]
        winner = together[[process.exitcode for process in together].index(0)]
        assert (
            f"another process is writing into it (process {winner.pid} on " in sentence or "exists already" in sentence
        )
        expect_equal(run, stopped.parent / "whole")


def test_a_run_that_is_being_trained_is_neither_resumed_nor_begun(attempt, stopped, monkeypatch, capsys, tmp_path):
    run, log = copy_of(stopped, tmp_path), tmp_path / "log.txt"
    process = start(tool, "train_cls", "--resume", run, log=log)
    wait_until(lambda: holder(run) == process.pid, [process], log)
    os.kill(process.pid, signal.SIGSTOP)  # in the middle of it
    for arguments in (["--resume", run], [str(stopped.parent / "recipe.yaml"), "--out", run]):
        with attempt("two processes"):
            sentence = refusal(monkeypatch, capsys, "train_cls", *arguments)
            assert f"{run}: another process is writing into it (process {process.pid} on " in sentence
            assert f"--resume {run}); wait for it, stop it, or name another folder" in sentence
    os.kill(process.pid, signal.SIGCONT)
    process.join(100)
    assert process.exitcode == 0, log.read_text()
    expect_equal(run, stopped.parent / "whole")
    assert not (run / LOCK).exists()


def test_a_comparison_whose_process_is_killed_stops_its_training(attempt, stopped, monkeypatch, capfd, tmp_path):
    recipe, out, log = str(stopped.parent / "recipe.yaml"), tmp_path / "runs", tmp_path / "log.txt"
    arguments = [recipe, "--out", str(out), "--variants", "hoyer", "--train.epochs", "500"]
    run = out / "hoyer_seed0"
    process = start(tool, "ablate", *arguments, log=log)
    wait_until((run / "state.safetensors").exists, [process], log)
    orphan = holder(run)
    assert orphan not in (0, process.pid)
    os.kill(orphan, signal.SIGSTOP)
    process.kill()
    process.join()
    with attempt("two processes"):  # the same again, while the orphan is still there
        monkeypatch.setattr("sys.argv", ["hoyer-det", "compare"])
        with pytest.raises(SystemExit) as stop:
            main(["compare", *arguments])
        assert stop.value.code == 2
        error = capfd.readouterr().err
        assert f"{run}: another process is writing into it (process {orphan} on " in error
        assert f"{run}: this run failed, see above" in error
    with attempt("kills"):
        os.kill(orphan, signal.SIGCONT)
        wait_for(lambda: ended(orphan), log)
        (sentence,) = [line for line in log.read_text().splitlines() if line.startswith("stopped ")]
        assert f"state saved; go on with: hoyer-det train --resume {run}" in sentence
    assert not (run / LOCK).exists() and not Run.open(run).finished
