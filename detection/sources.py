"""The images, films, recordings and cameras that a command line names: by paths, folders and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from detection.files import is_recording, kind_of, walk_once

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")


def find_sources(sources: Sequence[str], failures: list[str]) -> tuple[list[str], list[str]]:
    """Return image files and recordings of events, and films and cameras, in the order given.

    `failures` gets a sentence for each source that gives none, and for each file that is none, such as a FIFO.
    """
    images: dict[str, str] = {}  # by their places: a file that two sources name, ./a.png and a.png, is one
    films: dict[str, str] = {}
    for source in sources:
        if is_camera(source):
            films.setdefault(source, source)
            continue
        for file in files_of(source, failures):
            kind = kind_of(file)
            if kind != "a file":  # to open others might wait for ever
                failures.append(f"{file}: {kind}, not opened")
            elif Path(file).suffix.lower() in VIDEO_EXTENSIONS:
                films.setdefault(os.path.abspath(file), file)
            else:
                images.setdefault(os.path.abspath(file), file)
    return [*images.values()], [*films.values()]


def is_camera(source: str) -> bool:
    """Return whether a source is the number of a camera."""
    return source.isdecimal() and not os.path.exists(source)


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
