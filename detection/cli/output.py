"""Files of predictions, which grow with the results, are whole whenever the work ends, and can be continued."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sized
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from detection.files import PART, lock_folder, unlock_folder

if TYPE_CHECKING:
    from detection.tasks.predictions import AnyPrediction

FILES = ("predictions.json", "images.json")
JOURNAL = ".unfinished.jsonl"  # in a folder that can be continued; a line per source that is done
RESERVE = ".reserve"  # kept free, so that files can be ended on a full disk
RESERVED = 2**18  # bytes
MOST_BYTES = 255  # of a file's name


class Output:
    """The JSON files of one call, of which nothing is kept in memory, and the names of the others.

    Results are written as they come, into hidden files, which `close` turns into predictions.json and images.json. In
    the journal stand the sources that are done, and how long the files were then: a call that goes on cuts off what is
    behind that. The folder is made, and locked, when there is something to write.

    Args:
        folder: where they go; one with a journal is continued.
        call: what must be equal for that, by the words for it, and "arguments".
        head: images.json but the images.

    Attributes:
        done: sources that earlier calls are done with.
        num_images: in images.json.
        num_found: detections; None where predictions are no lists of them.

    Raises:
        ValueError: the folder is of another call, or damaged.
    """

    def __init__(self, folder: Path, call: Mapping[str, Any], head: Mapping[str, Any]) -> None:
        self.folder, self.call = folder, call
        text = json.dumps({"info": head["info"], "images": [], **head}, indent=1)
        begin, end = text.split('"images": []')
        self._begins = b"[", f'{begin}"images": ['.encode()
        self._ends = b"]", f"\n ]{end}\n".encode()
        self.done: set[str] = set()
        self.num_images, self.num_found = 0, None
        self._taken: set[str] = set()
        self._files: list[BinaryIO] = []  # without buffers: what is written is written; the journal is the last
        self._sizes: list[int] = []
        if (folder / JOURNAL).is_file():
            lock_folder(folder)
            try:
                self._resume()
            except BaseException:
                unlock_folder(folder)
                raise

    def _resume(self) -> None:
        path = self.folder / JOURNAL
        whole, _, _ = path.read_bytes().rpartition(b"\n")  # the last line may be cut off
        damaged = ValueError(f"{path}: damaged; remove {self.folder}, or name another folder")
        try:
            call, *lines = map(json.loads, whole.splitlines() or [b"{}"])
            different = [key for key in self.call if key != "arguments" and call.get(key) != self.call[key]]
            for line in lines:
                self.done.add(line["source"])
                self._taken.update(line["names"])
                self.num_images, sizes = int(line["images"]), [*map(int, line["sizes"])]
                self.num_found = None if line["found"] is None else int(line["found"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise damaged from None
        if not lines:  # it ended before anything was done
            for name in FILES:
                (self.folder / name).unlink(missing_ok=True)
            unlock_folder(self.folder)
            return
        if different:
            key = different[0]
            raise ValueError(
                f"{self.folder}: begun with {key} {call.get(key)}, not {self.call[key]}; name another folder"
            )
        if len(sizes) != len(FILES) or min(sizes) < 0:
            raise damaged
        for name in FILES:
            if (self.folder / name).is_file():  # ended in good order
                os.replace(self.folder / name, self._part(name))
            if not self._part(name).is_file() or self._part(name).stat().st_size < sizes[FILES.index(name)]:
                raise ValueError(f"{self._part(name)}: damaged; remove {self.folder}, or name another folder")
        self._open([*sizes, len(whole) + 1])

    def _part(self, name: str) -> Path:
        return self.folder / f".{name}{PART}"

    def _open(self, sizes: list[int] | None = None) -> None:
        """Open the files, cut off at these sizes; None: new ones."""
        if sizes is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock_folder(self.folder)
            if (self.folder / FILES[0]).exists():
                unlock_folder(self.folder)
                raise FileExistsError(f"{self.folder}: another call has just written into it; name another folder")
        paths = [*map(self._part, FILES), self.folder / JOURNAL]
        self._sizes = [0, 0, 0] if sizes is None else sizes
        self._files = [path.open("w+b" if sizes is None else "r+b", buffering=0) for path in paths]
        (self.folder / RESERVE).write_bytes(bytes(RESERVED))
        self._cut()
        if sizes is None:
            self._append(*self._begins, json.dumps(self.call).encode() + b"\n")

    def _cut(self) -> None:
        for file, size in zip(self._files, self._sizes, strict=True):
            file.truncate(size)
            file.seek(size)

    def _append(self, *contents: bytes) -> None:
        """Write behind the files, all or nothing."""
        for file, content in zip(self._files, contents, strict=False):
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
        # In one step, since a signal may break this off between any two.
        self._sizes = [size + len(content) for size, content in zip_longest(self._sizes, contents, fillvalue=b"")]

    def add(self, prediction: AnyPrediction, source: str, **more: Any) -> None:
        """Take in a prediction under the next image id."""
        if not self._files:
            self._open()
        width, height = prediction.size
        entry = {"id": self.num_images + 1, "file_name": source, "width": width, "height": height} | more
        rows = [json.dumps(row) for row in prediction.to_results(entry["id"])]
        first = self._sizes[0] == len(self._begins[0])
        results = "".join(row if first and not index else f", {row}" for index, row in enumerate(rows))
        text = ("," if self.num_images else "") + "\n  " + json.dumps(entry, indent=1).replace("\n", "\n  ")
        self._append(results.encode(), text.encode())
        self.num_images += 1
        if isinstance(prediction, Sized):
            self.num_found = (self.num_found or 0) + len(prediction)

    def finish(self, source: str, names: list[str]) -> None:
        """Note that a source is done, and what files were drawn of it."""
        if self._files:
            line = {"source": source, "names": [name.lower() for name in names], "sizes": self._sizes[:2]}
            line |= {"images": self.num_images, "found": self.num_found}
            self._append(b"", b"", json.dumps(line).encode() + b"\n")

    def free_name(self, stem: str, suffix: str) -> Path:
        """Return a path that no other file of this call has: images of one name may come from many folders."""
        number = 1
        while True:
            end = ("" if number == 1 else f"_{number}") + suffix
            while len(os.fsencode(stem + end)) > MOST_BYTES:
                stem = stem[:-1]
            if (stem + end).lower() not in self._taken:
                break
            number += 1
        self._taken.add((stem + end).lower())
        if not self._files:
            self._open()
        return self.folder / (stem + end)

    def close(self, *, complete: bool) -> None:
        """Make the JSON files whole; unless the call is complete, it can be continued. Of no images, leave nothing."""
        if not self._files:
            return
        (self.folder / RESERVE).unlink(missing_ok=True)
        if self.num_images:
            self._cut()
            self._append(*self._ends)
        for file in self._files:
            file.close()
        for name in FILES:
            if self.num_images:
                os.replace(self._part(name), self.folder / name)
            else:
                self._part(name).unlink()
        if complete or not self.num_images:
            (self.folder / JOURNAL).unlink()
        unlock_folder(self.folder)
        if not self.num_images:
            with suppress(OSError):  # of what is in it otherwise
                self.folder.rmdir()


def arguments_of(folder: Path) -> list[str]:
    """Return the command line of the call that was stopped in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its journal is damaged.
    """
    path = folder / JOURNAL
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no call was stopped there; it has no {JOURNAL}")
    try:
        return list(map(str, json.loads(path.read_bytes().partition(b"\n")[0])["arguments"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path}: damaged; remove {folder}, and predict again") from None
