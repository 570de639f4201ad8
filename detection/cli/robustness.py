"""Evaluate saved runs under noise: on membrane potentials, on thresholds, and on the images.

Accuracy (top1; AP50 and AP of detectors) over the severity of each kind of noise goes to a table and to OUT as
robustness.json, robustness.csv and robustness.png. So does how near the potentials lie to the threshold, and how many
outputs of each spike layer the noise flips. Noise on potentials and thresholds is in units of the layer's effective
threshold. Runs without spike layers are evaluated on corrupted images only.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detection.cli.common import check_run, saved_run_parser, show_table
from detection.text import say, spread


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the study of a command line and print its tables."""
    from detection.robustness import KINDS, UNITS

    parser = saved_run_parser(__doc__, prog, several=True)
    help = "N of the evaluation images, evenly spread over them (default: all)"
    parser.add_argument("--images", dest="num_images", type=int, metavar="N", help=help)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise (default: 0 1 2)")
    help = f"of {', '.join(KINDS)} (default: all)"
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), metavar="KIND", help=help)
    help = "new folder (default: FIRST_RUN_robustness; FIRST_RUN of zoo:NAME is runs/zoo/NAME)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=help)
    options = parser.parse_args(arguments)
    for run in options.runs:
        check_run(run)

    from detection.robustness.studies import study
    from detection.runs import Run, command_line

    given = vars(options)
    out = given.pop("out") or Path(f"{Run.open(options.runs[0]).products.resolve()}_robustness")
    found = study(given.pop("runs"), out, command_line(), **given)
    for metric in found["metrics"]:
        title = f"{metric} of {found['num_images']} images"
        show_table(title, ("noise", "severity", *found["runs"]), accuracy_rows(found, metric))
    for kind in options.kinds:
        if any(row["kind"] == kind for row in found["results"]):
            print(f"{kind}: {UNITS[kind]}")
    for run in found["runs"]:
        if any(row["run"] == run for row in found["margins"]):
            show_margins(found, run)
    say(", ".join(str(out / f"robustness.{kind}") for kind in ("json", "csv", "png")))


def accuracy_rows(found: dict[str, Any], metric: str) -> Iterator[Sequence[str]]:
    """Yield a row per severity, a column per run: mean and standard deviation over the seeds; a line after a kind."""
    from detection.robustness import KINDS, SEVERITIES
    from detection.robustness.studies import curves_of

    clean = {row["run"]: row for row in found["results"] if row["kind"] == "clean"}
    yield ("none", "0", *(f"{clean[run][metric]:.3f}" for run in found["runs"]))
    for kind in KINDS:
        curves = curves_of(found, kind, metric)
        if not curves:
            continue
        yield ()
        for severity in SEVERITIES[kind]:
            values = [spread(curves[run][severity], 3) if run in curves else "left out" for run in found["runs"]]
            yield (kind, f"{severity:g}", *values)


def show_margins(found: dict[str, Any], run: str) -> None:
    """Print a row per spike layer, in percent of its neurons: activity, near potentials, and flips by severity."""
    from detection.robustness import ALL_LAYERS, NEAR, SEVERITIES

    levels = SEVERITIES["membrane"]
    numeric = ("fire", "near", "sd", *(f"{level:g}" for level in levels))
    flips: dict[tuple[str, float], list[float]] = {}
    for row in found["flips"]:
        if row["run"] == run:
            flips.setdefault((row["layer"], row["severity"]), []).append(row["flip_rate"])
    rows: list[Sequence[str]] = []
    for row in (row for row in found["margins"] if row["run"] == run):
        name = row["layer"].removeprefix("backbone.").removeprefix("body.")
        rates = [f"{100 * row['firing_rate']:.1f}", f"{100 * row['near_rate']:.2f}", f"{row['potential_sd']:.2f}"]
        means = [f"{100 * statistics.mean(flips[row['layer'], level]):.2f}" for level in levels]
        rows.append((name, *rates, *means))
        if row["layer"] == ALL_LAYERS:
            rows.append(())
    caption = (
        f"fire, near: neurons that fire, and whose u is within {100 * NEAR:g} % of the threshold (%)\n"
        "sd: standard deviation of u (thresholds)\n"
        f"{', '.join(numeric[3:])}: outputs that membrane noise of so many thresholds flips on the layer's clean "
        "input, mean over the seeds (%)"
    )
    show_table(f"{run}: spike layers", ("layer", *numeric), rows, numeric=numeric, caption=caption)
