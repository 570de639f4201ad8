"""Evaluate a saved run again, beside its log: accuracy, or COCO's 12 numbers, VOC's AP50 and AP per class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, get_args

from detection.cli.common import check_run, saved_run_parser, show_table
from detection.config.training_sections import Precision

if TYPE_CHECKING:
    from detection.records import Evaluation
    from detection.tasks.base import Task


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Evaluate the run of a command line and print a table of its numbers, now and logged."""
    parser = saved_run_parser(__doc__, prog)
    help = "detectors: new folder for predictions.json (COCO results), metrics.json and pictures"
    parser.add_argument("--save", metavar="FOLDER", help=help)
    help = "of the passes, no: float32; spikes near their threshold depend on it (default: that of the training)"
    parser.add_argument("--precision", choices=get_args(Precision), help=help)
    options = parser.parse_args(arguments)
    check_run(options.run)

    from accelerate import PartialState

    from detection.api import evaluate
    from detection.runs import Run
    from detection.tasks import task_of

    where = {"data_root": options.data_root, "save": options.save}
    found = evaluate(options.run, options.weights, **where, precision=options.precision)
    if not PartialState().is_main_process:  # of several, one tells
        return
    run = Run.open(options.run)
    task, logged = task_of(run.config), found.logged
    pairs = [(key, value, logged.metrics.get(key)) for key, value in found.metrics.items()]
    before = dict(rows(task, logged.evaluation)) if logged.evaluation else {}
    pairs += [(name, value, before.get(name)) for name, value in rows(task, found.evaluation)]
    columns = ("metric", "now", f"logged in epoch {logged.epoch}")
    shown = [(name, show(now), show(then)) for name, now, then in pairs]
    show_table(f"{options.run}, {options.weights} weights", columns, shown)
    last = run.history()[-1].epoch
    if options.weights != "best" and last > logged.epoch:
        print(f"not compared with the log: these weights are of epoch {last}, which was not evaluated")
        return
    different = ", ".join(name for name, now, then in pairs if then not in (None, now))
    print(f"not equal to the log: {different}" if different else "equal to the log in every digit")


def rows(task: Task, evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    """Yield the numbers of an evaluation's tables by name: single ones, then the first metric of each class."""
    for table in sorted(
        evaluation.tables.values(), key=lambda table: any(isinstance(row, dict) for row in table.values())
    ):
        for name, value in table.items():
            if isinstance(value, dict):
                yield f"{task.best_by} {name}", value[task.best_by]
            else:
                yield task.words.get(name, name), value


def show(value: float | None) -> str:
    """Return four digits; COCO's -1, of what has no objects, in words; nothing for a number that is not there."""
    if value is None:
        return ""
    return "no objects" if value == -1 else f"{value:.4f}"
