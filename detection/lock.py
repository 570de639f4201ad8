"""One writer per run: a lock that ends with its process, and says who has it."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, nothing is locked
    fcntl = None

FILE = ".lock"
_HELD: dict[str, int] = {}  # of this process: to open and close such a file again would drop its lock


class RunLock:
    """The right to write into a run folder, held from `acquire` to `release` or the end of the process.

    The system itself ends it with the process, however that ends; child processes do not have it.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder).resolve() / FILE

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            BlockingIOError: another training has it; says which.
            OSError: the folder cannot be written.
        """
        if fcntl is None:
            return
        key = str(self.path)
        while True:
            if key in _HELD:
                raise BlockingIOError(f"{self.path.parent}: this process is training into it already")
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.read(file, 4096)
                os.close(file)
                raise BlockingIOError(f"{self.path.parent}: {_describe(holder)}") from None
            # The one who had it may just have removed the file.
            if self.path.exists() and os.fstat(file).st_ino == self.path.stat().st_ino:
                break
            os.close(file)
        _HELD[key] = file
        about = {"process": os.getpid(), "host": socket.gethostname(), "command": sys.argv, "since": time.time()}
        os.ftruncate(file, 0)
        os.write(file, json.dumps(about).encode())

    def release(self) -> None:
        """Give the lock back, if this process has it."""
        file = _HELD.pop(str(self.path), None)
        if file is not None:
            self.path.unlink(missing_ok=True)
            os.close(file)


def _describe(holder: bytes) -> str:
    """Who has a lock, by what they wrote into it."""
    try:
        about: dict[str, Any] = json.loads(holder)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(about["since"]))
        command = " ".join(map(str, about["command"]))[:200]
        who = f"process {about['process']} on {about['host']}, since {since}: {command}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return f"a training is writing into it ({who}); wait for it, stop it, or name another folder"
