"""Our kernels in the dispatcher slots of torch's flash attention, reached from C++ and from every old reference.

A slot is a plain function of tensors without autograd: torch records its own backward, which is a slot as well. What
ours do not take goes to torch's kernel, fetched before it is overridden.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import dispatch
from fusewright_kernels.attention import op as attention

_NAME = "fusewright"
_CPU_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_CPU_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
_CUDA_FORWARD = "_scaled_dot_product_flash_attention"
_CUDA_BACKWARD = "_scaled_dot_product_flash_attention_backward"

_torch_kernels: dict[str, Any] = {}


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool) -> bool:
    """Whether our kernels serve a call of a slot; forward and backward must give the same answer."""
    if dropout_p != 0.0 or (is_causal and mask is not None) or not query.dtype is key.dtype is value.dtype:
        return False
    sizes, of_key = query.shape, key.shape
    if not len(sizes) == len(of_key) == value.ndim == 4 or 0 in sizes or 0 in of_key or sizes[1] % of_key[1] != 0:
        return False
    if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
        return False
    if mask is not None:
        full = (*sizes[:3], of_key[2])
        if not 2 <= mask.ndim <= 4 or mask.dtype is torch.float64:
            return False
        if any(size not in (1, whole) for size, whole in zip(mask.shape, full[4 - mask.ndim :], strict=True)):
            return False
    dtypes = (query.dtype,) if mask is None else (query.dtype, mask.dtype)
    return dispatch.serves("attention", query.device.type, dtypes, 4)


def _in_strides_of(like: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` in the memory order of ``like``, which compiled graphs take for granted."""
    return tensor if tensor.stride() == like.stride() else like.copy_(tensor)


def _cpu_forward(
    keyset: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    if not _takes(query, key, value, attn_mask, dropout_p, is_causal):
        return _torch_kernels[_CPU_FORWARD].call_boxed(
            keyset, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    output, lse = attention.slot_forward(query, key, value, attn_mask, is_causal, scale)
    batch, heads, length = lse.shape
    return _in_strides_of(torch.empty_like(query), output), _in_strides_of(
        lse.new_empty(batch, length, heads).transpose(1, 2), lse
    )


def _cpu_backward(
    keyset: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    if not _takes(query, key, value, attn_mask, dropout_p, is_causal):
        return _torch_kernels[_CPU_BACKWARD].call_boxed(
            keyset, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    gradients = attention.slot_backward(
        grad_out, query, key, value, out, logsumexp.contiguous(), attn_mask, is_causal, scale
    )
    return tuple(
        _in_strides_of(gradient.new_empty(gradient.transpose(1, 2).shape).transpose(1, 2), gradient)
        for gradient in gradients
    )


def _takes_on_cuda(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool) -> bool:
    # torch's kernel aligns a causal mask at the bottom right, ours at the top left: they agree on squares only.
    square = query.ndim == 4 and query.shape[2] == key.shape[2]
    return (square or not is_causal) and _takes(query, key, value, None, dropout_p, is_causal)


def _cuda_forward(
    keyset: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    if return_debug_mask or not _takes_on_cuda(query, key, value, dropout_p, is_causal):
        return _torch_kernels[_CUDA_FORWARD].call_boxed(
            keyset, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale
        )
    output, lse = attention.slot_forward(query, key, value, None, is_causal, scale)
    # Offsets of packed sequences there are none; the state of dropout's generator is never read without dropout.
    generator = (query.new_empty((2,), dtype=torch.uint64), query.new_empty((), dtype=torch.uint64))
    return (
        _in_strides_of(torch.empty_like(query), output), lse.contiguous(), None, None, query.shape[2], key.shape[2],
        *generator, query.new_empty((0,)),
    )  # fmt: skip


def _cuda_backward(
    keyset: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    if not _takes_on_cuda(query, key, value, dropout_p, is_causal):
        return _torch_kernels[_CUDA_BACKWARD].call_boxed(
            keyset, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
            is_causal, philox_seed, philox_offset, scale=scale,
        )  # fmt: skip
    gradients = attention.slot_backward(
        grad_out, query, key, value, out, logsumexp.contiguous(), None, is_causal, scale
    )
    likes = (query, key, value)
    return tuple(_in_strides_of(torch.empty_like(x), g) for x, g in zip(likes, gradients, strict=True))


class _Overrides:
    """Kernels of ours registered in torch's dispatcher until :meth:`remove`."""

    def __init__(self) -> None:
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        self._override("CPU", {_CPU_FORWARD: _cpu_forward, _CPU_BACKWARD: _cpu_backward})
        self._priority: list[int] | None = None
        if torch.backends.cuda.is_built():
            self._override("CUDA", {_CUDA_FORWARD: _cuda_forward, _CUDA_BACKWARD: _cuda_backward})
            self._put_flash_first()

    def _override(self, device: str, kernels: dict[str, Callable]) -> None:
        assert self._library is not None
        for name, kernel in kernels.items():
            _torch_kernels[name] = torch.library.get_kernel(f"aten::{name}", device)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
                self._library.impl(name, kernel, device, with_keyset=True)

    def _put_flash_first(self) -> None:
        """torch prefers cuDNN on some devices, and would then never call the flash slot."""
        if not hasattr(torch._C, "_set_sdp_priority_order"):
            return
        order = torch._C._get_sdp_priority_order()
        flash = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
        if order[0] != flash:
            self._priority = order
            torch._C._set_sdp_priority_order([flash, *(backend for backend in order if backend != flash)])

    def remove(self) -> None:
        # The dispatcher drops what a Library registered when the Library goes.
        self._library = None
        if self._priority is not None:
            torch._C._set_sdp_priority_order(self._priority)
            self._priority = None


_REGISTRY = ("register", "activate", "restore", "current")


def _has_registry() -> bool:
    return all(hasattr(torch.nn.attention, f"{verb}_flash_attention_impl") for verb in _REGISTRY)


class Slots:
    """Ours in torch's flash slots while installed; by torch's registry of flash implementations where it has one."""

    def __init__(self) -> None:
        self._overrides: _Overrides | None = None
        self._active_before: str | None = None

    def install(self) -> None:
        # Without torch's kernels at hand there is nothing to turn to, so an older torch keeps its slots.
        if not hasattr(torch.library, "get_kernel"):
            return
        if not _has_registry():
            self._overrides = _Overrides()
            return
        self._active_before = torch.nn.attention.current_flash_attention_impl()
        torch.nn.attention.register_flash_attention_impl(_NAME, register_fn=_Overrides)
        torch.nn.attention.activate_flash_attention_impl(_NAME)

    def remove(self) -> None:
        if self._overrides is not None:
            self._overrides.remove()
            self._overrides = None
        elif _has_registry():
            # Whoever activated another implementation meanwhile keeps it; torch removed ours then.
            if torch.nn.attention.current_flash_attention_impl() != _NAME:
                return
            torch.nn.attention.restore_flash_attention_impl()
            if self._active_before is not None:
                torch.nn.attention.activate_flash_attention_impl(self._active_before)
