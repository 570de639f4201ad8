"""One HTML page about a run, or about several side by side: what their logs say, and what an evaluation adds."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from backbones import zoo
from detection.figures import to_svg
from detection.files import require_writable, write_whole
from detection.report.source import Source, complete, read_source
from detection.report.views import UNKNOWN, compare, describe
from detection.report.words import format_number, run_names
from detection.runs import Weights
from detection.text import printable

GENERATOR = "hoyer-det report"  # stands in every page, by which a page is known that may be replaced


def write_report(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    weights: Weights = "last",
    num_images: int = 3,
    data_root: str | Path | None = None,
    log_only: bool = False,
    command: Sequence[str] = (),
) -> Path:
    """Write a self-contained HTML page about one run, or about several and how they differ from the first.

    The log gives the curves and the thresholds, config.yaml the recipe. Where weights and evaluation data are at hand,
    one evaluation adds what the task has to show (a detector's precision over recall and images with boxes, a
    classifier's mistakes), and the analysis of the run adds energy and the binarity certificate. What cannot be
    computed is left out, and the page says why.

    Args:
        folders: runs of one task, as `Run.open` takes them.
        out: HTML file to write; None: report.html among the run's products, or here for several runs. An
            earlier page is replaced, any other file is not.
        weights: those whose metrics stand on the page, and which are evaluated.
        num_images: best and worst evaluation images to show, so many each; 0: none.
        data_root: where the evaluation data are; None: where the recipe says.
        log_only: leave out all that needs weights and data.
        command: how the page is made, to stand on it.

    Returns:
        The file.

    Raises:
        FileExistsError: `out` is a file that is no report page.
        FileNotFoundError: no such run, no finished epoch, no such folder for `out`, or no data in `data_root`.
        ValueError: a log is damaged, a run is given twice, or the runs are of different tasks.
    """
    if not folders:
        raise ValueError("no run folder given; a report needs at least one")
    if num_images < 0:
        raise ValueError(f"num_images: expected 0 or more, got {num_images}")
    places = [zoo.locate(folder).resolve() for folder in folders]
    for index, folder in enumerate(folders):
        if places[index] in places[:index]:
            raise ValueError(f"{folder}: given twice; a run is compared with other runs")
    sources = [read_source(folder, weights) for folder in folders]  # all of them, before any is evaluated
    tasks = list(dict.fromkeys(source.task.name for source in sources))
    if len(tasks) > 1:
        raise ValueError(f"runs of {' and of '.join(tasks)} have no metric in common; compare runs of one task")
    out = _choose_out(sources, out)
    if not log_only:
        root = None if data_root is None else Path(data_root)
        sources = [complete(source, num_images, root) for source in sources]
    write_whole(out, render(sources, command).encode())
    return out


def _choose_out(sources: Sequence[Source], out: str | Path | None) -> Path:
    """Return where the page goes; raise unless it may be written there."""
    if out is None:
        beside = sources[0].run.products if len(sources) == 1 else Path()
        beside.mkdir(parents=True, exist_ok=True)
        out = beside / "report.html"
    out = Path(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}; make it first, or name another file")
    if out.is_dir():
        raise FileExistsError(f"{out}: a folder; name an HTML file")
    if out.exists() and GENERATOR not in out.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise FileExistsError(f"{out} exists already and is no report page; name another file, or remove it first")
    require_writable(out.parent)
    return out


def render(sources: Sequence[Source], command: Sequence[str] = ()) -> str:
    """Return the page as HTML."""
    names = run_names([source.run.folder for source in sources])
    runs = [
        describe(source, name, f"run{index}")
        for index, (source, name) in enumerate(zip(sources, names, strict=True), start=1)
    ]
    return (
        environment_of_parts()
        .get_template("report.html.j2")
        .render(
            generator=GENERATOR,
            runs=runs,
            comparison=compare(sources, runs) if len(runs) > 1 else None,
            unknown=UNKNOWN,
            command=shlex.join(command),
        )
    )


def environment_of_parts() -> Environment:
    """Return the templates of the package, of which parts.html.j2 has what sections are made of; texts are escaped."""
    environment = Environment(
        loader=PackageLoader("detection"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_without_commands,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = itertools.count(1)
    environment.filters |= {
        "number": format_number,
        "breakable": lambda name: escape(_without_commands(name)).replace(".", Markup(".<wbr>")),
        "svg": lambda figure: Markup(to_svg(figure, f"figure{next(figures)}")),
    }
    return environment


def _without_commands(value: Any) -> Any:
    """A text without the control characters that HTML does not allow; anything else as it is."""
    return printable(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value
