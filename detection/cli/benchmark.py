"""Measure how fast an exported ONNX, .pt2 or .events file is on this machine's CPU, and how accurate.

It is given one image at a time. Times are medians and, in brackets, the middle half of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detection.cli.common import Parser, locate, show_table


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Measure the file of a command line and print a table."""
    parser = Parser(__doc__, prog)
    parser.add_argument("file", metavar="FILE", help="of `hoyer-det export`")
    help = "where the data of its run lie: accuracy on its evaluation images"
    parser.add_argument("--data.root", "--data", dest="data_root", type=Path, metavar="FOLDER", help=help)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--repeats", type=int, default=50, metavar="N", help="calls that count (default: 50)")
    options = parser.parse_args(arguments)
    if not locate(options.file).is_file():
        raise FileNotFoundError(f"{options.file}: no such file")

    from detection.exporters.benchmark import benchmark_file, spread_of

    found = benchmark_file(options.file, threads=options.threads, repeats=options.repeats, data_root=options.data_root)
    height, width = found.size
    rows = [
        ("image", f"{width}x{height} pixels"),
        ("threads", str(found.threads)),
        ("the file alone", spread_of(found.seconds)),
        ("from the image to the result", spread_of(found.whole_seconds)),
        ("images per second, the file alone", f"{1 / found.median:.1f}"),
        *((key, f"{value:.4f}") for key, value in found.metrics.items()),
    ]
    show_table(f"{options.file}, {found.path.stat().st_size / 1e6:.1f} MB", ("measured", "value"), rows)
