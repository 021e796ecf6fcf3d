"""What the compiled attention kernels take, and when they are there. They attach to the ops from C++.

Those for CUDA serve Hopper's plain forward only. As a backend, ``cuda`` is these where they serve and Triton elsewhere.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fusewright_kernels import cpu_kernels, library, native
from fusewright_kernels.attention import backend_triton
from fusewright_kernels.checks import LOW_PRECISION
from fusewright_kernels.dispatch import Call

_HOPPER = (9, 0)
_HOPPER_WIDTHS = (64, 128)
# A row begins at a multiple of this many bytes for Hopper's tensor copies, and a grid has so many blocks along y and z.
_ALIGNMENT = 16
_MOST_BLOCKS = 65535


def refuse_cpu(call: Call) -> str | None:
    return cpu_kernels.refuse(call, torch.bool)


def refuse_cuda(call: Call) -> str | None:
    if call.device_type != "cuda":
        return f"tensors are on {call.device_type}"
    if call.dtypes[0] not in LOW_PRECISION:
        return f"dtype {call.dtypes[0]} has no compiled kernel"
    reason = backend_triton.refuse(call) or native.cuda_unavailable_reason()
    return reason or _refuse_device()


@functools.cache
def _refuse_device() -> str | None:
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if capability != _HOPPER:
            return f"a device has compute capability {capability[0]}.{capability[1]}, the kernels need 9.0"
    return None


def forward_overload(backend: str, arguments: tuple[Any, ...]) -> torch._ops.OpOverload:
    """The overload of ``attention_forward`` that serves these arguments of it."""
    if backend == "cuda" and not hopper_serves(*arguments):
        backend = "triton"
    return library.overload("attention_forward", backend)


def backward_overload(backend: str) -> torch._ops.OpOverload:
    return library.overload("attention_backward", "triton" if backend == "cuda" else backend)


def hopper_serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    block_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    *window: int | bool,
) -> bool:
    """Whether Hopper's forward takes the call, as ``csrc/cuda/attention/attention.cu`` says.

    A traced graph keeps to Triton: it does not know the addresses that tensors will have.
    """
    if torch.compiler.is_compiling() or isinstance(query, FakeTensor):
        return False
    extras = (mask, block_mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k)
    if any(extra is not None for extra in extras) or softcap != 0.0 or not 0.0 < scale < float("inf"):
        return False
    width = query.shape[3]
    if width not in _HOPPER_WIDTHS or value.shape[3] != width:
        return False
    if min(*query.shape, *key.shape) < 1 or max(query.shape[:2]) > _MOST_BLOCKS:
        return False
    return all(_takes_tensor_map(tensor) for tensor in (query, key, value))


def _takes_tensor_map(tensor: Tensor) -> bool:
    if tensor.data_ptr() % _ALIGNMENT != 0:
        return False
    steps = [step for size, step in zip(tensor.shape[:3], tensor.stride(), strict=False) if size > 1]
    return all(step > 0 and step * tensor.element_size() % _ALIGNMENT == 0 for step in steps)
