"""The spike layer against numbers worked out by hand; letters as in backbones/hoyer.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import HoyerSpike, extremum, hoyer_penalties, hoyer_penalty, moments, regulariser, spike
from backbones.multistep import MultiStepSpike

# sum c = 1.75, sum c^2 = 0.25 + 1 + 0.0625 = 1.3125, E = 1.3125 / 1.75 = 3/4, H = 1.75^2 / 1.3125 = 7/3
C = [0.5, 1.0, 0.0, 0.25]
HALF = [torch.bfloat16, torch.float16]


def clip(z: Tensor) -> Tensor:
    return F.hardtanh(z, 0.0, 1.0)


def hoyer_of(z: Tensor) -> Tensor:
    return regulariser(*moments(clip(z)))


def one_active(value: float) -> Tensor:
    """A potential (1, 4) whose batch extremum is `value`: E = c^2 / c = c for a single active neuron."""
    u = torch.full((1, 4), -1.0)
    u[0, 2] = value
    return u


def is_binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def test_extremum_and_regulariser_of_four_neurons():
    sum_c, sum_c2 = moments(torch.tensor(C))
    assert (sum_c.item(), sum_c2.item()) == (1.75, 1.3125)
    assert extremum(sum_c, sum_c2).item() == 0.75
    assert regulariser(sum_c, sum_c2).item() == pytest.approx(7 / 3)


def test_extremum_per_channel_is_over_batch_and_space():
    # channel 0 holds 0.5 and 1: E = 1.25 / 1.5 = 5/6; channel 1 holds 0 and 0.25: E = 0.25; both together as above
    c = torch.tensor([[0.5, 0.0], [1.0, 0.25]]).view(2, 2, 1, 1)
    sum_c, sum_c2 = moments(c, per_channel=True)
    assert sum_c.tolist() == [1.5, 0.25]
    assert sum_c2.tolist() == [1.25, 0.0625]
    torch.testing.assert_close(extremum(sum_c, sum_c2), torch.tensor([5 / 6, 0.25]))
    assert regulariser(sum_c, sum_c2).item() == pytest.approx(7 / 3)  # always of the whole layer

    c = torch.tensor([[[[0.5, 1.0]], [[0.0, 0.25]]]])  # the same numbers, now along space: (1, 2, 1, 2)
    torch.testing.assert_close(extremum(*moments(c, per_channel=True)), torch.tensor([5 / 6, 0.25]))


@pytest.mark.parametrize(("v_th", "per_channel"), [(1.0, False), (2.0, False), (1.0, True), (2.0, True)])
def test_layer_fires_from_the_threshold_times_the_extremum(v_th, per_channel):
    # z, its clip and the spikes; z is (image, channel), E = 3/4 for the layer, 5/6 and 1/4 for its two channels
    z = torch.tensor([[0.5, -3.0], [2.0, 0.25]])  # c = 0.5, 0 | 1, 0.25
    expected = [[0.0, 0.0], [1.0, 1.0]] if per_channel else [[0.0, 0.0], [1.0, 0.0]]
    layer = HoyerSpike(2, per_channel=per_channel)
    layer.v_th.data.fill_(v_th)
    assert layer(z * v_th).tolist() == expected
    torch.testing.assert_close(layer.extremum, torch.tensor([5 / 6, 0.25]) if per_channel else torch.tensor(0.75))
    assert layer.eval()(z * v_th).tolist() == expected


def test_a_potential_equal_to_the_threshold_fires():
    layer = HoyerSpike(4)
    assert layer(torch.full((2, 4), 0.5)).tolist() == [[1.0] * 4] * 2  # E = 8 * 0.25 / (8 * 0.5) = 0.5
    assert layer.eval()(torch.tensor([[0.5, 0.49, 0.51, -0.5]])).tolist() == [[1.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize(("num_active", "value"), [(1, 0.25), (1, 1.0), (7, 0.5), (12, 0.25)])
def test_regulariser_counts_equally_active_neurons(num_active, value):
    z = torch.full((12,), -1.0)
    z[:num_active] = value
    assert hoyer_of(z).item() == pytest.approx(num_active)


def test_regulariser_gradient_by_finite_differences():
    z = torch.linspace(0.05, 0.95, 12, dtype=torch.float64).view(2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(hoyer_of, z)
    assert torch.autograd.gradcheck(lambda z: regulariser(*moments(clip(z), per_channel=True)), z)


def test_regulariser_has_no_gradient_outside_the_clipped_range():
    z = torch.tensor([-1.0, 0.0, 0.25, 0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    hoyer_of(z).backward()
    # c = 0, 0, 1/4, 1/2, 1, 1: sum c = 11/4, sum c^2 = 37/16, their quotient q = 44/37; dH/dz = 2 q (1 - z q)
    q = 44 / 37
    expected = [0, 0, 2 * q * (1 - q / 4), 2 * q * (1 - q / 2), 0, 0]
    torch.testing.assert_close(z.grad, torch.tensor(expected, dtype=torch.float64))


def test_surrogate_is_one_half_on_the_open_interval_from_0_to_2():
    z = torch.tensor([-0.5, 0.0, 1e-6, 0.5, 1.0, 1.5, 2 - 1e-6, 2.0, 2.5], requires_grad=True)
    out = spike(z, 0.75)
    assert out.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    out.sum().backward()
    assert z.grad.tolist() == [0, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 0, 0]  # the window knows nothing of the threshold


def test_layer_gradient_is_the_surrogate_over_the_threshold_and_skips_the_extremum():
    layer = HoyerSpike(2)
    layer.v_th.data.fill_(2.0)
    u = torch.tensor([[1.0, 3.9], [4.1, -0.1]], requires_grad=True)  # z = 0.5, 1.95 | 2.05, -0.05
    layer(u).backward(torch.tensor([[1.0, 4.0], [16.0, 64.0]]))
    assert u.grad.tolist() == [[0.25, 1.0], [0.0, 0.0]]  # upstream * 1/2 * 1/2; through E every entry would get more


def test_extremum_carries_no_gradient():
    c = torch.tensor(C, requires_grad=True)
    sum_c, sum_c2 = moments(c)
    assert sum_c.requires_grad
    assert sum_c2.requires_grad
    assert not extremum(sum_c, sum_c2).requires_grad

    threshold = torch.tensor(0.75, requires_grad=True)
    spike(c, threshold).sum().backward()
    assert threshold.grad is None

    layer = HoyerSpike(4)
    layer(c.view(1, 4))
    assert not layer.extremum.requires_grad


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_threshold_gradient_through_the_spikes(sign):
    layer = HoyerSpike(2)
    layer.v_th.data.fill_(2.0 * sign)
    # z = 0.25, 0.5 | 1.5, -0.5: three inside the window. d/d|v| sum w s = sum w * 1/2 * (-u / v^2)
    u, w = torch.tensor([[0.5, 1.0], [3.0, -1.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (w * layer(u)).sum().backward()
    assert layer.v_th.grad.item() == pytest.approx(sign * -(1 * 0.5 + 2 * 1.0 + 3 * 3.0) / 8)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_threshold_gradient_through_the_regulariser(sign):
    u = torch.tensor([[0.25, 0.5], [2.0, -1.0]], dtype=torch.float64)

    def penalty(v_th: float) -> tuple[Tensor, HoyerSpike]:
        layer = HoyerSpike(2).double()
        layer.v_th.data.fill_(v_th)
        layer(u)
        return hoyer_penalty(layer), layer

    value, layer = penalty(sign)
    value.backward()
    # c = 1/4, 1/2, 1, 0 and q = 4/3: dH/dz = 2 q (1 - z q) = 16/9, 8/9, 0, 0; times dz/d|v| = -u
    assert layer.v_th.grad.item() == pytest.approx(sign * -(16 / 9 * 0.25 + 8 / 9 * 0.5))
    step = 1e-6
    slope = (penalty(sign + step)[0] - penalty(sign - step)[0]).item() / (2 * step)
    assert layer.v_th.grad.item() == pytest.approx(slope, rel=1e-6)


def test_the_sign_of_the_threshold_does_not_matter():
    torch.manual_seed(0)
    u = torch.randn(2, 3, 4, 4)
    positive, negative = HoyerSpike(3), HoyerSpike(3)
    positive.v_th.data.fill_(0.7)
    negative.v_th.data.fill_(-0.7)
    assert torch.equal(positive(u), negative(u))
    assert torch.equal(hoyer_penalty(positive), hoyer_penalty(negative))
    assert torch.equal(positive.eval()(u), negative.eval()(u))


def test_a_threshold_of_zero_stays_finite():
    layer = HoyerSpike(3)
    layer.v_th.data.zero_()
    out = layer(torch.tensor([[-1.0, 0.0, 1.0]]))
    assert out.tolist() == [[0.0, 0.0, 1.0]]
    (out.sum() + hoyer_penalty(layer)).backward()
    assert layer.v_th.grad.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_output_is_exactly_binary_with_gradients_enabled(dtype, per_channel):
    torch.manual_seed(0)
    sizes = 10 ** torch.empty(4, 5, 16, 16).uniform_(-7, 4)
    u = (torch.randn(sizes.shape) * sizes).clamp(-6e4, 6e4).to(dtype).requires_grad_()
    layer = HoyerSpike(5, per_channel=per_channel)
    layer.v_th.data.fill_(0.3)
    for out in (layer(u), layer.eval()(u), spike(u, 0.3)):
        assert out.requires_grad
        assert out.dtype == dtype
        assert out.shape == u.shape
        assert set(out.detach().double().unique().tolist()) == {0.0, 1.0}  # is_binary, and neither is missing


def test_float16_sums_beyond_its_range_are_right():
    layer = HoyerSpike(10)
    out = layer(torch.ones(2, 10, 100, 100, dtype=torch.float16))  # 200,000 ones; float16 ends at 65,504
    penalty = hoyer_penalty(layer)
    assert penalty.dtype == torch.float32
    assert penalty.item() == 200_000
    assert layer.extremum.item() == 1
    assert bool((out == 1).all())


def test_sums_are_float32_or_wider():
    for dtype, wide in [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        for per_channel in (False, True):
            assert [m.dtype for m in moments(torch.ones(2, 3, dtype=dtype), per_channel=per_channel)] == [wide, wide]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_half_precision_module_keeps_a_running_average(dtype, per_channel):
    layer = HoyerSpike(4, per_channel=per_channel).to(dtype)
    for value in (0.5, 0.25, 0.75):
        layer(torch.full((2, 4), value, dtype=dtype))  # E = value in every channel; averages 1/2, 3/8, 1/2
    assert layer.extremum.dtype == dtype
    torch.testing.assert_close(layer.extremum.float(), torch.full((4,) if per_channel else (), 0.5), atol=5e-3, rtol=0)
    assert layer.num_batches_tracked.item() == 3
    assert layer.eval()(torch.tensor([[0.4, 0.6, -1.0, 3.0]], dtype=dtype)).tolist() == [[0.0, 1.0, 0.0, 1.0]]


def test_bfloat16_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), HoyerSpike(8), nn.Conv2d(8, 4, 3), HoyerSpike(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(2, 3, 12, 12))
    assert out.dtype == torch.bfloat16
    assert is_binary(out)
    penalty = hoyer_penalty(model)
    assert penalty.dtype == torch.float32
    (out.float().mean() + 1e-3 * penalty).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
    assert [model[i].extremum.dtype for i in (2, 4)] == [torch.float32] * 2
    assert all(0 < model[i].extremum < 1 for i in (2, 4))


@pytest.mark.parametrize("per_channel", [False, True])
def test_silent_layer(per_channel):
    layer = HoyerSpike(3, per_channel=per_channel)
    u = torch.tensor([[-1.0, -2.0, 0.0]], requires_grad=True)
    out = layer(u)
    assert out.tolist() == [[0.0, 0.0, 0.0]]
    penalty = hoyer_penalty(layer)
    assert penalty.item() == 0
    (out.sum() + penalty).backward()
    assert u.grad.tolist() == [[0.0, 0.0, 0.0]]
    assert layer.v_th.grad.item() == 0
    assert bool((layer.extremum == 1).all())

    layer(torch.full((1, 3), 0.5))  # E = 0.5, averaged with the silent batch's 1
    assert layer.extremum.unique().tolist() == [0.75]


def test_silent_channel_beside_an_active_one():
    layer = HoyerSpike(2, per_channel=True)
    u = torch.tensor([[-1.0, 0.5], [0.0, 0.5]], requires_grad=True)
    out = layer(u)
    assert out.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert layer.extremum.tolist() == [1.0, 0.5]
    penalty = hoyer_penalty(layer)
    assert penalty.item() == 2  # two equally active neurons in the layer
    (out.sum() + penalty).backward()
    assert u.grad.isfinite().all()


@pytest.mark.parametrize("per_channel", [False, True])
def test_running_average_has_the_weights_1_one_half_one_third_and_then_a_tenth(per_channel):
    layer = HoyerSpike(4, per_channel=per_channel)
    averages = []
    for value in (0.5, 0.25, 0.75, 1.0, *[0.5] * 6, 1.0, 0.25):
        layer(one_active(value))
        averages.append(layer.extremum[2].item() if per_channel else layer.extremum.item())
    expected = [
        *[1 / 2, 3 / 8, 1 / 2, 5 / 8],  # the mean so far, for ten batches
        *[3.0 / 5, 3.5 / 6, 4.0 / 7, 4.5 / 8, 5.0 / 9, 5.5 / 10],
        0.595,  # 0.55 + 0.1 * (1 - 0.55)
        0.5605,  # 0.595 + 0.1 * (0.25 - 0.595)
    ]
    assert averages == pytest.approx(expected)
    assert layer.num_batches_tracked.item() == 12


def test_momentum_is_the_smallest_weight():
    layer = HoyerSpike(4, momentum=0.5)
    averages = []
    for value in (0.5, 0.25, 0.75, 0.25):
        layer(one_active(value))
        averages.append(layer.extremum.item())
    assert averages == pytest.approx([0.5, 0.375, 0.5625, 0.40625])  # weights 1, 1/2, 1/2, 1/2


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.5])
def test_bad_momentum(momentum):
    with pytest.raises(ValueError, match=rf"momentum.*{momentum}"):
        HoyerSpike(4, momentum=momentum)


@pytest.mark.parametrize("per_channel", [False, True])
def test_evaluation_does_not_see_the_rest_of_the_batch(per_channel):
    torch.manual_seed(0)
    layer = HoyerSpike(3, per_channel=per_channel)
    layer(torch.rand(4, 3, 5, 5))
    layer.eval()
    before = layer.state_dict()["extremum"].clone()
    image, mates = torch.rand(1, 3, 5, 5), 0.1 * torch.rand(3, 3, 5, 5)
    together = layer(torch.cat([image, mates]))[:1]
    assert torch.equal(layer(image), together)
    assert torch.equal(layer.extremum, before)
    assert layer.num_batches_tracked.item() == 1
    layer.train()
    assert not torch.equal(layer(image), layer(torch.cat([image, mates]))[:1])  # so the comparison above can fail


@pytest.mark.parametrize("per_channel", [False, True])
def test_evaluation_before_training_uses_an_extremum_of_one(per_channel):
    layer = HoyerSpike(4, per_channel=per_channel).eval()
    assert layer(torch.tensor([[0.99, 1.0, -1.0, 5.0]])).tolist() == [[0.0, 1.0, 0.0, 1.0]]


@pytest.mark.parametrize("per_channel", [False, True])
def test_fixed_is_a_plain_threshold_in_training_and_evaluation(per_channel):
    layer = HoyerSpike(4, per_channel=per_channel, fixed=True)
    layer.v_th.data.fill_(2.0)
    u = torch.tensor([[1.9, 2.0, -1.0, 5.0]])  # the layer's E is 0.98
    assert layer(u).tolist() == [[0.0, 1.0, 0.0, 1.0]]
    c = [0.95, 1.0, 0.0, 1.0]
    assert hoyer_penalty(layer).item() == pytest.approx(sum(c) ** 2 / sum(x * x for x in c))
    assert bool((layer.extremum == 1).all())
    assert layer.eval()(u).tolist() == [[0.0, 1.0, 0.0, 1.0]]


def test_fixed_keeps_an_extremum_of_one_with_the_weights_of_a_trained_layer():
    trained = HoyerSpike(4)
    trained(one_active(0.5))
    fixed = HoyerSpike(4, fixed=True)
    fixed.load_state_dict(trained.state_dict())
    u = torch.tensor([[0.6, 1.0, -1.0, 0.9]])
    assert fixed.train()(u).tolist() == [[0.0, 1.0, 0.0, 0.0]]
    assert fixed.eval()(u).tolist() == [[0.0, 1.0, 0.0, 0.0]]


def two_layers() -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("first", HoyerSpike(2))
    model.add_module("pool", nn.AvgPool1d(2))
    model.add_module("second", HoyerSpike(2, per_channel=True))
    return model


def test_penalty_sums_over_layers():
    # c of the first layer 0, 1, 1/2, 1/2: H = 4 / 1.5 = 8/3 of 4 neurons, E = 3/4: only the 1 fires.
    # Pooled by two: 1/2, 0, so that H = 1 of 2 neurons in the second.
    model = two_layers()
    u = torch.tensor([[[-1.0, 2.0], [0.5, 0.5]]])
    model(u)
    assert {name: h.item() for name, h in hoyer_penalties(model).items()} == pytest.approx(
        {"first": 8 / 3, "second": 1}
    )
    model(u)
    penalty = hoyer_penalty(model)
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx(8 / 3 + 1)
    model(u)
    assert hoyer_penalty(model, "mean").item() == pytest.approx(8 / 3 / 4 + 1 / 2)


def test_penalty_of_a_layer_used_twice_adds_up():
    layer = HoyerSpike(4)
    layer(torch.full((1, 4), 0.5))  # H = 4 of 4 neurons
    layer(torch.full((3, 4), 0.25))  # H = 12 of 12
    layer(one_active(0.5))  # H = 1 of 4
    assert hoyer_penalty(layer).item() == pytest.approx(17)
    layer(torch.full((1, 4), 0.5))
    layer(one_active(0.5))
    assert hoyer_penalty(layer, "mean").item() == pytest.approx(5 / 8)


def test_penalty_is_taken_out():
    model = two_layers()
    u = torch.rand(1, 2, 4)
    model(u)
    first = hoyer_penalty(model)
    with pytest.raises(RuntimeError, match=r"'first'.*2 of 2"):
        hoyer_penalty(model)
    model(u)
    assert torch.equal(hoyer_penalty(model), first)  # nothing left over from the first pass


def test_penalty_names_the_layer_without_a_training_pass_and_loses_nothing():
    model = two_layers()
    with pytest.raises(RuntimeError, match="'first'"):
        hoyer_penalty(model)
    model.first(torch.full((1, 2), 0.5))
    with pytest.raises(RuntimeError, match=r"'second'.*1 of 2"):
        hoyer_penalty(model)
    model.second(torch.full((2, 2), 0.5))
    assert hoyer_penalty(model).item() == pytest.approx(2 + 4)


def test_penalty_of_a_model_without_spike_layers_is_zero():
    penalty = hoyer_penalty(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert penalty.shape == ()
    assert penalty.item() == 0
    assert hoyer_penalties(nn.ReLU()) == {}


def test_penalty_reduction_must_be_known():
    layer = HoyerSpike(4)
    layer(torch.rand(1, 4))
    with pytest.raises(ValueError, match=r"'sum', 'mean', 'network', got 'max'"):
        hoyer_penalty(layer, "max")
    assert hoyer_penalty(layer).item() > 0  # the mistake took nothing out


def test_no_penalty_is_kept_without_gradients():
    layer = HoyerSpike(4)
    with torch.no_grad():
        layer(one_active(0.25))
    with pytest.raises(RuntimeError):
        hoyer_penalty(layer)
    assert layer.extremum.item() == 0.25  # the running average goes on
    layer.eval()(torch.rand(1, 4, requires_grad=True))
    with pytest.raises(RuntimeError):
        hoyer_penalty(layer)


class LayerAndChannel(nn.Module):
    """Both kinds of spike layer, each on its own input: one compilation for the two."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.channel = HoyerSpike(4), HoyerSpike(4, per_channel=True)

    def forward(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(u), self.channel(v)


def test_compiled_layer_equals_the_eager_one():
    torch.manual_seed(0)
    torch.compiler.reset()
    eager, plain = LayerAndChannel(), LayerAndChannel()
    compiled = torch.compile(plain, fullgraph=True)
    upstream = torch.randn(2, 4, 5, 5)
    for step in range(2):
        inputs = [torch.randn(2, 4, 5, 5) for _ in range(2)]
        results = []
        for model, forward in ((eager, eager), (plain, compiled)):
            u, v = (x.clone().requires_grad_() for x in inputs)
            # the second step must find the first one's code: the penalty that was taken out leaves no trace
            stance = "fail_on_recompile" if step and forward is compiled else "default"
            with torch.compiler.set_stance(stance):
                out = forward(u, v)
            penalty = hoyer_penalty(model, "mean")
            model.zero_grad()
            ((out[0] * upstream).sum() + (out[1] * upstream).sum() + penalty).backward()
            gradients = [u.grad, v.grad, *(parameter.grad for parameter in model.parameters())]
            results.append((out, penalty, gradients, [buffer.clone() for buffer in model.buffers()]))
        (out, *rest), (compiled_out, *compiled_rest) = results
        assert all(torch.equal(a, b) for a, b in zip(out, compiled_out, strict=True))
        torch.testing.assert_close(compiled_rest, rest, rtol=1e-4, atol=1e-5)
        assert eager.layer.num_batches_tracked.item() == step + 1


def test_exported_layer_equals_the_eager_one():
    torch.manual_seed(0)
    model = LayerAndChannel()
    model(torch.rand(2, 4, 5, 5), torch.rand(2, 4, 5, 5))
    model.eval()
    exported = torch.export.export(model, (torch.rand(2, 4, 5, 5), torch.rand(2, 4, 5, 5))).module()
    inputs = torch.rand(2, 4, 5, 5), torch.rand(2, 4, 5, 5)
    for out, expected in zip(exported(*inputs), model(*inputs), strict=True):
        assert torch.equal(out, expected)
        assert 0 < expected.mean() < 1


def test_state_dict_has_the_threshold_the_average_and_its_count():
    for per_channel, shape in ((False, ()), (True, (4,))):
        layer = HoyerSpike(4, per_channel=per_channel)
        layer(torch.rand(1, 4))  # the term that waits for hoyer_penalty is no state
        state = layer.state_dict()
        assert {key: tuple(value.shape) for key, value in state.items()} == {
            "v_th": (),
            "extremum": shape,
            "num_batches_tracked": (),
        }
        assert [name for name, _ in layer.named_parameters()] == ["v_th"]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_moments_are_exact_to_float32(dtype, per_channel):
    torch.manual_seed(0)
    c = torch.randn(7, 4, 5, 5).mul(1.5).to(dtype).clamp(0, 1)
    before, dims = c.clone(), (0, 2, 3) if per_channel else (0, 1, 2, 3)
    exact = c.double().sum(dims), c.double().square().sum(dims)
    for found, wanted in zip(moments(c, per_channel=per_channel), exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    assert torch.equal(c, before)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("threshold_per_channel", [False, True])
@pytest.mark.parametrize("fused", [True, False], ids=["fused where it can be", "by torch"])
def test_half_precision_gradients_are_the_formulas(monkeypatch, dtype, threshold_per_channel, fused):
    if not fused:
        monkeypatch.setattr(HoyerSpike, "can_fuse", lambda self, u: False)
    torch.manual_seed(0)
    layer = HoyerSpike(4, threshold_per_channel=threshold_per_channel)
    layer.v_th.data.fill_(0.75)
    u = (1.5 * torch.randn(5, 4, 6, 6)).to(dtype).requires_grad_()
    ds = torch.randn(u.shape).to(dtype)
    found = torch.autograd.grad((layer(u) * ds).sum() + 3 * hoyer_penalty(layer), [u, layer.v_th])
    z = (u / torch.tensor(0.75, dtype=dtype)).detach().double()
    c = z.clamp(0, 1)
    q = c.sum() / c.square().sum()
    dz = torch.where((z > 0) & (z < 1), 3 * 2 * q * (1 - z * q), 0.0)
    dz = dz + torch.where((z > 0) & (z < 2), ds.double() / 2, 0.0)
    dv = -(z * dz).sum((0, 2, 3) if threshold_per_channel else (0, 1, 2, 3)) / 0.75
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0].double(), dz / 0.75, rtol=eps, atol=1e-5)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    # Rounded once, to the dtype of the layer's threshold as it is applied.
    torch.testing.assert_close(found[1].double(), dv, rtol=eps, atol=1e-5)


