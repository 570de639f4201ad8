"""The layer in a few kernels is the layer: compiled for the CPU here, where no GPU is needed."""

from __future__ import annotations

import copy

import pytest
import torch

from backbones import HoyerSpike

SHAPES = [(4, 6, 5, 5), (4, 6), (2, 6, 1, 1), (8, 6, 16, 12)]


def layers(**options) -> tuple[HoyerSpike, HoyerSpike]:
    """A layer and its copy that is fused wherever it is."""
    plain = HoyerSpike(6, **options)
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


def test_of_a_potential_with_gaps() -> None:
    plain, fused = layers()
    u = torch.randn(4, 12, 5, 5, generator=torch.Generator().manual_seed(0))[:, ::2]
    for one, other in zip(one_pass(plain, u, u), one_pass(fused, u, u), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_bfloat16_differs_by_rounding_alone() -> None:
    plain, fused = layers()
    u = torch.randn(8, 6, 16, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    one, other = one_pass(plain, u, u), one_pass(fused, u, u)
    assert (one[0] != other[0]).float().mean() < 0.01
    torch.testing.assert_close(other[1], one[1], rtol=2e-3, atol=0)
    torch.testing.assert_close(other[4], one[4], rtol=2e-3, atol=0)


def test_silent_layer_has_no_gradient_of_h() -> None:
    _, fused = layers()
    spikes, penalty, du, *_ = one_pass(fused, torch.full((2, 6, 3, 3), -2.0), torch.ones(2, 6, 3, 3))
    assert spikes.sum() == penalty == du.abs().sum() == 0


def test_is_for_gpus_alone() -> None:
    assert not HoyerSpike(6).can_fuse(torch.randn(2, 6))


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


def test_what_has_more_than_one_threshold_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backbones.hoyer.has_triton", lambda: True)
    u = torch.randn(2, 6).as_subclass(OnGpu)
    assert HoyerSpike(6).can_fuse(u)
    assert not HoyerSpike(6).eval().can_fuse(u)
    with torch.no_grad():
        assert not HoyerSpike(6).can_fuse(u)
    for options in ({"per_channel": True}, {"threshold_per_channel": True}, {"sync": True}):
        assert not HoyerSpike(6, **options).can_fuse(u), options
