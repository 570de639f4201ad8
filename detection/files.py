"""Files that are there whole or not at all."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from detection import lock

PART = ".part"  # ends the name of a file that is being written
PROBE = ".writable."  # begins the name of a file that is there for a moment, on file systems where it needs one


def write_whole(path: Path, content: bytes) -> None:
    """Replace the file in one step or not at all: what was there stays until the new content is on the disk.

    Raises:
        OSError: it cannot be written; the message says that nothing was lost.
    """
    with atomic_writer(path) as file:
        file.write(content)


def write_list(path: Path, rows: Iterable[Any]) -> None:
    """Write a JSON list row by row, so that it need not be in memory at once; in one step or not at all."""
    with atomic_writer(path) as file:
        file.write(b"[")
        for number, row in enumerate(rows):
            file.write(b",\n" * bool(number) + json.dumps(row).encode())
        file.write(b"]\n")


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the context closes without an error.

    Raises:
        OSError: it cannot be written; the message says that nothing was lost.
    """
    part = None
    try:
        # A name of its own: two processes may write the same file, of which the last one stays, whole.
        with tempfile.NamedTemporaryFile(
            "wb", dir=path.parent, prefix=f".{path.name}.", suffix=PART, delete=False
        ) as file:
            part = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        os.replace(part, path)
    except BaseException as error:
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink()
        if not isinstance(error, OSError):
            raise
        raise OSError(f"{path}: not written ({error.strerror}); what was there before is still there") from error
    with contextlib.suppress(OSError):  # some file systems know no flushing of folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)


def remove_parts(folder: Path) -> None:
    """Remove what killed processes were writing into a folder; for its only writer."""
    for path in folder.glob(f".*{PART}"):
        path.unlink(missing_ok=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8 or UTF-16, with or without a byte order mark, or else in Latin-1."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def require_writable(folder: Path) -> None:
    """Raise OSError if files cannot be written into `folder`, which need not exist yet.

    For what takes long before it writes: better said beforehand. Nothing is made in the folder that another process
    could see, since all processes of a training ask at once.
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing, prefix=PROBE):
            pass
    except OSError as error:
        raise OSError(f"{folder}: no files can be written there ({error.strerror}); name another folder") from None


def is_empty(folder: Path) -> bool:
    """Return whether nothing is in a folder, but for what `require_writable` and locks have there for a moment."""
    return all(path.name.startswith((PROBE, lock.FILE)) for path in folder.iterdir())
