"""The files that a path, a folder or a glob stands for."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from detection.files import is_recording, kind_of, walk_once


def files_of(source: str, failures: list[str]) -> list[str]:
    """Return the images and recordings in a folder, the files that a glob matches, or the file itself.

    `failures` gets a sentence for a source that gives none.
    """
    kind = kind_of(source)
    if kind == "a folder":
        from detection.data.image_files import EXTENSIONS, is_image  # with torch beside it

        try:
            found = sorted(str(path) for path in Path(source).iterdir() if is_image(path) or is_recording(path))
        except OSError as error:
            failures.append(f"{source}: this folder cannot be read ({error.strerror})")
            return []
        if not found:
            failures.append(f"{source}: no images in this folder (allowed: {' '.join(EXTENSIONS)})")
        return found
    if kind == "no such file" and glob.has_magic(source):
        found = sorted(file for file in expand(source, failures) if not os.path.isdir(file))
        if not found:
            failures.append(f"{source}: no file matches")
        return found
    if not kind.startswith("a "):
        failures.append(f"{source}: {'no such file or folder' if kind == 'no such file' else kind}")
        return []
    return [source]


def expand(pattern: str, failures: list[str]) -> Iterator[str]:
    """Yield the files that a glob matches; "**" goes through links, too, but into each folder once.

    `failures` gets a sentence for each folder below "**" that cannot be read.
    """

    def note(error: OSError) -> None:
        failures.append(f"{error.filename}: this folder cannot be read ({error.strerror})")

    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    place = parts.index("**")
    rest = parts[place + 1 :] or ["*"]
    tops = glob.glob(os.sep.join([*parts[:place], ""])) if place else [""]
    for top in tops:
        for folder, _ in walk_once(top or ".", note):
            within = folder if top else folder.removeprefix(".").removeprefix(os.sep)
            yield from expand(os.path.join(glob.escape(within), *rest), failures)
