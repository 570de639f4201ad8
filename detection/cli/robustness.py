"""Evaluate saved runs under noise: on membrane potentials, on thresholds, and on the images.

Accuracy (top1; AP50 and AP of detectors) over the severity of each kind of noise goes to a table and to OUT as
robustness.json, robustness.csv and robustness.png. So does how near the potentials lie to the threshold, and how many
outputs of each spike layer the noise flips. Noise on potentials and thresholds is in units of the layer's effective
threshold. Runs without spike layers are evaluated on corrupted images only.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detection.cli.common import check_run, saved_run_parser, table_console

if TYPE_CHECKING:
    from rich.table import Table


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the study of a command line and print its tables."""
    from detection.robustness.kinds import KINDS, UNITS

    parser = saved_run_parser(__doc__, prog, several=True)
    parser.add_argument(
        "--images", type=int, metavar="N", help="N of the evaluation images, evenly spread over them (default: all)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise (default: 0 1 2)")
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="new folder (default: FIRST_RUN_robustness; FIRST_RUN of zoo:NAME is runs/zoo/NAME)",
    )
    options = parser.parse_args(arguments)
    for run in options.runs:
        check_run(run)

    from detection.robustness import study
    from detection.runs import Run, command_line

    out = options.out or Path(f"{Run.open(options.runs[0]).products}_robustness")
    found = study(
        options.runs,
        out,
        command_line(),
        kinds=options.kinds,
        seeds=options.seeds,
        weights=options.weights,
        data_root=options.data_root,
        num_images=options.images,
    )
    console = table_console()
    for metric in found["metrics"]:
        console.print(accuracy_table(found, metric))
    for kind in options.kinds:
        print(f"{kind}: {UNITS[kind]}")
    for run in found["runs"]:
        if any(row["run"] == run for row in found["margins"]):
            console.print(margin_table(found, run))
    print(", ".join(str(out / f"robustness.{kind}") for kind in ("json", "csv", "png")))


def accuracy_table(found: dict[str, Any], metric: str) -> Table:
    """Return a row per severity, a column per run: mean and standard deviation over the seeds."""
    from rich.table import Table

    from detection.robustness import KINDS, SEVERITIES, curves_of

    table = Table("noise", "severity", *found["runs"], title=f"{metric} of {found['num_images']} images")
    clean = {row["run"]: row for row in found["results"] if row["kind"] == "clean"}
    table.add_row("none", "0", *(f"{clean[run][metric]:.3f}" for run in found["runs"]), end_section=True)
    for kind in KINDS:
        curves = curves_of(found, kind, metric)
        if not curves:
            continue
        for severity in SEVERITIES[kind]:
            values = [spread(curves[run][severity]) if run in curves else "no spikes" for run in found["runs"]]
            table.add_row(kind, f"{severity:g}", *values, end_section=severity == SEVERITIES[kind][-1])
    return table


def spread(values: Sequence[float]) -> str:
    """Return the mean, and the standard deviation where there are several values."""
    text = f"{statistics.mean(values):.3f}"
    return f"{text} ± {statistics.stdev(values):.3f}" if len(values) > 1 else text


def margin_table(found: dict[str, Any], run: str) -> Table:
    """Return a row per spike layer, in percent of its neurons: activity, near potentials, and flips by severity."""
    from rich.table import Table

    from detection.robustness import ALL_LAYERS, NEAR, SEVERITIES

    sds = SEVERITIES["membrane"]
    table = Table(title=f"{run}: spike layers", caption_justify="left")
    table.caption = (
        f"fire, near: neurons that fire, and whose u is within {100 * NEAR:g} % of the threshold (%)\n"
        "sd: standard deviation of u (thresholds)\n"
        f"{', '.join(f'{sd:g}' for sd in sds)}: outputs that membrane noise of so many thresholds flips on the layer's "
        "clean input, mean over the seeds (%)"
    )
    table.add_column("layer", overflow="fold")
    for name in ("fire", "near", "sd", *(f"{sd:g}" for sd in sds)):
        table.add_column(name, justify="right", no_wrap=True)
    flips: dict[tuple[str, float], list[float]] = {}
    for row in found["flips"]:
        if row["run"] == run:
            flips.setdefault((row["layer"], row["severity"]), []).append(row["flip_rate"])
    for row in (row for row in found["margins"] if row["run"] == run):
        table.add_row(
            row["layer"].removeprefix("backbone.").removeprefix("body."),
            f"{100 * row['firing_rate']:.1f}",
            f"{100 * row['near_rate']:.2f}",
            f"{row['potential_sd']:.2f}",
            *(f"{100 * statistics.mean(flips[row['layer'], sd]):.2f}" for sd in sds),
            end_section=row["layer"] == ALL_LAYERS,
        )
    return table
