#!/usr/bin/env python3
"""Milliseconds of one spike layer, forward and backward with H: ours, the textbook formulation, ReLU, other packages'.

The ways take turns, the medians count. Compiled ReLU is not always the quicker one: for its gradient the compiler keeps
a mask of bool, which its CPU code is slow with. So ours is compared with eager ReLU, too, alone and behind a BatchNorm,
as in a network.

The neurons of SpikingJelly and snnTorch run as their introductions have them: one time step from the state at rest,
with their surrogate gradients. They do less than ours: no threshold is learned, no extremum and no regulariser is
computed. `pip install hoyer-det[bench]` brings them; without it their rows are left out.

    python benchmarks/spike_layer.py
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from common import (
    TextbookSpike,
    add_log_option,
    plot_bars,
    print_table,
    ratios_of,
    run_benchmark,
    time_in_turn,
    write_log,
)
from torch import nn

from backbones import HoyerSpike, hoyer_penalty

HOYER_WEIGHT = 1e-8
OURS, TEXTBOOK, RELU = "hoyer compiled", "textbook eager", "relu compiled"
BN_OURS, BN_RELU = "BN + hoyer compiled", "BN + relu compiled"
PACKAGES = ("spikingjelly", "snntorch")


class FromRest(nn.Module):
    """A neuron of another package for one time step, its state put at rest before.

    Args:
        neuron: the package's.
        run: `run(neuron, u)` returns the spikes.
    """

    def __init__(self, neuron: nn.Module, run: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.neuron, self.run = neuron, run

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return self.run(self.neuron, u)


def spikingjelly() -> dict[str, Callable[[], nn.Module]]:
    """Return its neurons, by name; ImportError: it is missing, or does not fit these versions of Python and torch."""
    from spikingjelly.activation_based import functional, neuron, surrogate

    def run(cell: Any, u: torch.Tensor) -> torch.Tensor:
        functional.reset_net(cell)
        return cell(u)

    style = {"surrogate_function": surrogate.ATan(), "detach_reset": True}
    return {
        "SpikingJelly IF": lambda: FromRest(neuron.IFNode(**style), run),
        "SpikingJelly LIF": lambda: FromRest(neuron.LIFNode(tau=2.0, **style), run),
    }


def snntorch() -> dict[str, Callable[[], nn.Module]]:
    """Return its neuron, by name; ImportError: it is missing, or does not fit these versions of Python and torch."""
    import snntorch as snn

    def leaky() -> nn.Module:
        cell = snn.Leaky(beta=0.9, spike_grad=snn.surrogate.fast_sigmoid(slope=25))
        return FromRest(cell, lambda cell, u: cell(u, cell.init_leaky())[0])

    return {"snnTorch Leaky": leaky}


def find_peers() -> tuple[dict[str, Callable[[], nn.Module]], dict[str, str]]:
    """Return what makes each neuron of other packages, and the packages' versions; say which cannot be imported."""
    makers, versions = {}, {}
    for package, read in zip(PACKAGES, (spikingjelly, snntorch), strict=True):
        try:
            with warnings.catch_warnings(action="ignore"):
                makers |= read()
            versions[package] = metadata.version(package)
        except Exception as error:  # a package that does not fit may fail in any way
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"{package}: left out, it cannot be imported ({reason}); pip install hoyer-det[bench] brings it")
            versions[package] = f"not imported: {reason}"
    return makers, versions


def check_peers(makers: dict[str, Callable[[], nn.Module]]) -> None:
    """Each neuron fires where its potential, after one step from rest, passes 1, and has a gradient."""
    torch.manual_seed(0)
    u = torch.randn(2, 3, 8, 8, requires_grad=True)
    for name, make in makers.items():
        spikes = make()(u)
        inputs = u / 2 if name == "SpikingJelly LIF" else u  # the input decays with the potential, by 1 / tau
        torch.testing.assert_close(spikes, (inputs >= 1).float())
        assert torch.autograd.grad(spikes.sum(), u)[0].any(), name


