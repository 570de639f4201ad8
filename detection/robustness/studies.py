"""Studies of saved runs: their metrics over the severities of several kinds of noise."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from detection.config import Recipe
from detection.curves import draw_robustness
from detection.figures import save_png
from detection.files import require_writable, write_csv, write_whole
from detection.report.words import run_names
from detection.robustness import ALL_LAYERS, IMAGE_KINDS, KINDS, RANDOM_KINDS, RGB_KINDS, SEVERITIES, SPIKE_KINDS, UNITS
from detection.robustness.corruptions import corrupt_batches
from detection.robustness.noise import potential_noise, record_margins, sum_margins
from detection.runs import Run, Weights, describe_environment
from detection.tasks import task_of
from detection.tasks.base import Dataset, Task
from detection.tasks.evaluate import evaluation_data
from detection.tasks.run import load_for_evaluation, read_evaluation_data
from detection.text import say, shorten

REASONS = {
    "no spike layers": "no spike layers, so no threshold as a scale",
    "no single time step": "no single time step: what is put into one is carried over to the next",
    "images of events": "images of events, which have no three colours",
}


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

    A network without spike layers has no threshold that could be a scale, and one of several time steps carries noise
    from one to the next, so the kinds of `SPIKE_KINDS` are left out for them, under "left_out" and on standard error;
    as are those of `RGB_KINDS` for images of events.
    Kinds without chance are evaluated once, with the seed None.
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
    opened = open_runs(folders, data_root=data_root)
    for run in opened:
        run.read(weights)  # all of them are there and whole, before hours are spent on some
    runs = dict(zip(run_names([run.folder for run in opened]), opened, strict=True))
    kinds_of = {name: _kinds_of(run, kinds) for name, run in runs.items()}
    task = task_of(opened[0].config)
    found = describe_environment(command).to_json()
    found |= {"task": task.name, "metrics": list(task.headline), "weights": weights, "runs": {}}
    found |= {"left_out": list(_left_out(kinds, runs)), "results": [], "margins": [], "flips": []}
    for name, run in runs.items():
        subject = prepare(run, name, weights=weights, num_images=num_images)
        found["num_images"] = subject.num_images
        _add(found, subject, run, kinds_of[name], seeds)
        out.mkdir(parents=True, exist_ok=True)
        _write(found, out)
    return found


def _check_request(kinds: Sequence[str], seeds: Sequence[int], num_images: int | None) -> None:
    if not kinds or not seeds:
        raise ValueError(f"{'--seeds' if kinds else '--kinds'}: expected at least one")
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


def why_not(run: Run, kind: str) -> str | None:
    """Return why a run's network cannot be asked for a kind of noise, one of `REASONS`; None: it can."""
    task = task_of(run.config)
    if kind in SPIKE_KINDS:
        return "no spike layers" if not task.spiking else None if task.time_steps == 1 else "no single time step"
    return "images of events" if kind in RGB_KINDS and getattr(run.config.data, "are_events", False) else None


def _kinds_of(run: Run, kinds: Sequence[str]) -> list[str]:
    """Return the kinds that a run's network can be asked for."""
    left = [kind for kind in kinds if why_not(run, kind) is None]
    if not left:
        others = [kind for kind in KINDS if why_not(run, kind) is None]
        raise ValueError(
            f"{run.folder}: {why_not(run, kinds[0])}: --kinds {' '.join(kinds)} cannot be asked of it; leave the run "
            f"out, or name one of {', '.join(others)} too"
        )
    return left


def _left_out(kinds: Sequence[str], runs: Mapping[str, Run]) -> Iterator[dict[str, Any]]:
    """Yield an entry for each run that is not asked for all kinds, and say so on standard error."""
    for name, run in runs.items():
        for why, reason in REASONS.items():
            missing = [kind for kind in kinds if why_not(run, kind) == why]
            if missing:
                say(f"{name}: {why}; left out: {', '.join(missing)}", error=True)
                yield {"run": name, "kinds": missing, "reason": reason}


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
        say(f"{subject.name}: {row['kind']} {row['severity']:g}{seed}: {shown}", error=True)
    if any(kind in SPIKE_KINDS for kind in kinds):
        margins, flips = subject.margins(seeds)
        found["margins"] += margins
        found["flips"] += flips


def _write(found: Mapping[str, Any], out: Path) -> None:
    """Write robustness.json, robustness.csv (a line per number) and robustness.png."""
    write_whole(out / "robustness.json", (json.dumps(found, indent=2) + "\n").encode())
    keys, lines = ("run", "kind", "severity", "seed", "layer", "metric", "value"), []
    for part in ("results", "margins", "flips"):
        for row in found[part]:
            place = {"kind": {"margins": "clean", "flips": "membrane"}.get(part)} | row
            metrics = (key for key in row if key not in keys)
            lines += [[*(place.get(key) for key in keys[:-2]), metric, row[metric]] for metric in metrics]
    write_csv(out / "robustness.csv", keys, lines)
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


