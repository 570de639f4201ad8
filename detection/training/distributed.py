"""Several processes train as one: decisions, running averages and BatchNorm over all of their images."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from backbones import spike_layers


def any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Each flag, raised if it is raised in any process: all of them then do the same."""
    if accelerator.num_processes == 1:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    return [value > 0 for value in accelerator.reduce(raised, "sum").tolist()]


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give every process the main one's running averages, which are saved: since the last step each has its own."""
    for buffer in model.buffers():
        buffer.copy_(broadcast(buffer))


def synchronise(model: nn.Module, *, spikes: bool, batch_norm: bool) -> nn.Module:
    """`model` with spike layers and BatchNorms that see the images of all processes, under the same names.

    Args:
        model: its spike layers are changed in place.
        spikes: moments summed over the processes, see `backbones.HoyerSpike`.
        batch_norm: torch's SyncBatchNorm, or on the CPU, which that does not know, a `SyncBatchNorm` of ours.
    """
    for layer in spike_layers(model).values():
        layer.sync = spikes
    if not batch_norm:
        return model
    if torch.cuda.is_available():
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    kinds = {nn.BatchNorm2d: SyncBatchNorm, nn.BatchNorm1d: SyncBatchNorm1d}
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))
    return model


def is_broken_connection(error: BaseException) -> bool:
    """Return whether torch.distributed failed, which raises plain RuntimeErrors for some backends."""
    signs = ("gloo", "nccl", "connection", "timed out", "socket")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    )


class _Synchronised(nn.Module):
    """BatchNorm over the images of all processes, on any device.

    y = (x - mean) / sqrt(var + eps) * weight + bias with mean and (biased) variance over all processes in training; the
    running variance is the unbiased one, as in torch.

    Shape: (N, C, *) -> (N, C, *).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            dims, shape = (0, *range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2))
            count = _Sum.apply(wide.new_tensor(x.numel() / x.shape[1]))
            mean = _Sum.apply(wide.sum(dims)) / count
            centred = wide - mean.view(shape)
            var = _Sum.apply(centred.square().sum(dims)) / count
            with torch.no_grad():
                self.num_batches_tracked += 1
                weight = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, weight)
                self.running_var.lerp_(var * count / (count - 1), weight)
            y = centred * (torch.rsqrt(var + self.eps) * self.weight).view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class SyncBatchNorm(_Synchronised, nn.BatchNorm2d):
    """That of maps."""


class SyncBatchNorm1d(_Synchronised, nn.BatchNorm1d):
    """That of vectors."""


class _Sum(torch.autograd.Function):
    """The sum over the processes; so is its gradient."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    backward = forward
