"""What the compiled attention kernels take, and when they are there. They attach to the ops from C++.

Which calls the CUDA kernels take shows in the sizes and addresses of a call, too: those of the forward are there for
Hopper and for others since sm_80, those of the backward for Hopper alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fusewright_kernels import cpu_kernels, dispatch, library, native
from fusewright_kernels.checks import LOW_PRECISION
from fusewright_kernels.dispatch import Call

_HOPPER = (9, 0)
# Head dimensions are multiples of the one and at most the other; rows begin at multiples of so many bytes, for tensor
# copies and vectors; and a grid has so many blocks along y and z.
_WIDTH_STEP = 8
_WIDEST = 128
_ALIGNMENT = 16
_MOST_BLOCKS = 65535
_TRACED = "a traced graph does not know how tensors are aligned"


def refuse_cpu(call: Call) -> str | None:
    return cpu_kernels.refuse(call, torch.bool)


def refuse_cuda(call: Call) -> str | None:
    if call.device_type != "cuda":
        return f"tensors are on {call.device_type}"
    if call.dtypes[0] not in LOW_PRECISION:
        return f"dtype {call.dtypes[0]} has no compiled kernel"
    return native.cuda_unavailable_reason() or _refuse_devices()


@functools.cache
def _refuse_devices() -> str | None:
    """Of the ninth generation only Hopper: its kernels run on nothing else, and it runs no others."""
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if capability[0] != 8 and capability != _HOPPER:
            return f"a device has compute capability {capability[0]}.{capability[1]}, the kernels need 8.x or 9.0"
    return None


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == _HOPPER


def forward_backend_of(backend: str, forced: bool, arguments: tuple[Any, ...]) -> str:
    """The backend that serves these arguments of ``attention_forward``, of which dispatch chose ``backend``.

    Raises:
        dispatch.RefusedBackendError: ``forced`` and no CUDA kernel takes the call.
    """
    return _backend_of(refuse_forward, backend, forced, arguments)


def backward_backend_of(backend: str, forced: bool, arguments: tuple[Any, ...]) -> str:
    """:func:`forward_backend_of` for ``attention_backward``; ``arguments`` are those of the forward."""
    return _backend_of(refuse_backward, backend, forced, arguments)


def _backend_of(refuse: Callable[..., str | None], backend: str, forced: bool, arguments: tuple[Any, ...]) -> str:
    if backend != "cuda":
        return backend
    reason = refuse(*arguments)
    if reason is None:
        return backend
    query, mask = arguments[0], arguments[3]
    dtypes = (query.dtype,) if mask is None else (query.dtype, mask.dtype)
    return dispatch.hand_on("attention", query.device.type, dtypes, query.ndim, backend, reason, forced)


def decode_backend_of(backend: str, forced: bool, query: Tensor, key_cache: Tensor, value_cache: Tensor) -> str:
    """:func:`backend_of` for ``attention_decode``."""
    if backend != "cuda":
        return backend
    reason = refuse_decode(query, key_cache, value_cache)
    if reason is None:
        return backend
    return dispatch.hand_on("attention_decode", query.device.type, (query.dtype,), query.ndim, backend, reason, forced)


def refuse_decode(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> str | None:
    """Why the CUDA kernels do not take the call, as ``csrc/cuda/attention/attention_decode.cu`` says, or None."""
    if torch.compiler.is_compiling() or isinstance(query, FakeTensor):
        return _TRACED
    if torch._C._are_functorch_transforms_active():
        return "inside a transform of torch.func tensors have no address"
    reason = _refuse_widths(query, value_cache)
    if reason is not None:
        return reason
    batch, heads, queries, _ = query.shape
    if min(batch, heads, queries) < 1 or max(batch, heads * queries) > _MOST_BLOCKS:
        return f"query.shape is {tuple(query.shape)}, it takes none that is empty or has more than {_MOST_BLOCKS} rows"
    if not all(_is_aligned(tensor, tensor.stride()[:3]) for tensor in (query, key_cache, value_cache)):
        return f"rows of query or cache do not begin at multiples of {_ALIGNMENT} bytes"
    return None


def _is_aligned(tensor: Tensor, strides: Sequence[int]) -> bool:
    size = tensor.element_size()
    return tensor.data_ptr() % _ALIGNMENT == 0 and all(step * size % _ALIGNMENT == 0 for step in strides)


def backward_overload(backend: str) -> torch._ops.OpOverload:
    """That of ``backend``, its results repeatable where torch asks for that."""
    ordered = backend == "cuda" and torch.are_deterministic_algorithms_enabled()
    return library.overload("attention_backward_ordered" if ordered else "attention_backward", backend)


def refuse_forward(
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
) -> str | None:
    """Why no CUDA kernel takes the call, as ``csrc/cuda/attention/attention.cu`` says, or None.

    A traced graph is not theirs: it does not know the addresses that tensors will have.
    """
    if torch.compiler.is_compiling() or isinstance(query, FakeTensor):
        return _TRACED
    extras = {
        "mask": mask, "pattern": block_mask, "alibi_slopes": alibi_slopes, "sinks": sinks, "dropout": seed,
    }  # fmt: skip
    given = [name for name, extra in extras.items() if extra is not None]
    if softcap != 0.0:
        given.append("softcap")
    if given:
        return f"it has no {' and no '.join(given)}"
    if not 0.0 < scale < float("inf"):
        return f"scale is {scale}, it takes a positive one"
    reason = _refuse_widths(query, value)
    if reason is not None:
        return reason
    if min(*query.shape, *key.shape) < 1 or max(query.shape[:2]) > _MOST_BLOCKS:
        shapes = f"query.shape is {tuple(query.shape)} and key.shape {tuple(key.shape)}"
        return f"{shapes}, it takes none that is empty or has more than {_MOST_BLOCKS} batches or heads"
    if not all(_is_aligned(tensor, _used_strides(tensor)) for tensor in (query, key, value)):
        return f"rows of query, key or value do not begin at multiples of {_ALIGNMENT} bytes"
    return None if cu_seqlens_q is None else _refuse_tensor_copies("cu_seqlens_q", query, key, value)


def refuse_backward(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> str | None:
    """:func:`refuse_forward` for the backward, which is Hopper's."""
    return refuse_forward(query, key, value, *others) or _refuse_tensor_copies("its backward", query, key, value)


def _refuse_tensor_copies(what: str, *tensors: Tensor) -> str | None:
    """Why Hopper's kernels, whose tensor copies take no row twice, do not take ``what``, or None."""
    if tensors[0].is_cuda and not _is_hopper(tensors[0].device):
        return f"{what} needs a device of compute capability 9.0"
    if not all(min(_used_strides(tensor), default=1) > 0 for tensor in tensors):
        return f"{what} takes no query, key or value whose rows repeat"
    return None


def _used_strides(tensor: Tensor) -> list[int]:
    """Those that lead from row to row: not that of a dimension of one."""
    return [step for size, step in zip(tensor.shape[:3], tensor.stride(), strict=False) if size > 1]


def _refuse_widths(query: Tensor, value: Tensor) -> str | None:
    widths = query.shape[3], value.shape[3]
    if all(_WIDTH_STEP <= width <= _WIDEST and width % _WIDTH_STEP == 0 for width in widths):
        return None
    return f"head dimensions are {widths[0]} and {widths[1]}, it takes multiples of {_WIDTH_STEP} up to {_WIDEST}"
