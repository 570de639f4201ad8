"""Numbers, settings and names of runs as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' own names, with as many of the folders above them as it takes to tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    length = 1
    while len({path[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path[-length:]) for path in paths]


def show_value(value: Any) -> str:
    """Return a setting as a recipe would have it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show_value, value)) or "empty"
    return f"{value:.15g}" if isinstance(value, float) else str(value) or "empty"


def format_number(value: float | None) -> str:
    """Return a metric with three digits; a dash for none, and pycocotools' -1 for undefined in words."""
    if value is None:
        return "\N{EN DASH}"
    return "undefined" if value == -1 else f"{value:.3f}"


def format_count(value: float) -> str:
    """Return such as 12.3 M."""
    return _in_units(value, "", " k", " M", " G")


def format_energy(picojoule: float) -> str:
    """Return such as 4.56 \N{MICRO SIGN}J."""
    return _in_units(picojoule, " pJ", " nJ", " \N{MICRO SIGN}J", " mJ", " J")


def _in_units(value: float, unit: str, *larger: str) -> str:
    """Return three digits, to which is rounded first: 999.6 k is 1 M."""
    value = float(f"{value:.3g}")
    for each in larger:
        if abs(value) >= 1000:
            value, unit = value / 1000, each
    return f"{value:.3g}{unit}"


def format_time(seconds: float) -> str:
    """Return such as 1 h 5 min, 24 min or 12 s."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
