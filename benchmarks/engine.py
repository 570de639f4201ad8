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
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from common import add_log_option, write_log

from detection import engine
from detection.checkpoint import Run, command_line
from detection.cli import parse_recipe, recipe_parser, run_tool
from detection.models import build_detector
from detection.resume import Progress
from detection.tasks import make_accelerator


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
        """The time once the device is done with all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its calls timed."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            result = function(*args, **kwargs)
            self.seconds[name].append(self.now() - started)
            return result

        return call

    def total(self) -> float:
        """Of all parts together."""
        return sum(map(sum, self.seconds.values()))


def main() -> None:
    parser = recipe_parser(__doc__)
    parser.add_argument("--steps", type=int, default=12, help="training steps to time, after two more (default: 12)")
    parser.add_argument("--epoch-steps", type=int, default=37, help="steps of an epoch, for the shares (default: 37)")
    add_log_option(parser, "engine", picture=False)
    config, options = parse_recipe(parser, sys.argv[1:])
    minutes = config.train.save_minutes
    config.data.classes = config.data.classes or ["object"]
    config.train.epochs, config.train.save_steps = 1, 2
    config.train.ema_decay = config.train.ema_decay or 0.999
    set_seed(config.train.seed)
    accelerator = make_accelerator(config)
    watch = Stopwatch(accelerator.device)
    average_weights = engine.average_weights

    def timed_average(*args: Any) -> Any:
        average = average_weights(*args)
        average.update_parameters = watch.on("averaging", average.update_parameters)
        return average

    engine.average_weights = timed_average
    engine.describe_epoch = watch.on("end of epoch", engine.describe_epoch)
    engine.Training.save = watch.on("state", engine.Training.save)
    Progress.count = watch.on("counting", Progress.count)
    Run.save, Run.log = watch.on("weights", Run.save), watch.on("end of epoch", Run.log)
    starts: list[tuple[float, float]] = []  # of each step, and of what the parts had taken until then

    def compute_losses(model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        starts.append((watch.now(), watch.total()))
        return model(*batch)

    batches = RandomScenes(options.steps + 3, config.train.batch_size, config.model.min_size[-1], config.model.max_size)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", config, command_line())
        engine.fit(
            build_detector(config),
            batches,
            compute_losses=compute_losses,
            evaluate=lambda model: {"AP": 0.0},
            best_by="AP",
            config=config,
            run=run,
            accelerator=accelerator,
        )
        size = (run.folder / "state.safetensors").stat().st_size / 2**20
    step = statistics.median(
        (later - earlier) - (later_parts - earlier_parts)
        for (earlier, earlier_parts), (later, later_parts) in itertools.pairwise(starts[2:])
    )
    seconds = watch.seconds
    each = {
        # medians, and how often a step has them
        "averaged weights": statistics.median(seconds["averaging"]),
        "losses and H per layer": sum(seconds["counting"]) / len(batches),
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


if __name__ == "__main__":
    run_tool(main)
