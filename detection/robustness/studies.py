"""Studies of saved runs: their metrics over the severities of several kinds of noise."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backbones.spiking import find_neuron
from detection.curves import draw_robustness
from detection.figures import save_png
from detection.files import require_writable, write_whole
from detection.robustness.kinds import IMAGE_KINDS, KINDS, SPIKE_KINDS, UNITS
from detection.robustness.subject import Subject, open_runs, prepare
from detection.runs import Run, Weights, describe_environment
from detection.tasks import task_of


def study(
    folders: Sequence[str | Path],
    out: str | Path,
    command: Sequence[str],
    *,
    kinds: Sequence[str] = KINDS,
    seeds: Sequence[int] = (0, 1, 2),
    weights: Weights = "last",
    data_root: str | Path | None = None,
    num_images: int | None = None,
) -> dict[str, Any]:
    """Return the accuracy of runs over the severities of several kinds of noise, as written to out/robustness.json.

    A network without spike layers has no threshold that could be a scale, so the kinds of `SPIKE_KINDS` are left out
    for it, under "left_out" and on standard error. Kinds without chance are evaluated once, with the seed None.
    After each run robustness.json, robustness.csv and robustness.png in `out` are written anew.

    Args:
        folders: of the runs.
        out: folder to write into; must not exist, or be empty.
        command: how the study was started, for its log.
        kinds: some of `KINDS`.
        seeds: of the noise.
        weights: which of the runs' weights.
        data_root: where their data lie now; None: where their recipes say.
        num_images: see `prepare`.

    Returns:
        "results": a dict for each evaluation (run, kind, severity, seed, the metrics; kind "clean" has severity 0);
        "margins": for each run and spike layer, and for ALL_LAYERS, firing_rate, near_rate and potential_sd, see
        `LayerMargin`; "flips": for each of them, severity and seed flip_rate and lost_rate. Margins and flips are
        measured where a kind of `SPIKE_KINDS` is. Further "command", "versions", "machine", "runs", "num_images".

    Raises:
        FileExistsError: there is something in `out` already.
        FileNotFoundError: no such run, weights, or data.
        ValueError: an unknown kind, seeds or images that are not allowed, runs that do not compare or of which nothing
            is left.
    """
    out = Run.check_free(out)
    require_writable(out)
    _check_request(kinds, seeds, num_images)
    runs = _name_runs(open_runs(folders, data_root=data_root))
    kinds_of = {name: _kinds_of(run, kinds) for name, run in runs.items()}
    found = _start(runs, kinds, kinds_of, command, weights)
    for name, run in runs.items():
        subject = prepare(run, name, weights=weights, num_images=num_images)
        found["num_images"] = subject.num_images
        _add(found, subject, run, kinds_of[name], seeds)
        out.mkdir(parents=True, exist_ok=True)
        _write(found, out)
    return found


def _check_request(kinds: Sequence[str], seeds: Sequence[int], num_images: int | None) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"--kinds {kind}: unknown (allowed: {', '.join(KINDS)})")
    if min(seeds) < 0:
        raise ValueError(f"--seeds {min(seeds)}: expected 0 or more")
    for option, values in (("--kinds", kinds), ("--seeds", seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"{option} {' '.join(map(str, values))}: expected each one once")
    if num_images is not None and num_images < 1:
        raise ValueError(f"--images {num_images}: expected 1 or more")


def _name_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Return the runs by the names of their folders, or by their paths where two names are equal."""
    short = {run.folder.name: run for run in runs}
    return short if len(short) == len(runs) else {str(run.folder): run for run in runs}


def _kinds_of(run: Run, kinds: Sequence[str]) -> list[str]:
    """Return the kinds that a run's network can be asked for."""
    if find_neuron(run.config.model.backbone.activation).spiking:
        return list(kinds)
    left = [kind for kind in kinds if kind not in SPIKE_KINDS]
    if not left:
        raise ValueError(
            f"{run.folder}: no spike layers, which --kinds {' '.join(kinds)} needs; leave the run out, or name one "
            f"of {', '.join(IMAGE_KINDS)} too"
        )
    return left


def _start(
    runs: Mapping[str, Run],
    kinds: Sequence[str],
    kinds_of: Mapping[str, Sequence[str]],
    command: Sequence[str],
    weights: Weights,
) -> dict[str, Any]:
    """Return what `study` does before the first evaluation; say on standard error what is left out."""
    left_out = []
    for name in runs:
        missing = [kind for kind in kinds if kind not in kinds_of[name]]
        if missing:
            left_out.append({"run": name, "kinds": missing, "reason": "no spike layers, so no threshold as a scale"})
            print(f"{name}: no spike layers; left out: {', '.join(missing)}", file=sys.stderr)
    task = task_of(next(iter(runs.values())).config)
    return {
        **describe_environment(command).to_json(),
        "task": task.name,
        "metrics": list(task.headline),
        "weights": weights,
        "runs": {},
        "left_out": left_out,
        "results": [],
        "margins": [],
        "flips": [],
    }


def _add(found: dict[str, Any], subject: Subject, run: Run, kinds: Sequence[str], seeds: Sequence[int]) -> None:
    """Evaluate a run and add what that gives; say on standard error how far it is."""
    found["runs"][subject.name] = {
        "folder": run.address,
        "activation": run.config.model.backbone.activation,
        "sha256": run.checksums()[f"{found['weights']}.safetensors"],
    }
    for row in subject.rows(kinds, seeds):
        found["results"].append(row)
        shown = ", ".join(f"{key} {row[key]:.4f}" for key in found["metrics"])
        seed = "" if row["seed"] is None else f", seed {row['seed']}"
        print(f"{subject.name}: {row['kind']} {row['severity']:g}{seed}: {shown}", file=sys.stderr)
    if any(kind in SPIKE_KINDS for kind in kinds):
        margins, flips = subject.margins(seeds)
        found["margins"] += margins
        found["flips"] += flips


def _write(found: Mapping[str, Any], out: Path) -> None:
    """Write robustness.json, robustness.csv (a line per number) and robustness.png."""
    write_whole(out / "robustness.json", (json.dumps(found, indent=2) + "\n").encode())
    text = io.StringIO()
    keys = ("run", "kind", "severity", "seed", "layer", "metric", "value")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(keys)
    for part in ("results", "margins", "flips"):
        for row in found[part]:
            place = {"kind": {"margins": "clean", "flips": "membrane"}.get(part)} | row
            for metric in (key for key in row if key not in keys):
                writer.writerow([*(place.get(key) for key in keys[:-2]), metric, row[metric]])
    write_whole(out / "robustness.csv", text.getvalue().encode())
    metric = found["metrics"][0]
    curves = {kind: runs for kind in KINDS if (runs := curves_of(found, kind, metric))}
    save_png(draw_robustness(curves, UNITS, f"{metric}, in [0, 1]"), out / "robustness.png")


def curves_of(found: Mapping[str, Any], kind: str, metric: str) -> dict[str, dict[float, list[float]]]:
    """Return run -> severity -> the metric for each seed, the clean network at 0; runs without the kind are absent."""
    curves: dict[str, dict[float, list[float]]] = {}
    for name in found["runs"]:
        rows = [row for row in found["results"] if row["run"] == name]
        if any(row["kind"] == kind for row in rows):
            curve = curves.setdefault(name, {})
            for row in rows:
                if row["kind"] in ("clean", kind):
                    curve.setdefault(row["severity"], []).append(row[metric])
    return curves
