"""Binary and adder networks: both layers against direct formulas, which convolutions they are, cost, training."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import ROOT, log_lines, run_tool
from test_resume import expect_equal, stop_after
from torch import nn

import backbones
from backbones import arithmetic, arithmetic_layers, certify, energy, fold, measure_activity, neurons
from backbones.arithmetic import AdderConv2d, BinaryConv2d, Sign
from detection.analysis import analyze_run
from detection.cli import compare, summary
from detection.cli import train as train_verb
from detection.config import load_config, override, read_recipe, schema
from detection.exporters import export_run
from detection.runs import Run
from detection.tasks import task_of
from detection.training.optim import build_optimizer, hidden_convolutions

RECIPE = {
    "task": "classification",
    "model": {"backbone": {"name": "vgg11", "width": 0.125, "stem": "cifar", "activation": "hoyer", "head": "pooled"}},
    "data": {"format": "synthetic", "size": 32, "num_train": 32, "num_val": 4, "augment": {"padding": 0, "hflip": 0.0}},
    "optimizer": {"name": "sgd", "lr": 0.05, "warmup_steps": 2, "clip_norm": 1.0},
    "train": {"epochs": 8, "batch_size": 8, "eval_every": 8},
}
GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "bias": True},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": 1, "stride": 2},
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(kind: type[nn.Conv2d], geometry: dict) -> nn.Conv2d:
    layer = kind(2, 3, **{"bias": False} | geometry).double()
    layer.weight.data = 0.8 * normal(*layer.weight.shape, seed=1)
    if layer.bias is not None:
        layer.bias.data = normal(3, seed=2)
    return layer


def patches_of(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """(N, H', W', C, kh, kw) by indexing, cell for cell."""
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = layer.kernel_size, layer.stride, layer.dilation, layer.padding
    x = F.pad(x, (pw, pw, ph, ph))
    rows = range(0, x.shape[2] - dh * (kh - 1), sh)
    columns = range(0, x.shape[3] - dw * (kw - 1), sw)
    cells = [x[:, :, i : i + dh * kh : dh, j : j + dw * kw : dw] for i, j in itertools.product(rows, columns)]
    return torch.stack(cells, 1).unflatten(1, (len(rows), len(columns)))


def by_loops(layer: nn.Conv2d, x: torch.Tensor, product) -> torch.Tensor:
    """Every output as a Python sum over its patch."""
    patches, weight = patches_of(layer, x).tolist(), layer.weight.tolist()
    bias = [0.0] * len(weight) if layer.bias is None else layer.bias.tolist()
    flat = [[v for plane in filter_ for row in plane for v in row] for filter_ in weight]

    def output(patch, filter_, offset):
        values = [v for plane in patch for row in plane for v in row]
        return offset + sum(product(v, w, filter_) for v, w in zip(values, filter_, strict=True))

    maps = [
        [[[output(patch, each, b) for patch in row] for row in image] for each, b in zip(flat, bias, strict=True)]
        for image in patches
    ]
    return torch.tensor(maps, dtype=torch.float64)


def times_sign(v: float, w: float, filter_: list[float]) -> float:
    return v * (1 if w >= 0 else -1) * sum(map(abs, filter_)) / len(filter_)


def minus_distance(v: float, w: float, filter_: list[float]) -> float:
    return -abs(v - w)


# Layers


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("kind", "product"), [(BinaryConv2d, times_sign), (AdderConv2d, minus_distance)])
def test_a_layer_is_its_formula_written_as_loops(kind, product, geometry):
    layer, x = make(kind, geometry), normal(2, 2, 6, 7, seed=3)
    y = layer(x)
    assert y.shape == nn.Conv2d(2, 3, **geometry)(x.float()).shape
    torch.testing.assert_close(y, by_loops(layer, x, product))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradients_of_an_adder_layer_are_those_of_the_paper(geometry, monkeypatch):
    layer, x = make(AdderConv2d, geometry), normal(3, 2, 6, 7, seed=3).requires_grad_()
    dy = normal(*layer(x).shape, seed=4)

    def gradients():
        return torch.autograd.grad(layer(x), [x, layer.weight], dy)

    # With the factors of the paper held, what is left is linear, and its derivative exact.
    patches, weight = patches_of(layer, x)[:, None], layer.weight[:, None, None]  # (N, O, H', W', C, kh, kw) together
    at_x = (((weight - patches).clamp(-1, 1).detach() * patches).sum((4, 5, 6)) * dy).sum()
    at_w = (((patches - weight).detach() * weight).sum((4, 5, 6)) * dy).sum()
    expected = [*torch.autograd.grad(at_x, x), *torch.autograd.grad(at_w, layer.weight)]
    torch.testing.assert_close(list(gradients()), expected)
    assert (weight - patches).abs().max() > 1.5  # some are clipped
    whole = layer(x)
    monkeypatch.setattr(arithmetic, "SLICE", 3 * layer.weight.numel())  # three patches in a slice
    monkeypatch.setattr(arithmetic, "PATCHES", 1)  # an image in a group
    torch.testing.assert_close(layer(x), whole)
    torch.testing.assert_close(list(gradients()), expected)


def test_an_adder_layer_adds_in_float32_whatever_enters():
    layer, x = AdderConv2d(4, 5, 3, padding=1), normal(2, 4, 8, 8).bfloat16()
    exact = layer(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32 and torch.equal(y, exact)
    x = x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32


def test_an_adder_layer_has_no_tensor_of_all_differences():
    layer, x = AdderConv2d(32, 32, 3, padding=1, bias=False), torch.rand(4, 32, 24, 24)
    with torch.profiler.profile(profile_memory=True) as record:
        layer(x.requires_grad_()).sum().backward()
    largest = max(event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]")
    assert largest <= 4 * arithmetic.PATCHES < 4 * (4 * 32 * 32 * 9 * 24 * 24) / 10


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradients_of_a_binary_layer(geometry):
    layer, x = make(BinaryConv2d, geometry), normal(2, 2, 6, 7, seed=3).requires_grad_()
    layer.weight.requires_grad_(False)
    assert torch.autograd.gradcheck(layer, x)  # linear in x: exact
    layer.weight.requires_grad_(True)
    w = layer.weight.detach()
    scale = w.abs().mean((1, 2, 3), keepdim=True)
    # XNOR-Net's: dW arrives at W = a sign(w), of which an ordinary convolution is made.
    used = (scale * torch.where(w >= 0, 1.0, -1.0)).requires_grad_()
    options = {key: getattr(layer, key) for key in ("stride", "padding", "dilation")}
    dy = normal(*layer(x).shape, seed=4)
    (arrives,) = torch.autograd.grad(F.conv2d(x, used, **options), used, dy)
    (found,) = torch.autograd.grad(layer(x), layer.weight, dy)
    inside = w.abs() <= 1
    assert inside.any() and (not inside.all() or layer.kernel_size == (1, 1))
    torch.testing.assert_close(found, arrives * (1 / w[0].numel() + scale * inside))


def test_a_sign_and_its_straight_through_gradient():
    u = torch.tensor([-3.0, -1.0, -0.5, -0.0, 0.0, 1e-9, 1.0, 1.01], requires_grad=True)
    signs = Sign()(u)
    assert signs.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    signs.backward(torch.arange(1.0, 9.0))
    assert u.grad.tolist() == [0, 2, 3, 4, 5, 6, 7, 0]
    assert not neurons()["sign"].spiking and Sign()(u.bfloat16()).dtype == torch.bfloat16


def test_over_spikes_an_adder_layer_is_one_addition_per_spike():
    """As the energy of spiking networks has it."""
    layer, spikes = make(AdderConv2d, {"kernel_size": 3}), (normal(2, 2, 6, 7, seed=5) > 0).double()
    weight = layer.weight
    expected = F.conv2d(spikes, weight.abs() - (1 - weight).abs()) - weight.abs().sum((1, 2, 3)).view(-1, 1, 1)
    torch.testing.assert_close(layer(spikes), expected)


@pytest.mark.parametrize("kind", [BinaryConv2d, AdderConv2d])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, "one group only, got 2"),
        ({"padding": 1, "padding_mode": "circular"}, "only padding by a number of zeros"),
        ({"padding": "same"}, "only padding by a number of zeros, got 'same'"),
    ],
)
def test_what_the_layers_do_not_know_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        kind(4, 4, 3, **options)


# Networks


def test_convolutions_but_the_first_are_of_the_arithmetic_shortcuts_as_the_papers_have_them():
    def kinds(name: str, kind: str) -> dict[str, str]:
        model = backbones.create(name, width=0.125, stem="cifar", arithmetic=kind)
        return {path: type(each).__name__ for path, each in model.named_modules() if isinstance(each, nn.Conv2d)}

    for kind, layer in (("binary", "BinaryConv2d"), ("adder", "AdderConv2d")):
        first, *others = kinds("vgg11", kind).values()
        assert first == "Conv2d" and others == [layer] * 7
    assert kinds("resnet18", "binary")["stages.1.0.shortcut.3"] == "Conv2d"
    first, *others = kinds("resnet18", "adder").values()
    assert first == "Conv2d" and set(others) == {"AdderConv2d"} and len(others) == 2 + 16 + 3
    assert "AdderConv2d" in kinds("resnet50", "adder")["stages.0.0.shortcut.2"]
    with pytest.raises(ValueError, match=r"arithmetic 'adder': not for depthwise .* MobileNetV1 .*stages\.0\.0\.1"):
        backbones.create("mobilenetv1", arithmetic="adder")
    with pytest.raises(ValueError, match="arithmetic must be one of 'float', 'binary', 'adder', got 'ternary'"):
        backbones.create("vgg11", arithmetic="ternary")


def test_a_float_network_is_what_it_was_and_a_binary_one_begins_with_the_same_weights():
    def state(**options) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return backbones.create("vgg11", width=0.125, **options).state_dict()

    plain, same, binary, adder = (
        state(),
        state(arithmetic="float"),
        state(arithmetic="binary"),
        state(arithmetic="adder"),
    )
    assert all(torch.equal(value, same[key]) for key, value in plain.items())
    assert all(torch.equal(value, plain[key]) for key, value in binary.items())
    assert abs(adder["stages.4.4.weight"].std() - 1) < 0.01 and adder.keys() == binary.keys()
    backbones.create("vgg11", width=0.125, arithmetic="adder", weights=adder)


def test_a_further_arithmetic_is_one_entry(monkeypatch):
    class Half(backbones.ArithmeticConv2d):
        arithmetic, weight_bits = "half", 16

        def forward(self, x):
            return self._conv_forward(x, self.weight.half().float(), self.bias)

    monkeypatch.setitem(backbones.ARITHMETICS, "half", backbones.Arithmetic(Half, "relu", "half network"))
    recipe = override(read_recipe(ROOT / "configs" / "cifar10_vgg11.yaml"), ["--model.backbone.arithmetic", "half"])
    task = task_of(recipe).with_classes(["a", "b"])
    task.check_names()
    assert task.describe() == "VGG11 \N{MULTIPLICATION SIGN}0.25, half network"
    assert len(arithmetic_layers(task.build_model())) == 7


class Small(nn.Module):
    """A stem over pixels, a layer, and a linear one, 2x2 everywhere."""

    def __init__(self, layer: nn.Conv2d, activation: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.layer, self.linear = nn.Conv2d(1, 2, 1, bias=False), layer, nn.Linear(12, 5)
        self.first, self.second = activation(), activation()

    def forward(self, x):
        return self.linear(self.second(self.layer(self.first(self.stem(x)))).flatten(1))


def test_energy_of_both_networks_by_hand():
    images = torch.rand(2, 1, 2, 2) - 0.5
    measured = measure_activity(Small(BinaryConv2d(2, 3, 3, padding=1, bias=False), Sign), [images])
    report = energy(measured)
    network, twin = report.networks["binary"], report.networks["twin"]
    # The stem has 8 MACs, the layer 4 cells x 4 taps inside x 2 x 3 = 96 pairs, the linear layer 12 x 5 = 60.
    assert list(report.networks) == ["binary", "twin", "twin_int8"] and (twin.macs, twin.acs) == (164, 0)
    assert (network.macs, network.acs, network.comparisons) == (8, 96 + 60, 8 + 12)
    assert network.total_pj == pytest.approx(8 * 4.6 + 156 * 0.9 + 20 * 0.9)
    # Weights of 32 bits, 54 of one bit, 60 of 32 bits and 5 biases; pixels in, then a bit per sign.
    assert network.weight_bits == 2 * 32 + 54 + 65 * 32 and twin.weight_bits == (2 + 54 + 65) * 32
    assert network.read_bits == 4 * 32 + 8 + 12 and network.write_bits == 8 + 12 + 5 * 32
    assert report.ratios["binary/twin"]["operations"] == pytest.approx(network.total_pj / (164 * 4.6))
    assert report.layers["layer"]["binary"].comparisons == 8 and report.first_layer is None
    assert [layer.is_sign for layer in measured.layers.values()] == [False, True, True]

    measured = measure_activity(Small(AdderConv2d(2, 3, 3, padding=1, bias=False), nn.Softplus), [images])
    report = energy(measured)
    network = report.networks["adder"]
    # A subtraction and an addition per pair, real numbers everywhere.
    assert list(report.networks) == ["adder", "twin", "twin_int8"]
    assert (network.macs, network.acs, network.comparisons) == (68, 2 * 96, 0)
    assert network.weight_bits == report.networks["twin"].weight_bits and network.read_bits == (4 + 8 + 12) * 32
    assert network.total_pj == pytest.approx(68 * 4.6 + 192 * 0.9)


def test_the_certificate_says_what_the_layers_are():
    measured = measure_activity(Small(BinaryConv2d(2, 3, 3), Sign), [torch.rand(2, 1, 4, 4) - 0.5])
    certificate = certify(measured)
    assert certificate.arithmetics == (("binary", 1),) and not certificate.is_binary
    reasons = dict(certificate.violations)
    assert reasons["layer"] == "its input is -1 and 1; arithmetic binary"
    assert reasons["linear"] == "its input is -1 and 1" and reasons["network"] == "it has no spike layer"


def test_the_gradient_of_an_adder_layer_is_scaled_to_its_size_in_front_of_each_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), AdderConv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, schema.Optimizer(name="sgd", lr=0.1, weight_decay=0.0))
    (1e4 * model(torch.rand(2, 3, 8, 8)).square().sum()).backward()
    plain, adder = model[0].weight.grad.clone(), model[1].weight.grad.clone()
    optimizer.step()
    changed = model[1].weight - before[2]
    torch.testing.assert_close(changed, -0.1 * 0.2 * math.sqrt(6 * 4 * 9) * adder / adder.norm(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model[0].weight, before[0] - 0.1 * plain)
    assert hidden_convolutions(nn.Sequential(nn.Conv2d(3, 4, 3), BinaryConv2d(4, 4, 3), model[1])) == {"1.weight"}


def test_the_activation_follows_the_arithmetic_unless_it_is_named(tmp_path):
    recipe, key = ROOT / "configs" / "cifar10_vgg11.yaml", "--model.backbone.arithmetic"
    assert "activation: hoyer" in recipe.read_text()

    def activation(*arguments: str, path: Path = recipe) -> str:
        return load_config(path, arguments).model.backbone.activation

    assert [activation(key, name) for name in ("float", "binary", "adder")] == ["hoyer", "sign", "relu"]
    assert activation(key, "adder", "--model.backbone.activation", "fixed") == "fixed"
    binary = override(read_recipe(recipe), [key, "binary"])
    assert override(binary, ["--train.epochs", "3"]).model.backbone.activation == "sign"
    assert override(binary, [key, "float"]).model.backbone.activation == "hoyer"
    path = tmp_path / "recipe.yaml"
    for backbone, expected in (
        ({"arithmetic": "binary"}, "sign"),
        ({"arithmetic": "adder", "activation": "hoyer"}, "hoyer"),
    ):
        path.write_text(yaml.safe_dump(RECIPE | {"model": {"backbone": backbone}}))
        assert activation(path=path) == expected
    with pytest.raises(ValueError, match=r"model\.backbone\.arithmetic: unknown 'addr'; did you mean 'adder'"):
        task_of(override(binary, [key, "addr"])).check_names()


# Runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{arithmetic: run folder}, by one override of a recipe."""
    folder = tmp_path_factory.mktemp("arithmetic")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    for name in ("binary", "adder"):
        arguments = [str(folder / "recipe.yaml"), "--out", str(folder / name), "--model.backbone.arithmetic", name]
        train_verb.main(arguments)
    return folder


