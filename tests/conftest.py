"""Fixtures shared by several test files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from helpers import kill_started

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


@pytest.fixture(autouse=True)
def new_process():
    """Each test starts alone: no process of the last one runs on, no precision of accelerate's stays set."""
    yield
    kill_started()
    AcceleratorState._reset_state(reset_partial_state=True)
