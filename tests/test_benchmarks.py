"""The benchmarks' own arithmetic: clocks, fits, what is left out, and the projection to many GPUs."""

import json
import runpy
import sys
import time

import pytest
import torch
from helpers import ROOT

MIB = 2**20


@pytest.fixture
def script(monkeypatch):
    """The names of a script of benchmarks/ or results/."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return lambda name: runpy.run_path(str(ROOT / f"{name}.py"))


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class Work:
    def outer(self) -> str:
        burn(0.02)
        self.inner()
        burn(0.02)
        return "done"

    def inner(self) -> None:
        burn(0.06)


def test_a_part_of_a_prediction_counts_without_the_parts_that_it_calls(script):
    before = Work.outer, Work.inner
    started = time.process_time()
    clock = script("benchmarks/predict")["Clock"]()
    clock.watch(Work, "outer", "draw")
    clock.watch(Work, "inner", "network")
    assert Work().outer() == "done"
    burn(0.03)
    clock.close()
    whole = time.process_time() - started
    assert (Work.outer, Work.inner) == before
    assert clock.seconds["draw"] == pytest.approx(0.04, abs=0.01)
    assert clock.seconds["network"] == pytest.approx(0.06, abs=0.01)
    assert clock.seconds["everything else"] == pytest.approx(0.03, abs=0.01)
    assert sum(clock.seconds.values()) <= whole


def test_the_parts_of_a_prediction_are_those_of_the_command(script, tmp_path, monkeypatch):
    """Of two drawn scenes: every part is there, drawing and writing too, and the command's files are."""
    names = script("benchmarks/predict")
    images = tmp_path / "images"
    scene = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
    images.mkdir()
    for name in ("a.png", "b.png"):
        names["Image"].fromarray(scene).save(images / name)
    seconds, parts = names["run"]("zoo:cifar10_vgg11", images, tmp_path / "out", ())
    assert set(parts) == {"decode", "resize", "network", "draw", "encode and write", "results", "everything else"}
    assert min(parts.values()) > 0 and seconds > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.png",
        "b.png",
        "images.json",
        "predictions.json",
    ]


def test_exponents_are_those_of_the_powers(script):
    fit = script("benchmarks/scaling")["fit"]
    rows = [
        {"series": "batch", "way": way, "value": x, "cpu_seconds": 3 * x**power, "peak_bytes": 5 * x**0.5}
        for way, power in (("hoyer", 1), ("twin", 2))
        for x in (4, 8, 32)
    ]
    alone = {"series": "width", "way": "twin", "value": 1, "cpu_seconds": 1, "peak_bytes": 1}
    assert fit([*rows, alone]) == [
        {"series": "batch", "way": "hoyer", "time": 1.0, "memory": 0.5},
        {"series": "batch", "way": "twin", "time": 2.0, "memory": 0.5},
    ]


def test_a_package_that_is_missing_is_left_out_with_a_sentence(script, monkeypatch, capsys):
    for name in ("spikingjelly", "spikingjelly.activation_based", "snntorch"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    makers, versions = script("benchmarks/spike_layer")["find_peers"]()
    assert makers == {} and set(versions) == {"spikingjelly", "snntorch"}
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["spikingjelly", "snntorch"]
    assert all("left out" in line and "pip install hoyer-det[bench]" in line for line in said)


def test_other_packages_neurons_fire_where_their_potential_passes_1(script):
    for package in ("snntorch", "spikingjelly"):
        pytest.importorskip(package)
    names = script("benchmarks/spike_layer")
    makers, versions = names["find_peers"]()
    assert list(makers) == ["SpikingJelly IF", "SpikingJelly LIF", "snnTorch Leaky"] and len(versions) == 2
    names["check_peers"](makers)
    neuron = makers["SpikingJelly IF"]()
    u = torch.tensor([0.7, 1.2])
    assert neuron(u).tolist() == neuron(u).tolist() == [0.0, 1.0]  # no potential is kept


def test_the_projection_is_the_formula_of_the_page(script):
    """By hand: 100 MiB in 4 buckets, a step of 0.1 s, 2 GPUs, 200 GB/s, 10 microseconds."""
    names = script("results/tables")
    assert names["all_reduce"](200e9, 2) == pytest.approx(1 + 20e-6)
    assert names["all_reduce"](25e9, 16) == pytest.approx(2 * 15 / 16 + 80e-6)
    assert names["all_reduce"](0, 512) == pytest.approx(18 * 10e-6)
    network = {"gradient_bytes": 100 * MIB, "spike_layers": 10, "batch_norms": 5, "batch_norm_channels": 500}
    gradients, moments, norms = names["step_among"](0.1, network, 2)
    bucket = 25 * MIB / 200e9 + 20e-6  # hidden but for the last one: 4 of them take 0.6 ms, the backward pass 67
    assert gradients == pytest.approx(0.1 + bucket)
    assert moments - gradients == pytest.approx(10 * (12 / 200e9 + 20e-6))
    assert norms - moments == pytest.approx(5 * (800 / 200e9 + 10e-6 + 800 / 200e9 + 20e-6))
    short = names["step_among"](0.0004, network, 2)[0]  # a step of 0.4 ms hides half of that
    assert short == pytest.approx(0.0004 + 4 * bucket - 2 / 3 * 0.0004 * 3 / 4)


def test_tables_of_predictions_and_of_growth_are_those_of_the_logs(script):
    names = script("results/tables")
    rows = [
        {"case": "A", "part": part, "cpu_milliseconds": value, "images_per_second": 12.34}
        for part, value in (("decode", 1.25), ("draw", 30.0))
    ]
    before = [dict(row, cpu_milliseconds=2 * row["cpu_milliseconds"], images_per_second=5.0) for row in rows]
    lines = names["predict_table"]({"rows": rows, "before": before}).splitlines()
    assert lines[0] == "|  | decode | draw | all | images/s |"
    assert lines[2:] == ["| A, before | 2.5 | 60.0 | 62.5 | 5.0 |", "| A, now | 1.2 | 30.0 | 31.2 | 12.3 |"]
    log = json.loads((ROOT / "results" / "benchmarks" / "scaling.json").read_text())
    table = names["exponents_table"](log)
    assert table.count("\n") == len(log["slopes"]) + 2 and "images evaluated: 1000 to 8000 | pycocotools" in table
