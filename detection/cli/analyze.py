"""Count energy and check binarity of a saved run over its evaluation images: tables, and analysis.json, layers.csv,
analysis.md.

Ends with status 1 if the network is not binary: a convolution or linear layer other than the first saw something else
than 0 and 1, in a part that the recipe does not declare analogue.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from detection.cli.common import check_run, saved_run_parser, show_table
from detection.text import say


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Analyse the run of a command line, print the tables and write the files."""
    parser = saved_run_parser(__doc__, prog)
    help = "N of the evaluation images, evenly spread, or all if there are fewer (default: all)"
    parser.add_argument("--images", type=int, metavar="N", help=help)
    parser.add_argument("--costs", metavar="FILE", help="YAML or JSON, picojoules by operation (default: 45 nm)")
    parser.add_argument("--strict", action="store_true", help="no layer but the first may see real values")
    help = (
        "for the files (default: RUN/analysis, with --images N RUN/analysis_N_images; --strict, --costs and other "
        "weights add their names to that; RUN of zoo:NAME is runs/zoo/NAME)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=help)
    options = parser.parse_args(arguments)
    check_run(options.run)

    from backbones import HOROWITZ_45NM, read_costs
    from detection.analysis import analyze_run
    from detection.files import require_writable
    from detection.runs import Run

    # Less than the whole analysis does not take its place.
    part = (f"_{options.images}_images" if options.images else "") + "_strict" * options.strict
    others = [Path(options.costs).stem if options.costs else "", options.weights.replace("last", "")]
    part += "".join(f"_{name}" for name in others if name)
    out = options.out or Run.open(options.run).products / f"analysis{part}"
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out}: a file; a folder is needed")
    require_writable(out)
    analysis = analyze_run(
        options.run,
        options.weights,
        data_root=options.data_root,
        num_images=options.images,
        costs=read_costs(options.costs) if options.costs else HOROWITZ_45NM,
        strict=options.strict,
    )
    analysis.save(out)
    for table in analysis.tables():
        show_table(table.title, table.header, table.rows)
    print(f"{analysis.measured.num_images} images, {analysis.summary()}")
    say(f"written to {out}: analysis.json, layers.csv, analysis.md")
    if not analysis.certificate.is_binary:
        first, number = analysis.certificate.violations[0], len(analysis.certificate.violations)
        say(f"error: not binary, {number} violations; the first: {first.layer}: {first.reason}", error=True)
        sys.exit(1)
