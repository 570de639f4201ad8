"""The event-driven engine: whole networks give what they give in integers, bit for bit; its files, and their use."""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import run_tool
from PIL import Image
from test_event_kernels import KERNELS, threads
from test_export import CLASSIFIER, DETECTOR, error_of, make_run, with_log
from test_fold import classifier, detector, scramble
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves as leaves

import backbones
import detection
from backbones.deploy.events import (
    Bits,
    Comparison,
    Engine,
    EventLayer,
    Program,
    Window,
    engine,
    from_bytes,
    library,
    to_bytes,
    to_program,
    using,
)
from backbones.deploy.fold import ChannelThreshold, fold, module_of
from backbones.deploy.integer import IntegerSpikes, to_integers
from detection.cli import main
from detection.evaluation import METRICS
from detection.exporters import evaluate_file, export_run
from detection.exporters.inference import EventsFile
from detection.models.dense import DensePredictions
from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.evaluate import evaluate_run
from detection.tasks.run import load_model


def integers_of(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """Return a network of integers in the order N, H, W, C."""
    network = to_integers(fold(model), images, exact=True)
    return network.to(memory_format=torch.channels_last)


class Recorder(fx.Interpreter):
    """All that a network computes, by the names of its nodes."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value.clone() if isinstance(value, Tensor) else value  # a ReLU may change it in place
        return value


@torch.no_grad()
def run_reference(network: fx.GraphModule, images: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    recorder = Recorder(network)
    outputs = leaves(recorder.run(images.contiguous(memory_format=torch.channels_last)))
    return outputs, recorder.values


def run_recorded(ours: Engine, images: Tensor) -> tuple[list[Tensor], dict[str, Tensor | Bits]]:
    """Return the outputs, and what enters each operation, by name."""
    entered: dict[str, Tensor | Bits] = {}
    outputs = ours(images, observe=lambda op, values: entered.update(zip(op["inputs"], values, strict=True)))
    return outputs, entered


def same(found: Tensor | Bits, expected: Tensor) -> bool:
    if not isinstance(found, Bits):
        return torch.equal(found, expected)
    expected = expected if expected.dim() == 4 else expected[..., None, None]
    return torch.equal(found.words, Bits.pack(expected).words)


def check(network: fx.GraphModule, batches: Sequence[Tensor]) -> Program:
    """Compare the engine by every kernel with the network, layer by layer; return the program, read from a file."""
    program, description = from_bytes(to_bytes(to_program(network), {"n": 1}), "net.events")
    assert description == {"n": 1}
    ours = Engine(program)
    for images in batches:
        expected, values = run_reference(network, images)
        for name in KERNELS:
            with using(name):
                outputs, entered = run_recorded(ours, images)
            assert all(map(torch.equal, outputs, expected)) and len(outputs) == len(expected)
            flat = {each["outputs"][0] for each in program.operations if each["op"] == "flatten_bits"}
            seen = entered.keys() & values.keys() - flat
            assert all(same(entered[key], values[key]) for key in seen) and len(seen) >= 0.6 * len(entered)
    layers = [n for n in network.graph.nodes if isinstance(module_of(network, n), (ChannelThreshold, IntegerSpikes))]
    assert 0.02 < torch.cat([values[n.name].flatten() for n in layers]).mean() < 0.9 and len(layers) > 3
    return program


# --- networks ---------------------------------------------------------------------------------------------------------

NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("vgg11", {}),
    ("vgg11", {"pool_first": False, "head": "normalised"}),
    ("vgg16", {"head": "pooled", "width": 0.2}),
    ("resnet18", {}),
    ("resnet18", {"shortcut": "real", "pool_first": False}),
    ("resnet18", {"norm_first": True, "stem": "imagenet"}),
    ("resnet18", {"shortcut": "real", "norm_first": True, "extremum": "channel"}),
    ("resnet18", {"shortcut": "real", "thresholds": 2}),
    ("resnet50", {}),
    ("resnet50", {"pool_first": False, "stem": "imagenet"}),
    ("mobilenetv1", {}),
    ("mobilenetv2", {"stem": "imagenet"}),
    ("mobilenetv2", {"width": 0.35}),
]


@pytest.mark.parametrize(("name", "options"), NETWORKS, ids=lambda value: str(value))
def test_a_network_is_that_of_integers(name, options):
    generator = torch.Generator().manual_seed(0)
    free = name[:3] != "vgg" or options.get("head") == "pooled"
    side = 64 if options.get("stem") == "imagenet" else 32
    images = torch.randn(16, 3, side, side, generator=generator)
    network = integers_of(classifier(name, **options), images)
    other = torch.randn(3, 3, side + 13, side + 5, generator=generator)
    program = check(network, [images[:1], other if free else images[:3]])
    kinds = [each["op"] for each in program.operations]
    assert kinds.count("layer") > 7 and kinds.count("stem") == 1 and "conv2d" not in kinds
    assert any(key.startswith(("turned", "inverted")) for each in program.operations for key in each["tensors"])


@pytest.mark.parametrize(
    ("kind", "body", "model"),
    [
        ("retinanet", "resnet18", {}),
        ("fcos", "vgg11", {}),
        ("fcos", "mobilenetv2", {"neck": {"out_channels": 16}, "head": {"num_convs": 1}}),
        ("retinanet", "resnet18", {"neck": {"out_channels": 16}, "head": {"num_convs": 1, "norm": "group"}}),
        ("retinanet", "resnet18", {"neck": {"out_channels": 16, "source": "membrane", "spiking": True}}),
        ("ssd", "mobilenetv1", {}),
        ("ssd", "vgg11", {"neck": {"out_channels": 16, "source": "membrane"}}),
    ],
)
def test_a_detector_is_that_of_integers(kind, body, model):
    generator = torch.Generator().manual_seed(0)
    dense = DensePredictions(detector(kind, backbone={"name": body, "width": 0.125}, **model))
    images = torch.rand(4, 3, 64, 64, generator=generator)
    other = torch.rand(3, 3, 71, 97, generator=generator)
    check(integers_of(dense, images), [images[:1], other])


def test_layers_that_share_their_weights_are_one():
    """Two towers behind one pyramid's convolutions, one of which falls where the other rises."""
    torch.manual_seed(0)

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv = nn.Conv2d(3, 70, 3, padding=1), nn.Conv2d(70, 9, 3, padding=1)
            self.spike = backbones.HoyerSpike(70)
            self.norms = nn.ModuleList(nn.BatchNorm2d(9) for _ in range(3))
            self.spikes = nn.ModuleList(backbones.HoyerSpike(9) for _ in range(3))
            self.heads = nn.ModuleList(nn.Conv2d(9, 2, 1) for _ in range(3))

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.conv(self.spike(self.first(x)))
            branches = zip(self.norms, self.spikes, self.heads, strict=True)
            return [head(spike(norm(x))) for norm, spike, head in branches]

    images = torch.randn(16, 3, 9, 7)
    program = check(integers_of(scramble(Towers(), 1), images), [images[:1], images[:3]])
    counts = [len(each["outputs"]) for each in program.operations if each["op"] == "layer"]
    assert counts == [3, 1, 1, 1]


def test_what_the_engine_would_compute_otherwise_is_refused():
    class Last(nn.Module):
        def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.compute = compute

        def forward(self, x: Tensor) -> Tensor:
            return self.compute(x)

    images = torch.rand(16, 3, 8, 8)
    parts = [nn.Conv2d(3, 8, 3, padding=1), backbones.HoyerSpike(8), nn.Conv2d(8, 8, 3, padding=1)]
    for last, message in (
        (nn.AvgPool2d(2, divisor_override=1), "3: .* no divisor or last dimension of one's own: AvgPool2d"),
        (nn.Flatten(1, 2), "3: .* no divisor or last dimension of one's own: Flatten"),
        (nn.Sequential(backbones.HoyerSpike(8), nn.Flatten(2)), r"3\.1: .* no Flatten\(start_dim=2"),
        (nn.BatchNorm2d(8, track_running_stats=False), "3: .* no layer BatchNorm2d"),
        (Last(lambda x: x * x.shape[2]), "no number that depends on a map's size"),
        (Last(lambda x: torch.cat(tensors=[x, x])), "of named arguments alone"),
        (Last(lambda x: x.permute(dims=(0, 2, 3, 1))), "permute: .* no method permute"),
    ):
        with pytest.raises(ValueError, match=message):
            to_program(integers_of(nn.Sequential(*parts, last).eval(), images))
    network = integers_of(nn.Sequential(*parts, nn.GroupNorm(2, 8, affine=False)).eval(), images)
    torch.testing.assert_close(Engine(to_program(network))(images)[0], network(images))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content() -> bytes:
    """A file of a small network."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = integers_of(classifier("resnet18", width=0.0625), images)
    return to_bytes(to_program(network), {"classes": ["circle", "square"]})


def refuses(content: bytes) -> str:
    """The sentence with which a content is refused, which begins with the name of the file."""
    with pytest.raises(ValueError, match=r"\Anet\.events: ") as error:
        from_bytes(content, "net.events")
    return str(error.value)


def test_a_flipped_bit_is_found(content, attempt):
    """Anywhere in the file: in the length, the graph, the description, the checksum, the weights."""
    length = 8 + int.from_bytes(content[:8], "little")
    generator = np.random.default_rng(0)
    places = [*range(8), *generator.integers(8, length, 200), *generator.integers(length, len(content), 100)]
    places += [content.index(word) + 3 for word in (b"sha256", b"operations", b"data_offsets", b"__metadata__", b"I8")]
    with attempt("damaged files", len(places)):
        for place in places:
            changed = bytearray(content)
            changed[place] ^= 1 << int(generator.integers(8))
            sentence = refuses(bytes(changed))
            assert (len(sentence) < 500 and place < length) or "its checksum is not that of its content" in sentence


def test_a_file_that_is_cut_off_or_another_is_found(content, tmp_path, attempt):
    length = 8 + int.from_bytes(content[:8], "little")
    whole = [content[:end] for end in (0, 1, 7, 8, 9, length - 1, length, length + 1, len(content) - 1)]
    header = [json.dumps(each).encode() for each in ([], None, {"__metadata__": None}, {"__metadata__": []})]
    whole += [len(each).to_bytes(8, "little") + each for each in (*header, b"{" * 5000, b"[" * 100_000, b"\xff")]
    whole += [content + b"\0", b"\xff" * 100, b"PK\3\4" + bytes(100)]
    with attempt("damaged files", len(whole)):
        for each in whole:
            refuses(each)
    weights = safetensors.torch.save({"a": torch.ones(2)})
    assert refuses(weights).endswith("no file of the event-driven engine (export --format events writes one)")
    (tmp_path / "net.events").write_bytes(weights)
    with pytest.raises(ValueError, match=r"/net\.events: no file of the event-driven engine"):
        detection.load(tmp_path / "net.events")
    with pytest.raises(FileNotFoundError, match=r"none\.events: no such file"):
        detection.load(tmp_path / "none.events")


def test_another_version_is_named(content, monkeypatch, tmp_path):
    program, _ = from_bytes(content, "net.events")
    monkeypatch.setattr(engine, "VERSION", 2)
    later = to_bytes(program, {})
    monkeypatch.undo()
    assert refuses(later) == (
        "net.events: version 2 of the format (this package reads version 1); export the run again"
    )
    unknown = program._replace(operations=[{**program.operations[0], "op": "attention"}])
    with pytest.raises(ValueError, match="unknown operation 'attention': written by a later version"):
        Engine(unknown)
    (tmp_path / "net.events").write_bytes(to_bytes(unknown, {"classes": []}))
    with pytest.raises(ValueError, match=r"/net\.events: unknown operation 'attention'"):
        detection.load(tmp_path / "net.events")
    (tmp_path / "net.events").write_bytes(content)  # whole, but of no run
    with pytest.raises(ValueError, match=r"/net\.events: not a network for .* exported by this project"):
        detection.load(tmp_path / "net.events")


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A detector with spiking neck and head and a classifier, exported."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = json.loads(json.dumps(DETECTOR))
    recipe["model"]["neck"]["spiking"] = recipe["model"]["head"]["spiking"] = True
    del recipe["model"]["head"]["norm"]
    recipe["data"] |= {"scenes": {"num_train": 6, "num_val": 5, "size": 64}}
    recipe["train"] = recipe.get("train", {}) | {"batch_size": 3}  # not the default one
    found = {
        "detector": make_run(folder / "detector", recipe),
        "classifier": make_run(folder / "classifier", CLASSIFIER),
    }
    for run, metrics in zip(found.values(), (METRICS, ("top1", "top5")), strict=True):
        with_log(run, evaluate_run(with_log(run, dict.fromkeys(metrics, 0.0)))[0].metrics)
        export_run(run, "events", evaluate=True)
    return found


def reference_of(folder: Path) -> Callable[[Any], Any]:
    """Return the network of integers of a run, made anew, in the place of the run's network."""
    run = Run.open(folder)
    task, model = task_of(run.config), load_model(run).float()
    part = task.deployable(model)
    network = integers_of(part.network, task.calibration_images(model, task.num_calibration))
    return task.model_around(lambda batch: dict(zip(part.outputs, run_reference(network, batch)[0], strict=True)))


def test_a_file_says_what_it_is_and_how_accurate(runs):
    for name, run in runs.items():
        described = json.loads((run / "model.events.json").read_text())
        assert described["format"] == "events" and described["int8"] and described["parity"]["equal_numbers"] >= 24
        assert described["parity"]["largest_difference"] == 0
        logged = Run.open(run).history()[-1].metrics
        measured = described["evaluation"]
        assert measured["run"] == {key: logged[key] for key in measured["run"]} and len(measured["run"]) >= 2
        file = detection.load(run / "model.events")
        assert isinstance(file, EventsFile) and file.task.name == Run.open(run).config.task
        assert measured["file"] == file.evaluate(run.parent / "data")
        if name == "classifier":
            assert measured["file"]["top5"] == 1 and abs(measured["file"]["top1"] - logged["top1"]) <= 0.3


@pytest.mark.parametrize("file_format", ["events", "torch"])
def test_a_file_computes_in_its_own_precision_whatever_the_run_has(file_format, tmp_path):
    recipe = json.loads(json.dumps(DETECTOR)) | {"train": {"precision": "bf16"}}  # its pyramid and head are analogue
    recipe["data"] |= {"scenes": {"num_train": 2, "num_val": 5, "size": 64}}
    run = with_log(make_run(tmp_path / "run", recipe), dict.fromkeys(METRICS, 0.0))
    path, _ = export_run(run, file_format)
    file, images = detection.load(path), [torch.rand(3, 64, 96)]
    (expected,) = file(images)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = file(images)
    assert all(torch.equal(found[key], expected[key]) for key in ("boxes", "scores", "labels"))
    assert len(found["scores"]) > 0 and len(expected["scores"].bfloat16().unique()) > 1
    assert evaluate_file(path, run)["file"] == file.evaluate(tmp_path / "data")


def test_what_every_level_of_a_pyramid_meets_lies_in_the_file_once(runs):
    tensors = safetensors.torch.load_file(runs["detector"] / "model.events")
    different = {(value.dtype, value.shape, value.numpy().tobytes()) for value in tensors.values()}
    assert len(different) == len(tensors) > 20


def test_a_file_is_measured_under_any_name_and_takes_no_weights_or_device(runs, tmp_path):
    path, described = export_run(runs["classifier"], "events", tmp_path / "net.bin", evaluate=True)
    assert described["evaluation"] == json.loads((runs["classifier"] / "model.events.json").read_text())["evaluation"]
    upper = path.rename(tmp_path / "NET.EVENTS")
    assert isinstance(detection.load(upper), EventsFile)
    for options in ({"weights": "best"}, {"device": "cpu"}):
        with pytest.raises(ValueError, match=r"NET\.EVENTS: a file has one set of weights and runs on the CPU"):
            detection.load(upper, **options)


def test_a_file_predicts_what_the_network_of_integers_does(runs, tmp_path):
    pixels = [np.random.default_rng(seed).integers(0, 255, (60 + seed, 81, 3), dtype=np.uint8) for seed in range(3)]
    images = [torch.from_numpy(each).permute(2, 0, 1) / 255 for each in pixels]
    file, reference = detection.load(runs["detector"] / "model.events"), reference_of(runs["detector"])
    found = file.predict(pixels, score_threshold=0.0)
    for ours, theirs, prediction in zip(file(images), reference(images), found, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("boxes", "scores", "labels"))
        assert len(ours["scores"]) == 100 and torch.equal(prediction.scores, ours["scores"])
        assert torch.equal(prediction.boxes, ours["boxes"])
    middle = float(found[0].scores[50])
    few = file.predict(pixels[0], score_threshold=middle)
    assert 0 < len(few) <= 50 and few.scores.min() > middle
    file, reference = detection.load(runs["classifier"] / "model.events"), reference_of(runs["classifier"])
    batch = torch.rand(3, 3, 32, 32)
    assert torch.equal(file(batch), reference(batch))
    ours = file.predict([np.uint8(255 * image.permute(1, 2, 0)) for image in batch])
    logits = reference((255 * batch).byte() / 255)
    assert all(torch.equal(a.probabilities, b) for a, b in zip(ours, logits.softmax(1), strict=True))


def test_the_command_line_predicts_and_measures(runs, monkeypatch, capsys, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 81, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    path = runs["detector"] / "model.events"
    run_tool(monkeypatch, "predict", path, "image.png", "--score", "0.011")
    rows = json.loads((tmp_path / "predictions" / "model" / "predictions.json").read_text())
    found = detection.load(path).predict(pixels, score_threshold=0.011)
    assert len(rows) == len(found) > 0 and (tmp_path / "predictions" / "model" / "image.png").is_file()
    assert [row["score"] for row in rows] == pytest.approx(found.scores.tolist(), abs=1e-5)
    main(["predict", str(runs["classifier"] / "model.events"), "image.png", "--out", "classes"])
    (row,) = json.loads((tmp_path / "classes" / "predictions.json").read_text())
    assert row["image_id"] == 1
    capsys.readouterr()
    main(["benchmark", str(path), "--repeats", "2"])
    out = capsys.readouterr().out
    assert "96x64 pixels" in out and "the file alone" in out
    for arguments, sentence in (
        (("predict", path, "image.png", "--spikes"), "--spikes: .*has no spike layers \\(a file shows none\\)"),
        (("predict", runs["classifier"] / "model.events", "image.png", "--nms", "0.5"), "has no boxes for --nms"),
        (("benchmark", path, "--threads", "0"), "--threads 0: at least 1"),
    ):
        with pytest.raises(SystemExit):
            main([str(each) for each in arguments])
        assert re.search(sentence, capsys.readouterr().err)


def test_options_that_do_not_go_together_are_named(runs, monkeypatch, capsys, tmp_path):
    events = (runs["detector"], "--format", "events", "--out", tmp_path / "net.events")
    assert "--nms: a file of the format events" in error_of(monkeypatch, capsys, *events, "--nms")
    sentence = error_of(monkeypatch, capsys, *events, "--analogue-int8")
    assert "--analogue-int8 goes with --int8, and with onnx and torch" in sentence
    twin = make_run(tmp_path / "twin", CLASSIFIER, activation="relu")
    sentence = error_of(monkeypatch, capsys, twin, "--format", "events")
    assert "--format events: " in sentence and "has no spike layers" in sentence
    assert not (tmp_path / "net.events").exists() and not (twin / "model.events").exists()


# --- threads and processes --------------------------------------------------------------------------------------------


def test_two_threads_use_one_engine(content):
    """Beginning together, so that both pack the weights."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 3, side, 32, generator=generator) for n, side in ((1, 32), (2, 37), (3, 16), (1, 50)) * 4]
    program, _ = from_bytes(content, "net.events")
    expected = [Engine(program)(images) for images in batches]
    with threads(2):  # of the kernels, in each of them
        for _ in range(3):
            shared = Engine(program)
            with ThreadPoolExecutor(2) as pool:
                for ours, theirs in zip(pool.map(shared, batches), expected, strict=True):
                    assert all(map(torch.equal, ours, theirs))


def test_two_threads_prepare_one_layer():
    """The slower of them, later by far, takes what the faster one keeps."""
    layer = EventLayer(
        torch.ones(64, 40, 1, 1, dtype=torch.int8), Window((1, 1)), spikes=[Comparison(torch.ones(64).int())]
    )
    prepare, both = layer._prepare, threading.Barrier(2)

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.2 * both.wait(10))
        return prepare(*arguments)

    layer._prepare = slowly
    maps = [Bits.pack(torch.ones(1, 40, side, 2)) for side in (3, 4)]
    with using(KERNELS[0]), ThreadPoolExecutor(2) as pool:
        found = [spikes.unpack().mean().item() for _, (spikes,) in pool.map(layer, maps)]
    if KERNELS[0] != "torch":
        (kept,) = [kept[0] for key, (_, kept) in layer._packed.items() if key[-1] != "dense"]
        assert [call.packed for call, *_ in layer._calls.values()] == [kept.data_ptr()] * 2
    assert found == [1.0, 1.0]


def test_a_forked_process_computes_on(content):
    """The kernels' threads stay behind in the parent; the child has its own."""
    ours, images = Engine(from_bytes(content, "net.events")[0]), torch.rand(1, 3, 32, 32)
    layer = EventLayer(
        torch.ones(64, 40, 3, 3, dtype=torch.int8),
        Window((3, 3)),
        scale=torch.ones(64),
        bias=torch.zeros(64),
        keeps_real=True,
    )
    spikes = Bits.pack(torch.rand(3, 40, 9, 9) < 0.3)
    with threads(2):
        expected, (real, _) = ours(images), layer(spikes)

    def compute() -> None:
        torch.set_num_threads(2)
        assert all(torch.equal(layer(spikes)[0], real) for _ in range(20))
        torch.set_num_threads(1)  # torch's own do not survive
        assert all(map(torch.equal, ours(images), expected))

    children = [multiprocessing.get_context("fork").Process(target=compute) for _ in range(3)]
    for child in children:
        child.start()
    with threads(2):
        assert torch.equal(layer(spikes)[0], real)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]


def test_without_compiled_kernels_it_says_so_once(content, monkeypatch):
    ours, images = Engine(from_bytes(content, "net.events")[0]), torch.rand(1, 3, 32, 32)
    expected = ours(images)
    with monkeypatch.context() as patch:
        patch.delenv(library.VARIABLE, raising=False)
        for name, value in {"LIBRARY": None, "_available": ("torch",), "_current": None}.items():
            patch.setattr(library, name, value)
        with pytest.warns(UserWarning, match="no compiled kernels here: torch gives the same results, slower"):
            assert all(map(torch.equal, ours(images), expected))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours(images)
            patch.setattr(library, "_current", None)
            patch.setenv(library.VARIABLE, "torch")  # asked for: no warning
            ours(images)
