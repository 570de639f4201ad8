"""Files that are there whole or not at all, and the lock of a folder that one process at a time writes into."""

from __future__ import annotations

import codecs
import contextlib
import csv
import fcntl
import io
import json
import os
import socket
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

EVENT_SUFFIXES = (".dat", ".bin", ".aedat")  # of recordings of events
NETWORK_SUFFIXES = (".onnx", ".pt2", ".events", ".nir")  # of exported networks

PART = ".part"  # ends the name of a file that is being written
PROBE = ".writable."  # begins the name of a file that is there for a moment, on file systems where it needs one
LOCK = ".lock"
_HELD: dict[Path, int] = {}  # locks of this process: to open and close such a file again would drop its lock


def write_whole(path: Path, content: bytes) -> None:
    """Replace the file in one step or not at all: what was there stays until the new content is on the disk.

    Raises:
        OSError: it cannot be written; the message says that nothing was lost.
    """
    with atomic_writer(path) as file:
        file.write(content)


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a table in one step or not at all; bytes of names that are no UTF-8 become escapes."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_whole(path, text.getvalue().encode(errors="backslashreplace"))


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
    # A name of its own: two processes may write the same file, of which the last one stays, whole.
    part = path.with_name(f".{path.name[:20]}.{uuid.uuid4().hex}{PART}")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
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


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8 or UTF-16, with or without a byte order mark, or else in Latin-1.

    Raises:
        ValueError: it ends within a character of UTF-16.
    """
    content, wide = path.read_bytes(), (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        return content.decode("utf-16" if content.startswith(wide) else "utf-8-sig")
    except UnicodeDecodeError as error:
        if content.startswith(wide):
            raise ValueError(f"{path}: not a text file: {error}") from None
        return content.decode("latin-1")


def require_size(path: Path, limit: int) -> None:
    """Raise ValueError for a file of more bytes than what should be in it could have."""
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path}: {size:,} bytes, larger than {limit:,}: not read")


KINDS = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def walk_once(folder: str | Path, onerror: Callable[[OSError], object]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder from `folder` down and its files' names, through links too; a folder linked twice comes once.

    Hidden folders are left out. `onerror` is called for one that cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, onerror=onerror, followlinks=True):
        status = os.stat(place)
        known = (status.st_dev, status.st_ino) in seen
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [] if known else sorted(name for name in folders if not name.startswith("."))
        if not known:
            yield place, names


def is_recording(path: object) -> bool:
    """Return whether it is the path of a recording of events, by its name."""
    return isinstance(path, str | Path) and Path(path).suffix.lower() in EVENT_SUFFIXES


def require_path(name: str, value: object, expected: str = "a path") -> None:
    """Raise ValueError unless a value may be a path."""
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def is_exported(path: str | Path) -> bool:
    """Return whether it is the path of an exported network, by its name, and no folder."""
    require_path("run", path, "a run folder, zoo:NAME or an exported file")
    return Path(path).suffix.lower() in NETWORK_SUFFIXES and not Path(path).is_dir()


def kind_of(path: str | Path) -> str:
    """Return "a file", "a folder", "a FIFO", "a socket" or "a device", or why there is none of them.

    Reading of the last three might never end.
    """
    try:
        return KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "a device")
    except FileNotFoundError:
        return "a link to nothing" if os.path.islink(path) else "no such file"
    except (OSError, ValueError) as error:  # ValueError: of a name with a null character
        return getattr(error, "strerror", None) or str(error)


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
    """Return whether nothing is in a folder, but for what processes have there for a moment, or left when killed."""
    return all(
        path.name.startswith((PROBE, LOCK)) or (path.name.startswith(".") and path.suffix == PART)
        for path in folder.iterdir()
    )


def lock_folder(folder: Path) -> bool:
    """Take the right to write into a folder, until `unlock_folder` or the end of the process, however that ends.

    Child processes do not have it. False where the file system has no locks: then nobody has the right alone.

    Raises:
        BlockingIOError: another training has it; says which.
        OSError: the folder cannot be written.
    """
    path = folder.resolve() / LOCK
    if path in _HELD:
        raise BlockingIOError(f"{folder}: this process is writing into it already")
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            sentence = _describe_holder(os.read(file, 4096))
            os.close(file)
            raise BlockingIOError(f"{folder}: {sentence}") from None
        except OSError:
            os.close(file)
            return False
        with contextlib.suppress(FileNotFoundError):  # the one who had it may just have removed the file
            if os.path.samestat(os.fstat(file), path.stat()):
                _HELD[path] = file
                about = {
                    "process": os.getpid(),
                    "host": socket.gethostname(),
                    "command": sys.argv,
                    "since": time.time(),
                }
                os.ftruncate(file, 0)
                os.write(file, json.dumps(about).encode())
                return True
        os.close(file)


def require_no_writer(folder: Path) -> None:
    """Raise BlockingIOError, which says who, if another process has the right to write into a folder."""
    path = folder.resolve() / LOCK
    if path in _HELD or not path.is_file():
        return
    with path.open("rb+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise BlockingIOError(f"{folder}: {_describe_holder(file.read(4096))}") from None
        except OSError:  # a file system without locks
            return


def unlock_folder(folder: Path) -> None:
    """Give the right back, if this process has it."""
    path = folder.resolve() / LOCK
    file = _HELD.pop(path, None)
    if file is not None:
        path.unlink(missing_ok=True)
        os.close(file)


def _describe_holder(content: bytes) -> str:
    """Who has a lock, by what they wrote into it."""
    try:
        about: dict[str, Any] = json.loads(content)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(about["since"]))
        command = " ".join(map(str, about["command"]))[:200]
        who = f"process {about['process']} on {about['host']}, since {since}: {command}"
    except (ValueError, KeyError, TypeError, OverflowError):
        who = "another process"
    return f"another process is writing into it ({who}); wait for it, stop it, or name another folder"