# Runs that are evaluated again and again


@dataclass
class Subject:
    """A run that is ready to be evaluated under noise.

    Attributes:
        name: of the run, in tables and plots.
        task: of its recipe.
        model: in evaluation mode.
        accelerator: its device and precision.
        dataset: the evaluation images.
        batches: of them, in order.
    """

    name: str
    task: Task
    model: nn.Module
    accelerator: Accelerator
    dataset: Dataset
    batches: Iterable[Any]

    @property
    def num_images(self) -> int:
        """Number of images in `batches`."""
        return len(self.dataset)

    def measure(self, kind: str, severity: float, seed: int) -> dict[str, float]:
        """Return the task's headline metrics, and "activity" with spike layers, at one severity."""
        batches = self.batches
        if kind in IMAGE_KINDS and severity:
            batches = corrupt_batches(batches, kind, severity, seed)
        with potential_noise(self.model, kind, severity, seed) if kind in SPIKE_KINDS else nullcontext():
            found = self.task.evaluate(self.model, batches, self.dataset, self.accelerator)
        return {key: found.numbers[key] for key in (*self.task.headline, "activity") if key in found.numbers}

    def rows(self, kinds: Sequence[str], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield a row for the clean network, then one for each kind, severity and seed.

        Raises:
            ValueError: the images have nothing to find.
        """
        clean = self.measure("clean", 0.0, 0)
        for metric in self.task.headline:
            if clean[metric] < 0:
                raise ValueError(f"--images {self.num_images}: {metric} needs something to find in them; take more")
        yield {"run": self.name, "kind": "clean", "severity": 0.0, "seed": None, **clean}
        for kind in kinds:
            for severity in SEVERITIES[kind]:
                for seed in seeds if kind in RANDOM_KINDS else [None]:
                    metrics = self.measure(kind, severity, seed or 0)
                    yield {"run": self.name, "kind": kind, "severity": severity, "seed": seed, **metrics}

    def margins(self, seeds: Sequence[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the rows of "margins" and of "flips", see `study`."""
        sds = SEVERITIES["membrane"]
        with record_margins(self.model, sds, seeds) as found:
            self.task.evaluate(self.model, self.batches, self.dataset, self.accelerator)
        margins, flips = [], []
        for layer, margin in {ALL_LAYERS: sum_margins(found.values()), **found}.items():
            place = {"run": self.name, "layer": layer}
            rates = {key: getattr(margin, key) for key in ("firing_rate", "near_rate", "potential_sd")}
            margins.append({**place, "num_neurons": margin.num_neurons // self.num_images, **rates})
            for sd in sds:
                for seed in seeds:
                    rates = {"flip_rate": margin.flip_rate(sd, seed), "lost_rate": margin.lost_rate(sd, seed)}
                    flips.append({**place, "severity": sd, "seed": seed, **rates})
        return margins, flips


def prepare(run: Run, name: str, *, weights: Weights = "last", num_images: int | None = None) -> Subject:
    """Return a run with its network and its evaluation images.

    Args:
        run: of any task.
        name: how to call it.
        weights: which of its weights.
        num_images: see `read_evaluation_data`; a detector is then asked for their boxes alone.

    Raises:
        FileNotFoundError: no such weights, or data.
        ValueError: there are not as many images, or the weights do not fit.
    """
    task = task_of(run.config)
    model, accelerator = load_for_evaluation(run, weights)
    dataset = read_evaluation_data(run, num_images)
    if num_images is not None and num_images > len(dataset):
        raise ValueError(f"--images {num_images}: there are only {len(dataset)} evaluation images")
    return Subject(name, task, model, accelerator, dataset, task.evaluation_batches(dataset, accelerator))


def open_runs(folders: Sequence[str | Path], *, data_root: str | Path | None = None) -> list[Run]:
    """Return the runs, which must be of one task and have the same evaluation data and precision.

    Raises:
        FileNotFoundError: no such run.
        ValueError: a run given twice, or runs that do not compare.
    """
    runs: list[Run] = []
    for folder in folders:
        run = Run.open(folder, data_root)
        if any(run.folder.resolve() == other.folder.resolve() for other in runs):
            raise ValueError(f"{folder}: given twice")
        run.config.data.root = run.config.data.root.resolve()
        runs.append(run)
    common = _comparable(runs[0].config)
    for run in runs[1:]:
        values = _comparable(run.config)
        for key, value in common.items():
            if key in values and values[key] != value:  # else another one differs, too
                raise ValueError(
                    f"{run.folder}: {key} is {shorten(values[key])}, that of {runs[0].folder} is "
                    f"{shorten(value)}; only runs of the same task, evaluation data and precision compare"
                )
    return runs


def _comparable(config: Recipe) -> dict[str, Any]:
    """Return what two runs must have in common, task first."""
    data = {f"data.{key}": value for key, value in evaluation_data(config).items()}
    return {"task": config.task, **data, "train.precision": config.train.precision}
