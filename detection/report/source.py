"""All that is known about a run: its log, and what one more evaluation adds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from backbones import HOROWITZ_45NM
from detection.analysis import analyze_run
from detection.records import EpochLog, RunInfo
from detection.runs import Run, Weights
from detection.sections import Examination
from detection.tasks import task_of
from detection.tasks.base import Task
from detection.tasks.run import load_for_evaluation, read_evaluation_data


@dataclass(frozen=True)
class Source:
    """All that is known about a run.

    Attributes:
        run: its folder and recipe.
        task: of the recipe.
        log: its epochs, at least one.
        info: run.json.
        weights: those that the numbers belong to.
        line: of the log, with the metrics of these weights; None before the first evaluation.
        analysis: `Analysis.to_dict()`: energy and certificate.
        found: an evaluation of the weights.
        missing: why there is no "analysis" or no "evaluation", a sentence each.
    """

    run: Run
    task: Task
    log: list[EpochLog]
    info: RunInfo
    weights: Weights
    line: EpochLog | None
    analysis: dict[str, Any] | None = None
    found: Examination | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


def read_source(folder: str | Path, weights: Weights) -> Source:
    """Return recipe, log and run.json of a run.

    Raises:
        FileNotFoundError: no such run, no finished epoch, or no log of such weights.
        ValueError: a file is damaged; names it, and the line of the log.
    """
    run = Run.open(folder)
    task, log = task_of(run.config), run.history()
    evaluated = any(task.best_by in line.metrics for line in log)
    line = run.logged(weights, task.best_by) if evaluated else None
    missing = dict.fromkeys(("analysis", "evaluation"), "This page was made from the log alone.")
    return Source(run, task, log, run.info(), weights, line, missing=missing)


def complete(source: Source, num_images: int, data_root: Path | None) -> Source:
    """Return `source` with analysis and evaluation where they can be had, and with the reason where they cannot.

    Args:
        source: the run.
        num_images: best and worst images to show, so many each.
        data_root: where the evaluation data are; they must be there. None: where the recipe says.

    Raises:
        ValueError: the weights are damaged, not finite, or not those of run.json.
    """
    run, weights = source.run, source.weights
    stored = read_analysis(run, weights)
    path = run.folder / f"{weights}.safetensors"
    if not path.is_file():
        missing = dict.fromkeys(source.missing, f"The weights, {path.name}, are not in the run folder.")
        return replace(source, analysis=stored, missing=missing)
    run.read(weights)
    steps = {
        "evaluation": lambda: examine(Run.open(run.folder, data_root), weights, num_images),
        "analysis": lambda: stored or analyze_run(run.folder, weights, data_root=data_root).to_dict(),
    }
    found, missing = {}, {}
    for name, compute in steps.items():
        try:
            found[name] = compute()
        except (OSError, ValueError, ImportError) as error:
            if data_root is not None:
                raise
            missing[name] = f"It could not be computed: {' '.join(str(error).split())}."
    return replace(source, analysis=found.get("analysis"), found=found.get("evaluation"), missing=missing)


def read_analysis(run: Run, weights: Weights) -> dict[str, Any] | None:
    """Return the analysis stored among a run's products; None if there is none of these weights as they are now.

    Raises:
        ValueError: the file is damaged.
    """
    name = "analysis" if weights == "last" else f"analysis_{weights}"
    path, file = run.products / name / "analysis.json", run.folder / f"{weights}.safetensors"
    if not path.is_file() or (file.is_file() and file.stat().st_mtime > path.stat().st_mtime):
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        whole = stored.keys() >= {"networks", "ratios", "layers", "certificate", "costs", "num_images"}
        usual = whole and (stored["weights"], stored["costs"]) == (weights, asdict(HOROWITZ_45NM))
        return stored if usual else None  # else an earlier version's, or of other prices
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); remove it, and it is computed again") from None


def examine(run: Run, weights: Weights, num_images: int) -> Examination:
    """Return an evaluation of saved weights on the run's evaluation data, with what the page shows of it.

    Raises:
        FileNotFoundError: no such weights, or data.
        ValueError: the weights or the data are damaged.
    """
    task, dataset = task_of(run.config), read_evaluation_data(run)
    model, accelerator = load_for_evaluation(run, weights)
    batches = task.evaluation_batches(dataset, accelerator)
    return task.examine(model, dataset, batches, accelerator, num_images)
