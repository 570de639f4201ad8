#!/usr/bin/env python3
"""What does the analysis cost? Seconds of a plain evaluation and of one with every layer counted, same images.

The ratio is that of processor time, which other work on the machine hardly changes: use --data.workers 0, since loader
processes are not in it. Times by the clock stand beside it.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.utils import send_to_device, set_seed
from common import add_log_option, run_benchmark, write_log

from backbones import Certificate, certify, record_layers
from detection.cli.common import parse_recipe, recipe_parser
from detection.tasks import task_of
from detection.tasks.base import Task
from detection.tasks.run import make_accelerator

SETTLING = 5  # batches


def main() -> None:
    parser = recipe_parser(__doc__)
    parser.add_argument("--images", type=int, help="first so many evaluation images (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="of each of the two (default: 3)")
    add_log_option(parser, "analysis", picture=False)
    config, options = parse_recipe(parser)
    set_seed(config.train.seed)
    task = task_of(config)
    task = task.with_classes(task.read("train").classes)
    val = task.read("val")
    val = val.choose(range(len(val))[: options.images])
    accelerator = make_accelerator(config)
    model = accelerator.unwrap_model(accelerator.prepare(task.build_model()))
    batches = task.evaluation_batches(val, accelerator)
    settle(task, model, batches, accelerator.device)
    certificates: list[Certificate] = []

    def plain() -> None:
        task.evaluate(model, batches, val, accelerator)

    def analysis() -> None:
        with record_layers(model) as measured:
            plain()
        certificates.append(certify(measured, task.analogue_parts(model)))

    result = {
        "num_images": len(val),
        **compare(plain, analysis, options.repeats),
        "binary": certificates[-1].is_binary,
    }
    print(json.dumps(result, indent=2))
    write_log(options.log, result)


@torch.no_grad()
def settle(task: Task, model: torch.nn.Module, batches: Iterable[Any], device: torch.device) -> None:
    """Set the running averages of random weights: without them hardly a neuron would fire."""
    model.train()
    for batch in itertools.islice(batches, SETTLING):
        task.losses(model, send_to_device(batch, device))
    model.eval()


def compare(plain: Callable[[], None], analysis: Callable[[], None], repeats: int) -> dict[str, Any]:
    """Return processor time and time by the clock of both, which take turns."""
    cpu: dict[str, list[float]] = {"plain": [], "analysis": []}
    clock: dict[str, list[float]] = {"plain": [], "analysis": []}
    plain()  # warms caches up
    for repeat in range(repeats):
        pair = [("plain", plain), ("analysis", analysis)]
        for name, function in pair if repeat % 2 == 0 else reversed(pair):
            started = time.process_time(), time.perf_counter()
            function()
            cpu[name].append(round(time.process_time() - started[0], 3))
            clock[name].append(round(time.perf_counter() - started[1], 3))
    medians = {name: statistics.median(values) for name, values in cpu.items()}
    return {
        "plain_cpu_seconds": medians["plain"],
        "analysis_cpu_seconds": medians["analysis"],
        "analysis_over_plain": round(medians["analysis"] / medians["plain"], 3),
        "all_cpu_seconds": cpu,
        "all_clock_seconds": clock,
    }


if __name__ == "__main__":
    run_benchmark(main)
