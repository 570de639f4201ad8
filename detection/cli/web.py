"""Serve a web page on which one sees trained networks at work: on a picture of one's own, live.

The page takes images by upload, clipboard and camera, films and, for networks of events, recordings. It shows what a
network finds, where each of its stages fires, and what this very picture costs beside the analogue twin; a second
network beside the first one; and what noise does to both. Needs `pip install hoyer-det[web]`.

It is there for this machine alone, unless --host says otherwise, and asks no other machine for anything.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from detection.cli.common import Parser, add_saved_run_options, check_run
from detection.text import say

if TYPE_CHECKING:
    import argparse

    from detection.web.server import PageServer


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Serve the page that a command line asks for, until Ctrl-C."""
    options = build_parser(prog).parse_args(arguments)
    for name, value in (("--max-mb", options.max_mb), ("--max-megapixels", options.max_megapixels)):
        if not 1 <= value < math.inf:
            raise ValueError(f"{name} {value:g}: expected 1 or more, finite")
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port {options.port}: expected 0 to 65535")
    for run in options.runs:
        check_run(run)
    server = prepare(options)
    say(f"{server.address} shows {', '.join(server.names)}; Ctrl-C ends it")
    server.run()


def build_parser(prog: str | None) -> Parser:
    """Return the parser of the verb."""
    parser = Parser(__doc__, prog)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder or zoo:NAME; the page chooses among several")
    add_saved_run_options(parser)
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: the first GPU, if there is one)")
    help = "address to listen at; 0.0.0.0: all of this machine's, for everybody who can reach it (default: 127.0.0.1)"
    parser.add_argument("--host", default="127.0.0.1", help=help)
    parser.add_argument("--port", type=int, default=7860, help="0: a free one (default: 7860)")
    parser.add_argument("--max-mb", type=float, default=64, metavar="N", help="of an upload (default: 64)")
    help = "of a picture, in millions of pixels (default: 50)"
    parser.add_argument("--max-megapixels", type=float, default=50, metavar="N", help=help)
    return parser


def prepare(options: argparse.Namespace) -> PageServer:
    """Return the server of a command line, which listens already.

    Raises:
        FileNotFoundError: a run has no such weights.
        ModuleNotFoundError: Gradio is not installed.
        OSError: the port is taken.
        ValueError: a run is given twice, or weights are damaged.
    """
    from detection.web.server import LOOPBACK, PageServer

    if options.host not in LOOPBACK:
        warning = (
            f"warning: --host {options.host} lets everybody who can reach this machine use the page; it asks for no "
            "password and does not encrypt"
        )
        print(warning, file=sys.stderr)
    return PageServer(
        options.runs,
        weights=options.weights,
        device=options.device,
        data_root=options.data_root,
        host=options.host,
        port=options.port,
        most_bytes=round(options.max_mb * 2**20),
        most_pixels=round(options.max_megapixels * 1e6),
    )
