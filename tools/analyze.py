#!/usr/bin/env python3
"""Energy and binarity of a saved run over its evaluation images: tables, and analysis.json, layers.csv, analysis.md.

Ends with status 1 if the network is not binary: a convolution or linear layer other than the first saw something else
than 0 and 1, in a part that the recipe does not declare analogue.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from backbones import HOROWITZ_45NM, read_costs
from detection.analysis import TextTable, analyze_run
from detection.checkpoint import Run
from detection.cli import run_tool, saved_run_parser, table_console
from detection.files import require_writable


def main() -> None:
    parser = saved_run_parser(__doc__)
    parser.add_argument("--images", type=int, metavar="N", help="the first N evaluation images only (default: all)")
    parser.add_argument("--costs", metavar="FILE", help="YAML or JSON, picojoules by operation (default: 45 nm)")
    parser.add_argument("--strict", action="store_true", help="no layer but the first may see real values")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for the files (default: RUN/analysis, with --images N RUN/analysis_N_images; RUN of zoo:NAME is "
        "runs/zoo/NAME)",
    )
    options = parser.parse_args()
    run = Run.open(options.run)
    # What is not the whole analysis does not take its place.
    part = f"_{options.images}_images" if options.images else "_strict" if options.strict else ""
    out = options.out or run.products / f"analysis{part}"
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out}: a file; a folder is needed")
    require_writable(out)
    costs = read_costs(options.costs) if options.costs else HOROWITZ_45NM
    analysis = analyze_run(
        options.run,
        options.weights,
        data_root=options.data_root,
        num_images=options.images,
        costs=costs,
        strict=options.strict,
    )
    analysis.save(out)
    console = table_console()
    for table in analysis.tables():
        console.print(as_rich(table))
    metrics = [key for key in ("AP", "AP50", "top1", "activity") if key in analysis.metrics]
    print(f"{analysis.measured.num_images} images,", ", ".join(f"{key} {analysis.metrics[key]:.4f}" for key in metrics))
    print(f"written to {out}: analysis.json, layers.csv, analysis.md")
    if not analysis.certificate.is_binary:
        first = analysis.certificate.violations[0]
        number = len(analysis.certificate.violations)
        print(f"error: not binary, {number} violations; the first: {first.layer}: {first.reason}", file=sys.stderr)
        sys.exit(1)


def as_rich(table: TextTable) -> Table:
    """The table for a terminal."""
    drawn = Table(*map(escape, table.header), title=escape(table.title))
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    return drawn


if __name__ == "__main__":
    run_tool(main)
