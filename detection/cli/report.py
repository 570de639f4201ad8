"""Write one self-contained HTML page about a run, or about several side by side.

The log is enough. Where weights and evaluation data are at hand, an evaluation adds precision-recall curves, the best
and worst images with boxes and spike maps, energy and the binarity certificate (the last two from RUN/analysis if that
is newer than the weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detection.cli.common import check_run, saved_run_parser
from detection.text import say


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Write the page that a command line asks for."""
    parser = saved_run_parser(__doc__, prog, several=True)
    help = (
        "page to write (default: RUN/report.html, where RUN of zoo:NAME is runs/zoo/NAME, or report.html here for "
        "several runs)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.html", help=help)
    help = "best and worst images to show, N each (default: 3)"
    parser.add_argument("--images", dest="num_images", type=int, default=3, metavar="N", help=help)
    parser.add_argument("--log-only", action="store_true", help="evaluate nothing, leave out what needs it")
    options = parser.parse_args(arguments)
    if options.num_images < 0:
        raise ValueError(f"--images {options.num_images}: expected 0 or more")
    for run in options.runs:
        check_run(run)

    from detection.report import write_report
    from detection.runs import command_line

    given = vars(options)
    out = write_report(given.pop("runs"), given.pop("out"), **given, command=command_line())
    say(f"{out}: {out.stat().st_size / 1e6:.2f} MB")
