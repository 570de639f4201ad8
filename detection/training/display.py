"""The words of a training on the screen."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from detection.records import EpochLog
from detection.runs import Run

LINE_SECONDS = 60  # between two lines about the steps, where there is no terminal for a bar


def resume_command(run: Run) -> str:
    """Return the command that continues a run."""
    return f"hoyer-det train --resume {shlex.quote(str(run.folder))}"


def summary(line: EpochLog, num_epochs: int, best_by: str, headline: Sequence[str]) -> str:
    """Return one epoch as one line of text."""
    parts = [f"epoch {line.epoch}/{num_epochs}", f"loss {line.loss:.4f}"]
    parts.append(f"({', '.join(f'{name} {value:.4f}' for name, value in line.losses.items())})")
    shown = dict.fromkeys((best_by, *headline, "activity"))
    parts += [f"{key} {line.metrics[key]:.4f}" for key in shown if key in line.metrics]
    if line.ema is not None:
        parts.append(f"ema {best_by} {line.ema.metrics[best_by]:.4f}")
    parts.append(f"{line.total_seconds:.1f} s")
    return "  ".join(parts)


class LineClock:
    """Lines about the steps where there is no terminal for a bar: of the first step, then one a minute."""

    def __init__(self, console: Console) -> None:
        self.console, self.shown_at = console, -math.inf

    def show(self, where: str, loss: Tensor, images_per_second: float) -> None:
        """Print a line about the last step, if it is time."""
        now = time.monotonic()
        if not (self.console.is_terminal or self.console.quiet or now - self.shown_at < LINE_SECONDS):
            self.shown_at = now
            self.console.print(f"{where}  loss {loss.item():.4f}  {images_per_second:.1f} images/s")


def progress_bar(console: Console) -> Progress:
    """Return a bar for terminals; elsewhere nothing but the lines printed between."""
    columns: Sequence[Any] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