@pytest.mark.parametrize("name", ["binary", "adder"])
def test_a_recipe_trains_and_its_run_says_what_it_is(trained, name, tmp_path, capsys):
    losses = [line["loss"] for line in log_lines(trained / name)]
    assert losses[-1] < 0.9 * losses[0]
    analysis = analyze_run(trained / name).to_dict()
    assert next(iter(analysis["networks"])) == name and 0 < analysis["ratios"][f"{name}/twin"]["operations"] < 0.9
    assert analysis["certificate"]["arithmetics"] == {name: 7} and not analysis["certificate"]["binary"]
    layer = analysis["layers"][3]
    assert layer["kind"] == f"{name} conv" and layer["input"] == {"binary": "signs", "adder": "real"}[name]
    analyze_run(trained / name).save(tmp_path)
    assert f"; 7 {name} convolutions" in (tmp_path / "analysis.md").read_text()
    model = task_of(Run.open(trained / name).config).build_model()
    refusal = rf"layer backbone\.stages\.1\.1: arithmetic '{name}' has no folded form \(allowed: 'float'\)"
    with pytest.raises(ValueError, match=f"^{refusal}"):
        fold(model)
    for options in ({}, {"int8": True}, {"file_format": "torch"}, {"file_format": "nir"}):
        with pytest.raises(ValueError, match=f"{name}: cannot be exported, {refusal}"):
            export_run(trained / name, out=tmp_path / "net", **options)
    summary.main([str(trained / name)])
    text = capsys.readouterr().out
    text = " ".join(text.split())  # the table breaks lines
    assert f"arithmetic {name}" in text and f"{name} conv 3x3 8 -> 16" in text


