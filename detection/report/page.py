"""One HTML page about a run, or about several side by side: what their logs say, and what an evaluation adds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from detection.checkpoint import Weights
from detection.files import write_whole
from detection.report.pictures import LABEL_HEIGHT, PICTURE_WIDTH
from detection.report.source import SCORE_THRESHOLD, Source, complete, read_source
from detection.report.views import UNKNOWN, compare, describe, run_styles
from detection.report.words import format_count, format_energy, format_number, run_names

GENERATOR = "hoyer-det report"  # stands in every page, by which a page is known that may be replaced


SECTIONS = {
    "curves": "Curves",
    "classes": "Classes",
    "precision": "Precision over recall",
    "layers": "Layers",
    "networks": "Networks",
    "certificate": "Certificate",
    "dynamics": "Thresholds",
    "images": "Images",
    "recipe": "Recipe",
    "origin": "Reproduce",
}  # end of the id of each section of a run, and its name in the contents


DETECTION_ONLY = ("precision", "images")


def write_report(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    which: Weights = "last",
    num_images: int = 3,
    data_root: str | Path | None = None,
    log_only: bool = False,
    command: Sequence[str] = (),
) -> Path:
    """The path of a self-contained HTML page about one run, or about several and how they differ from the first.

    The log gives the the recipe, the curves and the thresholds. Where weights and evaluation data are at
    hand, one evaluation adds precision-recall curves and images with boxes (a detector) or the classes taken for
    each other (a classifier), and the analysis of the run adds energy and the binarity certificate. What cannot be
    computed is left out, and the page says why.

    Args:
        folders: runs of one task, as `Run.open` takes them.
        out: HTML file to write; None: report.html among the run's products, or here for several runs. An
            earlier page is replaced, any other file is not.
        which: whose metrics stand in the and which weights are evaluated.
        num_images: best and worst evaluation images to show, so many each; 0: none.
        data_root: where the evaluation data are; None: where the recipe says.
        log_only: leave out all that needs weights and data.
        command: how the page is made, to stand on it.

    Raises:
        FileExistsError: `out` is a file that is no report page.
        FileNotFoundError: no such run, no finished epoch, no such folder for `out`, or no data in `data_root`.
        ValueError: a log is damaged, a run is given twice, or the runs are of different tasks.
    """
    if not folders:
        raise ValueError("no run folder given; a report needs at least one")
    if num_images < 0:
        raise ValueError(f"num_images: expected 0 or more, got {num_images}")
    folders = [Path(folder) for folder in folders]
    for index, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:index]]:
            raise ValueError(f"{folder}: given twice; a run is compared with other runs")
    sources = [read_source(folder, which) for folder in folders]  # all of them, before any is evaluated
    tasks = list(dict.fromkeys(source.run.config.task for source in sources))
    if len(tasks) > 1:
        raise ValueError(f"runs of {' and of '.join(tasks)} have no metric in common; compare runs of one task")
    if out is None:
        beside = sources[0].run.products if len(sources) == 1 else Path()
        beside.mkdir(parents=True, exist_ok=True)
        out = beside / "report.html"
    out = _check_out(Path(out))
    if not log_only:
        sources = [
            complete(source, which, num_images, None if data_root is None else Path(data_root)) for source in sources
        ]
    write_whole(out, render(sources, command).encode())
    return out


def _check_out(out: Path) -> Path:
    """`out` itself; raises unless a page may be written there."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}; make it first, or name another file")
    if out.is_dir():
        raise FileExistsError(f"{out}: a folder; name an HTML file")
    if out.exists() and GENERATOR not in out.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise FileExistsError(f"{out} exists already and is no report page; name another file, or remove it first")
    return out


def render(sources: Sequence[Source], command: Sequence[str] = ()) -> str:
    """The page as a string of HTML."""
    environment = Environment(
        loader=PackageLoader("detection"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": format_number,
        "breakable": lambda name: escape(name).replace(".", Markup(".<wbr>")),
        "percent": lambda share: f"{100 * share:.1f} %",
        "count": format_count,
        "energy": format_energy,
    }
    names = run_names([source.run.folder for source in sources])
    styles = run_styles(sources)
    runs = [
        describe(source, name, f"run{index}")
        for index, (source, name) in enumerate(zip(sources, names, strict=True), 1)
    ]
    for run, style in zip(runs, styles, strict=True):
        run["style"] = style
    return environment.get_template("report.html.j2").render(
        generator=GENERATOR,
        sections={
            key: name
            for key, name in SECTIONS.items()
            if key not in DETECTION_ONLY or sources[0].run.config.task == "detection"
        },
        runs=runs,
        comparison=compare(sources, runs) if len(runs) > 1 else None,
        unknown=UNKNOWN,
        command=" ".join(command),
        score_threshold=SCORE_THRESHOLD,
        picture_width=PICTURE_WIDTH,
        label_height=LABEL_HEIGHT,
    )
