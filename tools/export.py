#!/usr/bin/env python3
"""A saved run as a file for other programs: ONNX (floating point or integers), torch.export or NIR, checked on writing.

Beside the file lies NAME.json, which says what it takes and gives, and how well it agreed with PyTorch.
"""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from detection.cli import run_tool, saved_run_parser, table_console
from detection.export import NUM_CALIBRATION, SUFFIXES, export_run


def main() -> None:
    parser = saved_run_parser(__doc__)
    parser.add_argument("--format", choices=tuple(SUFFIXES), default="onnx", help="default: onnx")
    parser.add_argument(
        "--int8", action="store_true", help="int8 weights and integer thresholds wherever a layer sees spikes"
    )
    parser.add_argument(
        "--analogue-int8",
        action="store_true",
        help="with --int8: 8 bits for analogue convolutions too, but the first and those of prediction",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="new file (default: model.onnx, ... in the run folder, of zoo:NAME in runs/zoo/NAME)",
    )
    defaults = ", ".join(f"{number} for {task}" for task, number in NUM_CALIBRATION.items())
    parser.add_argument(
        "--calibration", type=int, metavar="N", help=f"with --int8: training images to set thresholds on ({defaults})"
    )
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="measure an ONNX file's accuracy on the evaluation images, beside what the run has logged",
    )
    parser.add_argument("--height", type=int, help="of the images, with --width: that size only (default: free)")
    parser.add_argument("--width", type=int)
    options = parser.parse_args()
    if not options.int8 and options.calibration is not None:
        parser.error("--calibration belongs to --int8, which sets its thresholds on images")
    if not (options.int8 or options.evaluate) and options.data_root is not None:
        parser.error("--data.root belongs to --int8 and --evaluate, which need images")
    path, description = export_run(
        options.run,
        options.format,
        options.out,
        which=options.weights,
        int8=options.int8,
        analogue=options.analogue_int8,
        data_root=options.data_root,
        num_calibration=options.calibration,
        height=options.height,
        width=options.width,
        evaluate=options.evaluate,
    )
    parity = ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in description["parity"].items())
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, beside it {path.name}.json")
    print(f"agrees with PyTorch: {parity}")
    if options.evaluate:
        table = Table("metric", "file", "logged by the run", title=str(path))
        found, logged = description["evaluation"]["file"], description["evaluation"]["run"]
        for key, value in found.items():
            table.add_row(key, f"{value:.4f}", f"{logged[key]:.4f}")
        table_console().print(table)


if __name__ == "__main__":
    run_tool(main)
