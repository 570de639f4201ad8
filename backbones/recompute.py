"""Training that keeps less: what is cheap to compute is computed again for the gradient.

Between forward and backward pass autograd keeps the inputs of most operations. In a network of convolutions, BatchNorm
and spikes it is enough to keep what the convolutions give: BatchNorm, pooling, sum, potential and spikes follow from it
in a small part of the time of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .hoyer import fire

aten = torch.ops.aten
# Slow beside the others, and needed by pooling, BatchNorm and spikes in turn: held from the first of them to the last.
POOLING = aten.max_pool2d_with_indices.default
# With training = True these update running averages, of which the operation itself is independent.
BATCH_NORMS = {aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default}
CHEAP = BATCH_NORMS | {
    POOLING,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.relu.default,
    aten.hardtanh.default,
    aten._to_copy.default,
}
# Writes into memory that it is given, and would again: the function that takes its place makes its own.
FIRES = {aten.ge.Tensor_out: fire, aten.ge.Scalar_out: fire}
# A residual stream is a sum of sums, each computed from its beginning: what takes more operations is kept. Pooling,
# BatchNorm and spikes are four together.
MAX_OPERATIONS = 4


@contextmanager
def recompute_activations() -> Iterator[None]:
    """Forward passes that keep the outputs of convolutions and compute cheap operations again for the gradient.

    Outputs, gradients and running averages are those without it, bit for bit where torch computes the spike layers
    there (`HOYER_DET_KERNELS=torch`), as it does here. The backward pass belongs outside:

        with recompute_activations():
            loss = loss_function(model(images), labels)
        loss.backward()

    For eager networks, in any precision, on any device. Every operation costs some microseconds more: it pays where the
    tensors are large. What is compiled decides for itself what it keeps: as little, but copies of weights, too, unless
    those are in the order N, H, W, C, `model.to(memory_format=torch.channels_last)`.
    """
    recorder = _Recorder()
    with torch.autograd.graph.saved_tensors_hooks(recorder.pack, _unpack), recorder:
        yield


class _Operation:
    """A call that can be made again: flat arguments, in which an `_Output` or `_Source` stands for a tensor.

    Attributes:
        num_operations: that have to be made for its result, itself included.
        num_kept: tensors kept for a gradient that it stands for; when the last was asked for, a held result goes.
    """

    __slots__ = ("arguments", "function", "keywords", "num_kept", "num_operations", "result")

    def __init__(self, function: Callable[..., Any], arguments: list[Any], keywords: dict[str, Any]) -> None:
        self.function, self.arguments, self.keywords = function, arguments, keywords
        parts = [part for part in arguments if isinstance(part, _Output)]
        self.num_operations = 1 + sum(part.operation.num_operations for part in parts)
        self.num_kept = 0
        self.result: Any = None

    def compute(self) -> Any:
        result = self.result
        if result is None:
            arguments = [part.compute() if isinstance(part, _Output | _Source) else part for part in self.arguments]
            result = self.function(*arguments, **self.keywords)
            if self.function == POOLING and self.num_kept:
                self.result = result
        return result


class _Output(NamedTuple):
    """A tensor as the output of an operation, number `index` where it has several."""

    operation: _Operation
    index: int | None

    def compute(self) -> Tensor:
        result = self.operation.compute()
        return result if self.index is None else result[self.index]


class _Source(NamedTuple):
    """A tensor that is there anyway, such as a convolution's output or a weight, as of a version."""

    tensor: Tensor
    version: int

    def compute(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} was changed in place between the forward pass in "
                "recompute_activations() and its backward pass, which needs it: call backward first, or leave it out"
            )
        return self.tensor


def _unpack(kept: Tensor | _Output) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    operation = kept.operation
    with torch.no_grad():
        tensor = kept.compute()
    operation.num_kept -= 1
    if operation.num_kept <= 0:
        operation.result = None
    return tensor


class _Recorder(TorchDispatchMode):
    """Notes cheap operations whose outputs are still there; autograd gets the note in place of the output."""

    def __init__(self) -> None:
        super().__init__()
        # By the address of the memory, which is not given away again while there is a weak reference.
        self._known: dict[int, tuple[StorageWeakRef, tuple, _Output]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = function(*args, **kwargs)
        if function in FIRES:  # a change of its output, which is counted after this
            self._note(FIRES[function], list(args), {}, outputs, num_changes=1)
        elif function in CHEAP:
            self._note(function, list(args), kwargs, outputs)
        return outputs

    def pack(self, tensor: Tensor) -> Tensor | _Output:
        """What autograd keeps of a tensor."""
        output = self._find(tensor)
        if output is None:
            return tensor
        output.operation.num_kept += 1
        return output

    def _note(
        self, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], outputs: Any, num_changes: int = 0
    ) -> None:
        for address in [address for address, (memory, *_) in self._known.items() if memory.expired()]:
            del self._known[address]
        several = isinstance(outputs, tuple | list)
        first = outputs[0] if several else outputs
        if first.dim() == 0:
            return
        if function in BATCH_NORMS and args[5]:
            args[3] = args[4] = None
        operation = _Operation(function, [self._describe(argument) for argument in args], kwargs)
        if operation.num_operations > MAX_OPERATIONS:
            return
        for index, tensor in enumerate(outputs if several else (outputs,)):
            if tensor.dim() > 1:  # statistics of a BatchNorm are small
                memory = StorageWeakRef(tensor.untyped_storage())
                output = _Output(operation, index if several else None)
                self._known[memory.cdata] = memory, _layout(tensor, num_changes), output

    def _describe(self, part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        output = self._find(part)
        return _Source(part, part._version) if output is None else output

    def _find(self, tensor: Tensor) -> _Output | None:
        if tensor.layout != torch.strided:
            return None
        memory, layout, output = self._known.get(tensor.untyped_storage()._cdata, (None, None, None))
        return output if memory is not None and layout == _layout(tensor) else None


def _layout(tensor: Tensor, num_changes: int = 0) -> tuple:
    """Differs between views of the same memory, and before and after a change in place; after so many to come."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor._version + num_changes
