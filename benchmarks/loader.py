#!/usr/bin/env python3
"""Does loading hold up training? Images per second of the loader alone and of the training step alone, same recipe."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from common import add_log_option, run_benchmark, synchronise, write_log

from backbones import hoyer_penalty
from detection.cli.common import parse_recipe, recipe_parser
from detection.tasks import task_of
from detection.tasks.base import Task
from detection.tasks.run import make_accelerator
from detection.training.optim import build_optimizer

WARM_UP = 2  # steps


def main() -> None:
    parser = recipe_parser(__doc__)
    parser.add_argument("--batches", type=int, default=40, help="batches to load (default: 40)")
    parser.add_argument("--steps", type=int, default=8, help="training steps to time, after two more (default: 8)")
    add_log_option(parser, "loader", picture=False)
    config, options = parse_recipe(parser)
    set_seed(config.train.seed)
    task, accelerator = task_of(config), make_accelerator(config)
    train = task.read("train")
    task = task.with_classes(train.classes)
    loader = task.training_batches(train, accelerator)
    ahead = 2 * max(1, config.data.workers)
    loading, kept = time_loading(itertools.chain.from_iterable(itertools.repeat(loader)), ahead, options.batches)
    del loader
    training = time_steps(task, kept, options.steps, accelerator)
    result = {
        "loader_images_per_second": round(loading, 2),
        "step_images_per_second": round(training, 2),
        "loader_over_step": round(loading / training, 2),
        "workers": config.data.workers,
        "batch_size": config.train.batch_size,
    }
    print(json.dumps(result, indent=2))
    write_log(options.log, result)


def time_loading(batches: Iterator[Any], ahead: int, number: int) -> tuple[float, list[Any]]:
    """Return images per second, and the first batches, those that the workers had prepared in advance."""
    kept = [next(batches) for _ in range(ahead)]
    started, num_images = time.perf_counter(), 0
    for images, _ in itertools.islice(batches, number):
        num_images += len(images)
    return num_images / (time.perf_counter() - started), kept


def time_steps(task: Task, batches: Sequence[Any], number: int, accelerator: Accelerator) -> float:
    """Return images per second of training steps on batches that are there."""
    config, device = task.config, accelerator.device
    model = task.build_model().to(device).train()
    optimizer = build_optimizer(model, config.optimizer)
    num_images = 0
    for step, batch in enumerate(itertools.islice(itertools.cycle(batches), number + WARM_UP)):
        if step == WARM_UP:
            synchronise(device)
            started, num_images = time.perf_counter(), 0
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            losses = task.losses(model, send_to_device(batch, device))
        loss = sum(losses.values()) + config.hoyer.weight * hoyer_penalty(model, config.hoyer.reduction).to(device)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        num_images += len(batch[0])
    synchronise(device)
    return num_images / (time.perf_counter() - started)


if __name__ == "__main__":
    run_benchmark(main)
