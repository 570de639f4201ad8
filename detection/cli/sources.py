"""The images, films, recordings and cameras that a command line names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from detection.files import kind_of
from detection.sources import files_of

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")


def find_sources(sources: Sequence[str], failures: list[str]) -> tuple[list[str], list[str]]:
    """Return image files and recordings of events, and films and cameras, in the order given.

    `failures` gets a sentence for each source that gives none, and for each file that is none, such as a FIFO.
    """
    images: list[str] = []
    films: list[str] = []
    for source in sources:
        if is_camera(source):
            films.append(source)
            continue
        for file in files_of(source, failures):
            kind = kind_of(file)
            if kind != "a file":  # to open others might wait for ever
                failures.append(f"{file}: {kind}, not opened")
            elif Path(file).suffix.lower() in VIDEO_EXTENSIONS:
                films.append(file)
            else:
                images.append(file)
    # A file that two sources name is one image.
    return list(dict.fromkeys(images)), list(dict.fromkeys(films))


def is_camera(source: str) -> bool:
    """Return whether a source is the number of a camera."""
    return source.isdecimal() and not os.path.exists(source)