def make_step(model: nn.Module, u: torch.Tensor, upstream: torch.Tensor, *, compiled: bool) -> Callable[[], None]:
    """One forward and backward pass."""
    if compiled:
        model.compile(fullgraph=True)

    def step() -> None:
        u.grad = None
        model.zero_grad()
        out = model(u)
        loss = (out * upstream).sum()
        textbook = [module.penalty for module in model.modules() if isinstance(module, TextbookSpike)]
        loss = loss + HOYER_WEIGHT * (torch.stack(textbook).sum() if textbook else hoyer_penalty(model).to(u.device))
        loss.backward()

    return step


def check(channels: int) -> None:
    """Ours and the textbook's give the same spikes, H and gradients; else times would compare different things."""
    torch.manual_seed(0)
    u = torch.randn(2, channels, 8, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(u)
    found = []
    for layer in (HoyerSpike(channels).double(), TextbookSpike().double()):
        out = layer(u)
        penalty = layer.penalty if isinstance(layer, TextbookSpike) else hoyer_penalty(layer)
        found.append((out, penalty, *torch.autograd.grad((out * upstream).sum() + penalty, [u, layer.v_th])))
    torch.testing.assert_close(*found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["64x64x32x32", "16x64x56x56"], metavar="NxCxHxW", help="of the potential"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=21, help="passes of each, in turn (default: 21)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_log_option(parser, "spike_layer")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    shapes = [parse_shape(parser, text) for text in options.shapes]
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    makers, peers = find_peers()
    check(8)
    check_peers(makers)
    rows, ratios, panels = [], [], {}
    for text, shape in zip(options.shapes, shapes, strict=True):
        torch.manual_seed(0)
        u = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        upstream = torch.randn(shape, device=device, dtype=dtype)
        channels = shape[1]
        ways = {
            "hoyer eager": (HoyerSpike(channels), False),
            OURS: (HoyerSpike(channels), True),
            TEXTBOOK: (TextbookSpike(), False),
            "relu eager": (nn.ReLU(), False),
            RELU: (nn.ReLU(), True),
            "BN + hoyer eager": (nn.Sequential(nn.BatchNorm2d(channels), HoyerSpike(channels)), False),
            BN_OURS: (nn.Sequential(nn.BatchNorm2d(channels), HoyerSpike(channels)), True),
            "BN + relu eager": (nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()), False),
            BN_RELU: (nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()), True),
        }
        for name, make in makers.items():
            ways |= {f"{name} eager": (make(), False), f"{name} compiled": (make(), True)}
        torch.compiler.reset()
        steps = {
            name: make_step(model.to(device, dtype), u, upstream, compiled=compiled)
            for name, (model, compiled) in ways.items()
        }
        found = time_in_turn(steps, options.rounds, device)
        rows += [{"shape": text, "way": way, **row} for way, row in found.items()]
        pairs = [
            (TEXTBOOK, OURS),
            (OURS, RELU),
            (OURS, "relu eager"),
            ("hoyer eager", "relu eager"),
            (BN_OURS, BN_RELU),
            (BN_OURS, "BN + relu eager"),
            ("BN + hoyer eager", "BN + relu eager"),
            *((f"hoyer {how}", f"{name} {how}") for name in makers for how in ("compiled", "eager")),
        ]
        quotients = ratios_of(found, pairs)
        ratios += [{"shape": text, **quotient} for quotient in quotients]
        milliseconds = {way: 1e3 * row["seconds"] for way, row in found.items()}
        panels[f"{text} {options.dtype}, ms"] = milliseconds
        table = [[way, f"{value:.2f}", f"{value / milliseconds[RELU]:.2f}"] for way, value in milliseconds.items()]
        print_table(f"{text} {options.dtype} on {device}", ["way", "ms", "/ relu compiled"], table)
        for each in quotients:
            print(f"{each['ours']} / {each['other']}: {each['time']:.2f}")
    write_log(
        options.log, {"device": str(device), "dtype": options.dtype, "peers": peers, "rows": rows, "ratios": ratios}
    )
    plot_bars(options.log.with_suffix(".png"), panels)


def parse_shape(parser: argparse.ArgumentParser, text: str) -> tuple[int, ...]:
    """Four numbers, or the end with a sentence."""
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        parser.error(f"--shapes {text}: four positive numbers such as 64x64x32x32 are needed")
    return tuple(int(part) for part in parts)


if __name__ == "__main__":
    run_benchmark(main)