@pytest.mark.parametrize("name", ["binary", "adder"])
def test_a_stopped_run_goes_on_exactly(trained, name, monkeypatch, tmp_path):
    size = ["--data.size", "16", "--data.num_train", "16", "--train.epochs", "2", "--train.accumulate", "2"]
    arguments = [trained / "recipe.yaml", "--model.backbone.arithmetic", name, *size]
    run_tool(monkeypatch, "train_cls", *arguments, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(SystemExit):
            run_tool(monkeypatch, "train_cls", *arguments, "--out", tmp_path / "run")
    run_tool(monkeypatch, "train_cls", "--resume", tmp_path / "run")
    expect_equal(tmp_path / "run", tmp_path / "whole")


def test_a_page_shows_both(trained, tmp_path):
    from detection.cli import report

    out = tmp_path / "page.html"
    report.main([str(trained / "binary"), str(trained / "adder"), "--out", str(out)])
    text = out.read_text()
    assert "binary network" in text and "adder network" in text and "7 adder convolutions." in text


def test_one_comparison_has_all_of_them(monkeypatch, tmp_path):
    def in_this_process(arguments) -> int:
        train_verb.main(arguments)
        return 0

    monkeypatch.setattr(compare, "run_child", in_this_process)
    variants = [f"{name}=--model.backbone.arithmetic {name}" for name in ("binary", "adder")]
    data = ["--data.format", "synthetic", "--data.size", "16", "--data.num_train", "8", "--data.num_val", "4"]
    small = ["--model.backbone.width", "0.125", "--train.epochs", "1", "--train.batch_size", "4"]
    compare.main(["cifar10_vgg11", "--out", str(tmp_path), "--variants", "hoyer", "relu", *variants, *data, *small])
    table = (tmp_path / "README.md").read_text()
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert names == 2 * ["variant", "hoyer", "relu", "binary", "adder"]
    found = [Run.open(tmp_path / f"{name}_seed0").config.model.backbone for name in ("binary", "adder")]
    assert [each.activation for each in found] == ["sign", "relu"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adder_networks_run_in_other_types(dtype):
    model = backbones.create("resnet18", width=0.125, stem="cifar", arithmetic="adder").to(dtype).eval()
    assert model(torch.rand(1, 3, 16, 16, dtype=dtype))["c5"].dtype == dtype


def test_a_sign_that_two_layers_take_is_one_comparison():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.sign, self.one, self.two = Sign(), BinaryConv2d(3, 4, 1), BinaryConv2d(3, 5, 1)

        def forward(self, x):
            x = self.sign(x)
            return self.one(x), self.two(x)

    measured = measure_activity(Two().eval(), [torch.randn(2, 3, 4, 4)])
    assert energy(measured).networks["binary"].comparisons == 3 * 4 * 4
    assert sum(map(measured.comparisons, measured.layers.values())) == 2 * 3 * 4 * 4
