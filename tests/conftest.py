"""Fixtures shared by several test files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from helpers import draw_curves, kill_started

LONGEST = {
    f"test_{name}"
    for name in ("boxes", "processes", "report", "resume", "sanitizers", "torchrun", "web", "wheel", "zoo")
}
ARCHIVES = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """real_data("bccd", "coco128") -> the folder they are unpacked in, once per session.

    Skips where there are none, and fails where REQUIRE_REAL_DATA says that there should be.
    """
    folder = tmp_path_factory.mktemp("real_data")

    def unpack(*names: str) -> Path:
        if not (ARCHIVES / "unpack.py").is_file():
            reason = f"no real data: {ARCHIVES} has no unpack.py"
            if os.environ.get("REQUIRE_REAL_DATA"):
                pytest.fail(reason)
            pytest.skip(reason)
        command = [sys.executable, str(ARCHIVES / "unpack.py"), *names, "--to", str(folder)]
        subprocess.run(command, check=True, capture_output=True)
        return folder

    return unpack


@pytest.fixture
def attempt(record_property) -> Callable[..., AbstractContextManager[None]]:
    """`with attempt("names"):` around each attempt to make the toolbox fail, of a kind of `docs/reliability.py`.

    The report of the tests (`--junitxml`) has how many were tried and how many held: those whose block raised nothing.
    """

    @contextmanager
    def count(kind: str, number: int = 1) -> Iterator[None]:
        record_property(f"tried {kind}", number)
        yield
        record_property(f"held {kind}", number)

    return count


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "pictures: trainings of the test draw the curves of their log, see `curves`")
    config.addinivalue_line("markers", "attempt(kind, number=1): the whole test is so many attempts, see `attempt`")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, so that of two processes none waits for the other at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Count a test that is marked as attempts, as the fixture `attempt` does a block."""
    mark = pyfuncitem.get_closest_marker("attempt")
    kind, number = (*mark.args, 1)[:2] if mark else ("", 0)
    if number:
        pyfuncitem.user_properties.append((f"tried {kind}", number))
    result = yield
    if number:
        pyfuncitem.user_properties.append((f"held {kind}", number))
    return result


@pytest.fixture(autouse=True)
def new_process():
    """Each test starts alone: no process of the last one runs on, no precision of accelerate's stays set."""
    yield
    kill_started()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def quick_writes() -> Iterator[None]:
    """No write waits for the disk: no test cuts the power."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_curves() -> Iterator[None]:
    """Trainings draw no curves, which take longer than a tiny training, unless somebody looks at them.

    Those of commands do, those of tests that are marked `pictures`, and those of `helpers.draw_curves`.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("detection.tasks.run.leave_pictures", lambda run: None)
        yield


@pytest.fixture(autouse=True)
def curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainings of a test that is marked `pictures` draw them."""
    if request.node.get_closest_marker("pictures") is not None:
        draw_curves(monkeypatch)
