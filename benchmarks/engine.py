#!/usr/bin/env python3
"""What the training loop costs beside the training: saved states, averaged weights, logging, as shares of a step.

Trains the network of a recipe on random images by the loop itself, as long as needed for the given number of steps, and
times the parts of the loop from inside, so that each share belongs to the very steps that it is compared with:

    python benchmarks/engine.py configs/bccd_retinanet_resnet18.yaml

States are written every `train.save_minutes`, weights and log once an epoch: their times are spread over as many steps
as fit in between. `--epoch-steps` is the length of an epoch.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import add_log_option, run_benchmark, synchronise, write_log

from detection.cli.common import parse_recipe, recipe_parser
from detection.config import Recipe
from detection.records import Evaluation
from detection.runs import Run, command_line, describe_environment
from detection.tasks import task_of
from detection.tasks.run import make_accelerator
from detection.training import checkpoint
from detection.training import trainer as trainers
from detection.training.checkpoint import Progress
from detection.training.trainer import Trainer

EXTRA = 3  # steps at the beginning and the end that are not timed


class RandomScenes:
    """Batches of random images, each with one object, by the loop's contract."""

    def __init__(self, number: int, batch_size: int, height: int, width: int) -> None:
        self.number = number
        self.batch = ([torch.rand(3, height, width) for _ in range(batch_size)], [])
        for index in range(batch_size):
            box = torch.tensor([[0.2 * width, 0.2 * height, 0.6 * width, 0.7 * height]])
            self.batch[1].append({"boxes": box, "labels": torch.ones(1, dtype=torch.long), "image_id": index})

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        self.first = first

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Any:
        return (self.batch for _ in range(self.first, self.number))


class Stopwatch:
    """Seconds of each part of the loop, by name, in the order of the calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def now(self) -> float:
        """Return the time once the device is done with all that it was given."""
        synchronise(self.device)
        return time.perf_counter()

    def on(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, its calls timed."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            result = function(*args, **kwargs)
            self.seconds[name].append(self.now() - started)
            return result

        return call

    def total(self) -> float:
        """Return the seconds of all parts together."""
        return sum(map(sum, self.seconds.values()))


def main() -> None:
    parser = recipe_parser(__doc__)
    parser.add_argument("--steps", type=int, default=12, help="training steps to time, after two more (default: 12)")
    parser.add_argument("--epoch-steps", type=int, default=37, help="steps of an epoch, for the shares (default: 37)")
    add_log_option(parser, "engine", picture=False)
    config, options = parse_recipe(parser)
    minutes = config.train.save_minutes
    config.data.classes = config.data.classes or ["object"]
    config.train.epochs, config.train.save_steps = 1, 2
    config.train.ema_decay = config.train.ema_decay or 0.999
    set_seed(config.train.seed)
    accelerator = make_accelerator(config)
    watch = Stopwatch(accelerator.device)
    step, size = time_training(config, options.steps, accelerator, watch)
    seconds = watch.seconds
    each = {
        # medians, and how often a step has them
        "averaged weights": statistics.median(seconds["averaging"]),
        "losses and H per layer": sum(seconds["counting"]) / (options.steps + EXTRA),
        "state": statistics.median(seconds["state"]) * step / (60 * minutes) if minutes else 0.0,
        "weights, log": (sum(seconds["weights"]) + sum(seconds["end of epoch"])) / options.epoch_steps,
    }
    shares = {name: value / step for name, value in each.items()}
    shares["together"] = sum(shares.values())
    print(f"step {step:.3f} s; state {size:.1f} MiB, written in {statistics.median(seconds['state']):.3f} s")
    for name, share in shares.items():
        print(f"{name}: {share:.2%} of a step")
    result = {"step_seconds": step, "state_mebibytes": size, "epoch_steps": options.epoch_steps}
    result |= {"save_minutes": minutes, "shares": shares, "seconds": seconds}
    write_log(options.log, result)


def time_training(config: Recipe, num_steps: int, accelerator: Accelerator, watch: Stopwatch) -> tuple[float, float]:
    """Return the seconds of a step without the parts on the watch, and the size of a state in MiB."""
    task = task_of(config)
    Trainer.describe_epoch = watch.on("end of epoch", Trainer.describe_epoch)
    trainers.save = watch.on("state", trainers.save)
    Progress.count = watch.on("counting", Progress.count)
    Run.save, Run.log = watch.on("weights", Run.save), watch.on("end of epoch", Run.log)
    starts: list[tuple[float, float]] = []  # of each step, and of what the parts had taken until then

    def losses(model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        starts.append((watch.now(), watch.total()))
        return task.losses(model, batch)

    nothing = Evaluation(metrics=dict.fromkeys((*task.headline, task.best_by), 0.0))
    size = config.model.min_size[-1], config.model.max_size
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            task.build_model(),
            RandomScenes(num_steps + EXTRA, config.train.batch_size, *size),
            losses=losses,
            evaluate=lambda model: nothing,
            goal=task,
            config=config,
            run=Run.create(Path(folder) / "run", config, describe_environment(command_line())),
            accelerator=accelerator,
        )
        trainer.average.update_parameters = watch.on("averaging", trainer.average.update_parameters)
        trainer.fit()
        mebibytes = (trainer.run.folder / checkpoint.FILE).stat().st_size / 2**20
    seconds = [
        (later - earlier) - (later_parts - earlier_parts)
        for (earlier, earlier_parts), (later, later_parts) in itertools.pairwise(starts[2:])
    ]
    return statistics.median(seconds), mebibytes


if __name__ == "__main__":
    run_benchmark(main)
