"""What the benchmarks share: the textbook layer, clocks, memory, the log and the bars.

A log is one JSON object: `command`, `versions`, `machine`, `load` (averages of 1, 5 and 15 minutes), what holds for the
whole run such as `device`, and `rows`, a list with one object per measurement. A row's keys are plain words and its
values numbers and strings, apart from `each_...`, the single measurements behind a median:

    spike_layer  shape, way, seconds, cpu_seconds; `peers` has the versions of other packages, or why one is left out
    training     network, batch, side, width, precision, way, seconds, cpu_seconds, peak_bytes, first_step_seconds
    inference    network, form, batch, threads, milliseconds, images_per_second, times_twin_onnx_float, activity
    evaluation   backend, detecting_seconds, counting_seconds, voc_seconds, writing_seconds, cpu_seconds (of the first
                 two), peak_bytes, before_bytes, AP
    events       events, window, seconds, peak_bytes, before_bytes
    scaling      series, value, way, seconds, cpu_seconds, peak_bytes; of training steps also network, batch, side,
                 width, spike_layers; of `processes` all_reduces and reduced_bytes per step, beside the gradients'
    predict      case, network, images, images_per_second, part, cpu_milliseconds (per image)
    web          run, images, first_answer_seconds, everything_seconds, warm_bytes, end_bytes
    arithmetic   pass, way, seconds, cpu_seconds, peak_bytes
    event_engine part, network, form, threads, milliseconds, times_best_twin_int8, activity, accuracy; of layers: layer,
                 density or form, gmacs; `limits` of the machine

`scaling` has `slopes`, too: series, way, and the exponents `time` (of cpu_seconds) and `memory` of fitted powers of the
value; and `networks`: what several processes exchange of each. `predict` has `before`, the rows of an earlier version.
`ratios`, where a log has them, is such a list, too: what the row belongs to, such as `network` and `precision`, `ours`,
`other` and the quotients `time`, `cpu_time` and, in training, `memory` of their two rows.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: the profiler says on every start that there is no GPU

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from backbones import SpikeLayer
from detection.cli.common import run_verb
from detection.files import write_whole
from detection.runs import command_line, describe_environment


class TextbookFire(torch.autograd.Function):
    """Spikes by masked writing, the surrogate gradient by masked writing into a copy of the gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        spikes = torch.zeros_like(z)
        spikes[z >= threshold] = 1.0
        return spikes

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        gradient = gradient.clone()
        gradient[z <= 0] = 0.0
        gradient[z >= 2] = 0.0
        return 0.5 * gradient, None


class TextbookSpike(nn.Module):
    """The same layer, one extremum per layer, as it is commonly written: a copy, masked writes, H in a pass of its own.

    Attributes:
        penalty: H of the last pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.v_th = nn.Parameter(torch.ones(()))
        self.register_buffer("extremum", torch.ones(()))
        self.penalty: Tensor | None = None

    def forward(self, u: Tensor) -> Tensor:
        z = u / self.v_th.abs()
        clipped = z.detach().clone()
        clipped[clipped < 0.0] = 0.0
        clipped[clipped > 1.0] = 1.0
        extremum = (clipped**2).sum() / clipped.abs().sum()
        self.extremum.mul_(0.9).add_(0.1 * extremum)
        spikes = TextbookFire.apply(z, extremum)
        regularised = z.clone()
        regularised[regularised < 0.0] = 0.0
        regularised[regularised > 1.0] = 1.0
        self.penalty = regularised.abs().sum() ** 2 / (regularised**2).sum()
        return spikes


def use_textbook(model: nn.Module) -> None:
    """Put a `TextbookSpike` in the place of every spike layer."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, SpikeLayer):
                setattr(module, name, TextbookSpike().to(child.v_th.device))


def textbook_penalty(model: nn.Module) -> Tensor:
    """Return the sum of H over the textbook layers."""
    return torch.stack([module.penalty for module in model.modules() if isinstance(module, TextbookSpike)]).sum()


def time_in_turn(
    steps: Mapping[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Return {name: {"seconds": median, "cpu_seconds": median, "each_seconds": one per round, ...}}.

    Every second round runs backwards, and one more before them is not counted. Processor time is that of all threads:
    other work on the machine changes it less. On a GPU it says nothing.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for current in range(rounds + 1):
        for name, step in list(steps.items())[:: 1 if current % 2 else -1]:
            synchronise(device)
            started = time.perf_counter(), time.process_time()
            step()
            synchronise(device)
            if current:
                seconds[name].append(time.perf_counter() - started[0])
                cpu[name].append(time.process_time() - started[1])
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "cpu_seconds": statistics.median(cpu[name]),
            "each_seconds": seconds[name],
            "each_cpu_seconds": cpu[name],
        }
        for name in steps
    }


def ratios_of(rows: Mapping[str, Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return quotients of the rows of two ways, for each pair of which both were measured."""
    keys = {"time": "seconds", "cpu_time": "cpu_seconds", "memory": "peak_bytes"}
    return [
        {"ours": ours, "other": other}
        | {name: rows[ours][key] / rows[other][key] for name, key in keys.items() if key in rows[ours]}
        for ours, other in pairs
        if ours in rows and other in rows
    ]


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Return the most bytes of tensors at one time during `step`, beyond those before it (weights, optimiser's state).

    On a CPU the profiler's record of every allocation and release is added up, which is what CUDA's allocator counts by
    itself. The resident size of the process would be coarser: it depends on what earlier work left with the allocator.
    Memory that oneDNN takes for itself is in neither.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that the clock sees its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows, the first column to the left, the others to the right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=120, highlight=False).print(table)


def add_log_option(parser: argparse.ArgumentParser, name: str, *, picture: bool = True) -> None:
    """Add `--log FILE`, results/benchmarks/NAME.json where the command line gives none."""
    also = ", with a picture of the same name beside it" if picture else ""
    default = Path(__file__).parents[1] / "results" / "benchmarks" / f"{name}.json"
    parser.add_argument(
        "--log", type=Path, default=default, help=f"JSON file to write{also} (default: results/benchmarks/{name}.json)"
    )


def run_benchmark(main: Callable[[], None]) -> None:
    """Call `main`; bad input ends the process with one sentence."""
    run_verb(lambda arguments, prog: main())


def write_log(path: Path, result: Mapping[str, Any]) -> None:
    """Write JSON with the command, the versions, the machine and its load."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    log = {**describe_environment(command_line()).to_json(), "load": load, **result}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(log, indent=2) + "\n").encode())
    print(f"log: {path}")


def plot_bars(path: Path, panels: Mapping[str, Mapping[str, float]], *, columns: int = 2) -> None:
    """Write a PNG with a panel of horizontal bars per title, the value at each."""
    rows = -(-len(panels) // columns)
    height = max(2.6, 0.8 + 0.22 * max(map(len, panels.values())))
    figure, axes = plt.subplots(
        rows, columns, figsize=(6 * columns, height * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, values) in zip(axes.flat, panels.items(), strict=False):
        bars = axis.barh(list(values), list(values.values()), color="#4878a8")
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
