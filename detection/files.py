"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file in one step or not at all: what was there stays until the new content is on the disk.

    Raises:
        OSError: it cannot be written; the message says that nothing was lost.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"{path}: not written ({error.strerror}); what was there before is still there") from error
    with contextlib.suppress(OSError):  # some file systems know no flushing of folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)


def require_writable(folder: Path) -> None:
    """Nothing; raises OSError if files cannot be written into `folder`, which need not exist yet.

    For what takes long before it writes: better said beforehand.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable.part"
        probe.touch()
        probe.unlink()
        if new:
            folder.rmdir()
    except OSError as error:
        raise OSError(f"{folder}: no files can be written there ({error.strerror}); name another folder") from None