@pytest.mark.parametrize("threshold_per_channel", [False, True])
def test_compiled_half_precision_equals_the_eager_one(threshold_per_channel):
    torch.manual_seed(0)
    torch.compiler.reset()
    upstream, found = torch.randn(2, 4, 5, 5).bfloat16(), []
    u = torch.randint(-16, 17, (2, 4, 5, 5)) / 8  # so that z is exact
    for backend in (None, "aot_eager"):
        layer, x = HoyerSpike(4, threshold_per_channel=threshold_per_channel), u.bfloat16().requires_grad_()
        if backend:
            layer.compile(backend=backend, fullgraph=True)
        spikes = layer(x)
        penalty = hoyer_penalty(layer)
        found.append((spikes, penalty, *torch.autograd.grad((spikes * upstream).sum() + penalty, [x, layer.v_th])))
    (spikes, penalty, du, dv), (compiled_spikes, compiled_penalty, compiled_du, compiled_dv) = found
    assert torch.equal(spikes, compiled_spikes) and 0 < spikes.mean() < 1
    torch.testing.assert_close(compiled_penalty, penalty)
    torch.testing.assert_close(compiled_du, du)
    torch.testing.assert_close(compiled_dv, dv, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("reduction", ["sum", "mean", "network"])
def test_an_empty_batch_has_no_penalty(reduction):
    layer = HoyerSpike(4).train()
    layer(torch.randn(0, 4, 3, 3, requires_grad=True))
    assert hoyer_penalty(layer, reduction) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # kernel and torch
@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"time_steps": 2}])
def test_an_empty_batch_leaves_the_running_extremum(options, dtype):
    layer = (MultiStepSpike if "time_steps" in options else HoyerSpike)(4, **options).to(dtype).train()
    layer(torch.randn(8, 4, 3, 3, dtype=dtype))
    before, count = layer.extremum.clone(), layer.num_batches_tracked.item()
    assert layer(torch.randn(0, 4, 3, 3, dtype=dtype, requires_grad=True)).shape == (0, 4, 3, 3)
    assert torch.equal(layer.extremum, before) and layer.num_batches_tracked == count == 1
