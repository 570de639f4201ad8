"""Training that keeps less: what autograd keeps, and that gradients stay as they are."""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import backbones
from backbones import HoyerSpike, extremum, hoyer_penalty, moments, regulariser, spike
from backbones.deploy.events import using
from backbones.recompute import recompute_activations


def plain_layer(layer: HoyerSpike, u: Tensor) -> tuple[Tensor, Tensor]:
    """Spikes and H of a training pass, their gradients left to autograd: the formulas of backbones/hoyer.py."""
    z = u / layer.v_th.abs()
    sums = moments(F.hardtanh(z, 0.0, 1.0), per_channel=layer.per_channel)
    threshold = 1.0 if layer.fixed else layer.broadcast(extremum(*sums).to(z.dtype), z)
    return spike(z, threshold), regulariser(*sums)


@pytest.mark.parametrize("kind", [{}, {"per_channel": True}, {"fixed": True}], ids=["layer", "channel", "fixed"])
@pytest.mark.parametrize("v_th", [0.7, -1.3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_gradients_are_those_that_autograd_finds(kind, v_th, dtype, tolerance):
    torch.manual_seed(0)
    layer = HoyerSpike(5, **kind).to(dtype)
    layer.v_th.data.fill_(v_th)
    u = (1.5 * torch.randn(3, 5, 6, 7, dtype=torch.float64)).to(dtype).requires_grad_()
    upstream = torch.randn(u.shape, dtype=torch.float64).to(dtype)
    found = []
    for _ in range(2):
        spikes, penalty = (layer(u), hoyer_penalty(layer)) if not found else plain_layer(layer, u)
        gradients = torch.autograd.grad((spikes * upstream).sum() + 3 * penalty, [u, layer.v_th])
        found.append((spikes, penalty, *(gradient.double() for gradient in gradients)))
    (spikes, penalty, du, dv), (plain_spikes, plain_penalty, plain_du, plain_dv) = found
    assert torch.equal(spikes, plain_spikes)
    assert torch.equal(penalty, plain_penalty)
    torch.testing.assert_close(du, plain_du, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dv, plain_dv, rtol=tolerance, atol=tolerance * plain_du.abs().sum().item())
    assert du.count_nonzero() == plain_du.count_nonzero()


def test_regulariser_gradient_by_finite_differences_through_the_layer():
    torch.manual_seed(0)
    layer = HoyerSpike(4).double()

    def penalty(u: Tensor, v_th: Tensor) -> Tensor:
        torch.func.functional_call(layer, {"v_th": v_th}, u)
        return hoyer_penalty(layer)

    u = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(penalty, (u, torch.tensor(-0.8, dtype=torch.float64, requires_grad=True)))


def test_a_second_derivative_is_refused():
    layer = HoyerSpike(4)
    u, weight = torch.rand(2, 4, requires_grad=True), torch.rand(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad((layer(u) * weight).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def kept_bytes(model: nn.Module, images: Tensor, context=contextlib.nullcontext) -> int:
    """Bytes of tensors that are there after a forward pass and were not before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record, context():
        output = model(images)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    del output
    return sum(event.nbytes() for event in events)


def layers(num: int, activation: str) -> nn.Sequential:
    """Convolution -> BN -> activation, `num` times, of 8 channels."""
    parts: list[nn.Module] = []
    for _ in range(num):
        parts += [
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            HoyerSpike(8) if activation == "hoyer" else nn.ReLU(),
        ]
    return nn.Sequential(*parts)


def test_bytes_per_neuron():
    images = torch.randn(4, 8, 32, 32)
    neurons, num = images.numel(), 4
    twin = kept_bytes(layers(num, "relu"), images) / neurons / num
    plain = kept_bytes(layers(num, "hoyer"), images) / neurons / num
    less = kept_bytes(layers(num, "hoyer"), images, recompute_activations) / neurons / num
    # Small tensors, such as statistics, take the rest. The spikes that leave the network are there in any case.
    assert twin == pytest.approx(8, abs=0.3)  # BN's input, ReLU's output
    assert plain == pytest.approx(12, abs=0.3)  # BN's input, z, spikes
    assert less == pytest.approx(4 + 4 / num, abs=0.3)  # BN's input


def test_a_compiled_network_keeps_what_its_convolutions_give_and_no_copies_of_weights():
    torch.manual_seed(0)
    torch.compiler.reset()
    num = 2
    eager = layers(num, "hoyer").double()  # so that no potential rounds to the other side of its threshold
    compiled = copy.deepcopy(eager).to(memory_format=torch.channels_last)
    compiled.compile(fullgraph=True)
    images = torch.randn(4, 8, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    found = []
    for model in (eager, compiled):
        loss = model(images).square().mean() + hoyer_penalty(model, "mean")
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(*found)
    assert found[0][1].count_nonzero() > 0
    num_maps = kept_bytes(compiled, images) / images.nbytes
    assert num_maps == pytest.approx(num + 1, abs=0.15)  # what BN takes, and the spikes that leave the network
    assert num * compiled[0].weight.nbytes / images.nbytes > 0.5  # which copies of the weights would come to


def trained(model: nn.Module, images: Tensor, context, dtype: torch.dtype | None) -> list[Tensor]:
    """Loss, gradients and buffers of two steps."""
    results = []
    for _ in range(2):
        with context(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            maps = model(images)
            loss = sum(features.float().square().mean() for features in maps.values()) + hoyer_penalty(model, "mean")
        model.zero_grad()
        loss.backward()
        results += [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
    return results + [buffer.clone() for buffer in model.buffers()]


@pytest.fixture
def by_torch():
    """Spike layers are computed by torch, as they are where activations are computed again."""
    with using("torch"):
        yield


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet34", "resnet50", "mobilenetv1", "mobilenetv2"])
def test_every_family_trains_bit_for_bit_alike(name):
    torch.manual_seed(0)
    model = backbones.create(name, width=0.125)
    images = torch.randn(2, 3, 64, 64)
    expected = trained(copy.deepcopy(model), images, contextlib.nullcontext, None)
    found = trained(model, images, recompute_activations, None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"extremum": "channel"}, None),
        ({"activation": "fixed"}, None),
        ({"activation": "relu"}, None),
        ({}, torch.bfloat16),
    ],
    ids=["channel", "fixed", "relu", "bfloat16"],
)
def test_every_activation_and_precision_trains_bit_for_bit_alike(options, dtype):
    torch.manual_seed(0)
    model = backbones.create("resnet18", width=0.125, pool_first=False, **options)
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    expected = trained(copy.deepcopy(model), images, contextlib.nullcontext, dtype)
    found = trained(model, images, recompute_activations, dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_kernels_differ_by_the_rounding_of_sums():
    torch.manual_seed(0)
    model, images = layers(2, "hoyer"), torch.randn(4, 8, 8, 8)
    found = []
    for context in (contextlib.nullcontext, recompute_activations):
        with context():
            loss = model(images).square().mean() + hoyer_penalty(model, "mean")
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert found[0][1].count_nonzero() > 0


def test_frozen_statistics_and_gradients_of_an_evaluation():
    torch.manual_seed(0)
    model = layers(2, "hoyer")
    model(torch.randn(4, 8, 8, 8))
    model.eval()
    found = []
    for context in (contextlib.nullcontext, recompute_activations):
        images = torch.linspace(-3, 3, 512).sin().view(1, 8, 8, 8).requires_grad_()
        with context():
            out = model(images)
        found.append((out, *torch.autograd.grad(out.sum(), [images, *model.parameters()])))
    assert found[0][1].count_nonzero() > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_graph_can_be_gone_through_twice():
    model = layers(2, "hoyer")
    with recompute_activations():
        out = model(torch.randn(2, 8, 6, 6)).mean()
    first = torch.autograd.grad(out, model[0].weight, retain_graph=True)[0]
    assert first.count_nonzero() > 0
    assert torch.equal(torch.autograd.grad(out, model[0].weight)[0], first)


def test_what_was_changed_in_place_is_kept_as_it_was_used():
    u = torch.randn(3, 4, requires_grad=True)
    found = []
    for context in (contextlib.nullcontext, recompute_activations):
        with context():
            total = u + 1
            total.relu_()
            out = (total * total).sum()
        found.append(torch.autograd.grad(out, u)[0])
    assert torch.equal(*found)
    assert found[0].count_nonzero() > 0


def test_a_source_that_was_changed_in_place_is_an_error():
    weight = nn.Parameter(torch.ones(2, 3))
    with recompute_activations():
        out = ((weight + torch.rand(2, 3)) * torch.rand(2, 3, requires_grad=True)).sum()
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match=r"shape \(2, 3\) was changed in place.*recompute_activations"):
        out.backward()


def test_nothing_is_left_after_a_step():
    model = layers(3, "hoyer")

    def step(images: Tensor) -> None:
        with recompute_activations():
            loss = model(images).mean() + hoyer_penalty(model)
        loss.backward()
        model.zero_grad()

    gc.collect()
    gc.disable()  # what only the collector of cycles frees would count
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            step(torch.ones(2, 8, 16, 16))
    finally:
        gc.enable()
    events = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sum(size for size in events if size > 0) > 10 * 2 * 8 * 16 * 16 * 4
    assert sum(events) < 2 * 8 * 16 * 16 * 4


def test_a_compiled_model_is_left_alone():
    torch.manual_seed(0)
    torch.compiler.reset()
    eager = layers(1, "hoyer")
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="aot_eager")
    images = torch.randn(2, 8, 6, 6)
    with recompute_activations():
        found = compiled(images)
    found.mean().backward()
    expected = eager(images)
    expected.mean().backward()
    assert torch.equal(found, expected)
    torch.testing.assert_close(compiled[0].weight.grad, eager[0].weight.grad)
