"""Memory guards: what a kernel reads or writes beside its tensors, and what it reads before writing.

* :func:`guarded` puts a tensor into a larger buffer of NaN. A read past the tensor puts NaN into the result, a write
  past it changes the buffer.
* :func:`guarded_allocations` does the same with the buffers that an op allocates itself.
* :func:`poisoned_allocations` fills fresh memory, so that a value read before it is written is seen.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright.testing.errors import bits

BAND_BYTES = 256
"""Bytes of guard on either side: a multiple of every vector width, to keep the alignment of an ordinary tensor."""

_INTEGER_PATTERN = 0x5A
_MALLOPT_PERTURB = -6
# Freed memory holds this byte and fresh memory its complement 0x7F: 3.4e38 as float32 and bfloat16, NaN as float16.
_PERTURB_BYTE = 0x80
_FRESH_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class GuardedTensor:
    """A tensor inside a larger buffer whose every other element is NaN (a byte pattern for integers).

    ``tensor`` has the asked shape and strides (not negative); gaps between its elements are guarded as well.
    """

    def __init__(
        self,
        shape: Sequence[int],
        stride: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        offset: int = 0,
    ) -> None:
        """``offset``: elements to shift the tensor by, from an address aligned as a fresh tensor is."""
        shape = tuple(shape)
        stride = _contiguous_stride(shape) if stride is None else tuple(stride)
        if len(stride) != len(shape) or any(step < 0 for step in stride):
            raise ValueError(f"stride is {stride}, expected {len(shape)} steps that are not negative")
        span = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        band = BAND_BYTES // dtype.itemsize
        buffer = torch.zeros(band + offset + span + band, dtype=dtype, device=device)
        if dtype.is_floating_point:
            buffer.fill_(float("nan"))
        else:
            buffer.view(torch.uint8).fill_(_INTEGER_PATTERN)
        self._buffer_bits = bits(buffer)
        self.tensor = buffer.as_strided(shape, stride, band + offset)
        self._guard = torch.ones(buffer.numel(), dtype=torch.bool, device=device)
        if span:
            self._guard.as_strided(shape, stride, band + offset).fill_(False)
        self._pattern = self._buffer_bits[0].clone()

    def check(self, name: str = "tensor") -> None:
        """Raise ``AssertionError`` if anything beside the elements of the tensor has been written."""
        touched = (self._guard & (self._buffer_bits != self._pattern)).nonzero().flatten()
        if touched.numel():
            first = self.tensor.storage_offset()
            places = ", ".join(str(index - first) for index in touched[:8].tolist())
            raise AssertionError(f"{name}: {touched.numel()} elements beside it were written, at offsets {places}")


def guarded(tensor: Tensor, offset: int = 0) -> GuardedTensor:
    """A copy of ``tensor`` in its own strides inside a guarded buffer, ``offset`` elements off the usual alignment."""
    copy = GuardedTensor(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, offset)
    target, source = copy.tensor, tensor.detach()
    for dim, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if step == 0 and size > 1:
            target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    target.copy_(source)
    return copy


def assert_no_nan(*tensors: Tensor | None) -> None:
    """No result holds NaN: nothing was read from a guard or from fresh memory."""
    for index, tensor in enumerate(tensors):
        if tensor is not None and tensor.isnan().any():
            raise AssertionError(f"result {index} holds {int(tensor.isnan().sum())} NaN, expected none")


class AllocationGuard(TorchDispatchMode):
    """Gives the ops of one namespace guarded buffers for what they allocate; see :func:`guarded_allocations`."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.buffers: list[tuple[str, GuardedTensor]] = []
        self._running: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == self.namespace:
            return self._run_with_guards(func, args, kwargs)
        result = func(*args, **kwargs)
        if self._running is None or func.overloadpacket.__name__ not in _FRESH_ALLOCATIONS:
            return result
        buffer = GuardedTensor(result.shape, result.stride(), result.dtype, result.device)
        self.buffers.append((self._running, buffer))
        return buffer.tensor

    def _run_with_guards(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call the kernel below this mode, with the mode back on for the allocations that it makes."""
        tensors = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, Tensor)]
        backend_key = "CUDA" if any(tensor.is_cuda for tensor in tensors) else "CPU"
        outer, self._running = self._running, str(func)
        try:
            with self:
                return func._op_dk(torch._C.DispatchKey.__members__[backend_key], *args, **kwargs)
        finally:
            self._running = outer

    def check(self) -> None:
        for op, buffer in self.buffers:
            buffer.check(f"a buffer allocated by {op}")


@contextmanager
def guarded_allocations(namespace: str = "fusewright") -> Iterator[AllocationGuard]:
    """Inside the block, buffers that ops of ``namespace`` allocate are filled with NaN and stand between NaN bands.

    The bands are checked at the end. ``buffers`` of the yielded guard tells what was guarded: an allocation that does
    not go through torch's dispatcher is not seen.
    """
    with AllocationGuard(namespace) as guard:
        yield guard
    guard.check()


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside the block, fresh memory holds NaN or, where torch does not fill it, huge values.

    torch fills what its own empty functions return in deterministic mode, which is on inside the block. Memory that a
    compiled op takes past them comes from the C library, whose allocator fills it where that is glibc.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # its attribute is a property of the module, unknown to type checkers
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only if deterministic else True)
    settings.fill_uninitialized_memory = True
    allocator_poisoned = _perturb_allocator(_PERTURB_BYTE)
    try:
        yield
    finally:
        if allocator_poisoned:
            _perturb_allocator(int(os.environ.get("MALLOC_PERTURB_", "0")))
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _perturb_allocator(byte: int) -> bool:
    """Let glibc fill memory it hands out and takes back; False where the C library is another."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    return hasattr(libc, "gnu_get_libc_version") and libc.mallopt(_MALLOPT_PERTURB, byte) == 1


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        stride[dim] = stride[dim + 1] * max(shape[dim + 1], 1)
    return tuple(stride)
