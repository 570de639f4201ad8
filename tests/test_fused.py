"""The layer in a few kernels is the layer: by those of the package, and compiled for the CPU, as no GPU is needed."""

from __future__ import annotations

import copy

import pytest
import torch

from backbones import HoyerSpike
from backbones.deploy.events import available, library, training, using

SHAPES = [(4, 6, 5, 5), (4, 6), (2, 6, 1, 1), (8, 6, 16, 12)]


def layers(**options) -> tuple[HoyerSpike, HoyerSpike]:
    """A layer that torch computes, and its copy that is fused wherever it is."""
    plain = HoyerSpike(6, **options)
    plain.can_fuse = lambda u: False
    with torch.no_grad():
        plain.v_th.fill_(-1.3)
    fused = copy.deepcopy(plain)
    fused.can_fuse = lambda u: True
    return plain, fused


def one_pass(layer: HoyerSpike, u: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """Spikes, H, gradients and state of one training pass."""
    u = u.clone().requires_grad_()
    layer.v_th.grad = None
    spikes = layer(u)
    penalty, neurons = layer.take_penalty()
    assert neurons == u.numel()
    assert spikes.dtype == u.dtype
    ((spikes.float() * weights).sum() + 0.3 * penalty).backward()
    return [spikes, penalty, u.grad, layer.v_th.grad, layer.extremum, layer.num_batches_tracked]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fused is compiled."""
    monkeypatch.setattr(training, "takes", lambda u: False)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("fixed", [False, True])
def test_is_the_layer(fixed: bool) -> None:
    plain, fused = layers(fixed=fixed, window=(-0.5, 1.5))
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        u, weights = torch.randn(2, *shape, generator=generator).mul(1.2)
        if len(shape) == 4:
            u = u.contiguous(memory_format=torch.channels_last)
        for one, other in zip(one_pass(plain, u, weights), one_pass(fused, u, weights), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("native", [False, True])
def test_of_a_potential_with_gaps(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    if not native:
        monkeypatch.setattr(training, "takes", lambda u: False)
    plain, fused = layers()
    u = torch.randn(4, 12, 5, 5, generator=torch.Generator().manual_seed(0))[:, ::2]
    for one, other in zip(one_pass(plain, u, u), one_pass(fused, u, u), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("compiled")
def test_compiled_bfloat16_differs_by_rounding_alone() -> None:
    plain, fused = layers()
    u = torch.randn(8, 6, 16, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    one, other = one_pass(plain, u, u), one_pass(fused, u, u)
    assert (one[0] != other[0]).float().mean() < 0.01
    torch.testing.assert_close(other[1], one[1], rtol=2e-3, atol=0)
    torch.testing.assert_close(other[4], one[4], rtol=2e-3, atol=0)


NATIVE = [name for name in available() if name != "torch"]
without_kernels = pytest.mark.skipif(not NATIVE, reason="the package was installed without a compiler")


@without_kernels
@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize("v_th", [1.0, -1.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fixed", [False, True])
def test_kernels_are_the_layer(kernels: str, v_th: float, dtype: torch.dtype, fixed: bool) -> None:
    plain, fused = layers(fixed=fixed, window=(-0.5, 1.5))
    step = 2 * torch.finfo(dtype).eps
    for layer in (plain, fused):
        layer.v_th.data.fill_(v_th)
    generator = torch.Generator().manual_seed(0)
    with using(kernels):
        for shape in [*SHAPES, (3, 6, 33, 41)]:
            u, weights = torch.randn(2, *shape, generator=generator).mul(1.2).to(dtype)
            if len(shape) == 4:
                u = u.contiguous(memory_format=torch.channels_last)
            assert training.takes(u)
            (spikes, penalty, du, dv, *state), found = one_pass(plain, u, weights), one_pass(fused, u, weights)
            assert torch.equal(found[0], spikes)
            torch.testing.assert_close(found[1], penalty, rtol=1e-5, atol=0)
            torch.testing.assert_close(found[2], du, rtol=step, atol=1e-6)  # one step of its type, where sums differ
            assert dtype == torch.float32 or (found[2] != du).sum() <= 0.01 * du.numel()
            torch.testing.assert_close(found[3], dv, rtol=max(step, 1e-5), atol=1e-5)  # rounded, by torch, as u is
            torch.testing.assert_close(found[4:], state, rtol=1e-5, atol=0)


@without_kernels
@pytest.mark.parametrize("kernels", NATIVE)
def test_kernels_give_the_same_whatever_the_threads(kernels: str) -> None:
    u = torch.randn(5, 6, 70, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    one = run_with(kernels, 1, u)
    for threads in (2, 3):
        assert all(map(torch.equal, one, run_with(kernels, threads, u)))


def run_with(kernels: str, threads: int, u: torch.Tensor) -> list[torch.Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with using(kernels):
            return one_pass(layers()[1], u, u)
    finally:
        torch.set_num_threads(before)


@without_kernels
def test_threads_of_the_library_where_torch_has_none_to_lend(monkeypatch: pytest.MonkeyPatch) -> None:
    u = torch.randn(5, 6, 70, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    lent = run_with(NATIVE[0], 2, u)
    monkeypatch.setattr(training, "_torch_threads", lambda: None)
    assert all(map(torch.equal, lent, run_with(NATIVE[0], 2, u)))


@without_kernels
def test_values_that_are_no_numbers_are_not_hidden() -> None:
    u = torch.randn(4, 6, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    u[1, 2, 3] = float("nan")
    spikes, penalty, du, dv, *_ = one_pass(layers()[1], u, u)
    assert spikes[1, 2, 3] == 0 and spikes.isfinite().all()
    assert penalty.isnan() and du[1, 2, 3].isnan() and dv.isnan()


@without_kernels
def test_every_quotient_is_rounded_as_a_division() -> None:
    numbers = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.isfinite() & (numbers >= 2.0**-100) & (numbers < 2.0**100)]
    for v in (1.0, 0.7265625, 1.9921875, 3.015625):
        layer = layers(fixed=True)[1]
        layer.v_th.data.fill_(v)
        expected = (numbers / torch.tensor(v).bfloat16()).ge(1.0)
        assert torch.equal(layer(numbers[:, None].expand(-1, 6)).bool()[:, 0], expected), v
        layer.take_penalty()


def test_without_kernels_torch_computes_and_nobody_is_warned(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(library, "LIBRARY", None)
    assert not HoyerSpike(6).can_fuse(torch.randn(2, 6).bfloat16())
    assert not recwarn.list


def test_silent_layer_has_no_gradient_of_h() -> None:
    _, fused = layers()
    spikes, penalty, du, *_ = one_pass(fused, torch.full((2, 6, 3, 3), -2.0), torch.ones(2, 6, 3, 3))
    assert spikes.sum() == penalty == du.abs().sum() == 0


def test_other_types_are_left_to_torch() -> None:
    for dtype in (torch.float64, torch.float16):
        assert not HoyerSpike(6).can_fuse(torch.randn(2, 6).to(dtype))


@without_kernels
def test_a_tensor_of_another_class_is_left_to_torch() -> None:
    assert HoyerSpike(6).can_fuse(torch.randn(2, 6))
    assert not HoyerSpike(6).can_fuse(torch.randn(2, 6).as_subclass(type("Other", (torch.Tensor,), {})))


def test_who_looks_at_operations_sees_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert not HoyerSpike(6).can_fuse(torch.randn(2, 6))


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


def test_what_has_more_than_one_threshold_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backbones.fused.has_triton", lambda: True)
    u = torch.randn(2, 6).as_subclass(OnGpu)
    assert HoyerSpike(6).can_fuse(u)
    assert not HoyerSpike(6).eval().can_fuse(u)
    with torch.no_grad():
        assert not HoyerSpike(6).can_fuse(u)
    for options in ({"per_channel": True}, {"threshold_per_channel": True}, {"sync": True}):
        assert not HoyerSpike(6, **options).can_fuse(u), options
