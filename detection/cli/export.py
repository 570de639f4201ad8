"""Write a saved run as a file: ONNX (floating point or integers), torch.export, NIR, or for the event-driven engine.

Beside the file lies NAME.json, which says what it takes and gives, and how well it agreed with PyTorch: it is checked
before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detection.cli.common import check_run, saved_run_parser, show_table
from detection.text import say

FORMATS = ("onnx", "torch", "nir", "events")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Export the run of a command line and print how well the file agrees."""
    parser = saved_run_parser(__doc__, prog)
    parser.add_argument(
        "--format", dest="file_format", choices=FORMATS, default="onnx", help="default: onnx; events: int8"
    )
    help = "int8 weights and integer thresholds wherever a layer sees spikes"
    parser.add_argument("--int8", action="store_true", help=help)
    help = "with --int8: 8 bits for analogue convolutions too, but the first and those of prediction"
    parser.add_argument("--analogue-int8", dest="analogue", action="store_true", help=help)
    help = "a detector's ONNX file that gives boxes: padding, decoding and non-maximum suppression inside"
    parser.add_argument("--nms", action="store_true", help=help)
    help = "new file (default: model.onnx, ... in the run folder, of zoo:NAME in runs/zoo/NAME)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=help)
    help = "with --int8: training images to set thresholds on (64 for a detector, 256 for a classifier)"
    parser.add_argument("--calibration", dest="num_calibration", type=int, metavar="N", help=help)
    help = "measure an ONNX or events file's accuracy on the evaluation images, beside what the run has logged"
    parser.add_argument("--evaluate", action="store_true", help=help)
    parser.add_argument("--height", type=int, help="of the images, with --width: that size only (default: free)")
    parser.add_argument("--width", type=int)
    options = parser.parse_args(arguments)
    integers = options.int8 or options.file_format == "events"
    if not (integers or options.evaluate) and options.data_root is not None:
        parser.error("--data.root belongs to --int8 and --evaluate, which need images")
    check_run(options.run)

    from detection.exporters import export_run

    given = vars(options)
    path, description = export_run(given.pop("run"), **given)
    parity = ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in description["parity"].items())
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB, beside it {path.name}.json")
    print(f"agrees with {'the network in 8 bits in ' * description['int8']}PyTorch: {parity}")
    if options.evaluate:
        found = description["evaluation"]
        logged = {key: f"{value:.4f}" for key, value in found["run"].items()}  # older logs have fewer
        rows = [(key, f"{value:.4f}", logged.get(key, "")) for key, value in found["file"].items()]
        show_table(str(path), ("metric", "file", "logged by the run"), rows)
