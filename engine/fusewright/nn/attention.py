"""Multi-head attention as a module."""

from typing import Any

import torch
from torch import Tensor, nn

from fusewright.nn.kv_cache import KeyValueCache
from fusewright.nn.multi_head import Projections, argument_error, multi_head_attention, project_memory
from fusewright.nn.paged_kv_cache import PagedKeyValueCache
from fusewright.nn.rolling_kv_cache import RollingKeyValueCache
from fusewright.nn.rotary import RotaryEmbedding
from fusewright_kernels.checks import type_error, value_error


class MultiheadAttention(nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` on fused kernels, for training and inference alike.

    Parameters, ``state_dict``, results and errors are torch's, with three differences: a query that sees no key gives
    the output projection's bias and weights of 0 where torch gives NaN, masks may mix bool and float, and
    ``is_causal`` needs no ``attn_mask``. Attention weights are computed from the log-sum-exp, so asking for them costs
    the memory of the result alone; dropout's random numbers are not torch's.

    Args:
        num_kv_heads: key/value heads, a divisor of ``num_heads``: each serves as many query heads. None is
            ``num_heads``. ``in_proj_weight`` then has ``embed_dim + 2 * num_kv_heads * head_dim`` rows.
        rotary: turns queries and keys by their positions before they meet.
        window: (left, right): a query sees that many keys before and behind its own position, -1 is no limit; an int
            is both.
        Others: as torch.nn.MultiheadAttention.

    Shape: query (T, B, E), key (S, B, kdim), value (S, B, vdim); with ``batch_first`` (B, T, E) and so on, or one
    sequence (T, E). Any floating dtype, that of the parameters.

    Source: Vaswani et al., "Attention is all you need", 2017; Ainslie et al., "GQA: training generalized multi-query
    transformer models from multi-head checkpoints", 2023.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        rotary: RotaryEmbedding | None = None,
        window: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads != 0:
            raise value_error("num_kv_heads", num_kv_heads, f"a divisor of num_heads, {num_heads}")
        if rotary is not None and rotary.dim > self.head_dim:
            raise value_error("rotary.dim", rotary.dim, f"at most the head dimension {self.head_dim}")
        self.rotary, self.window = rotary, window
        if self.num_kv_heads != num_heads:
            self._shrink_keys_and_values(device, dtype)
        if self._is_extended():
            # torch's encoder layer takes a path past forward() where this is True, one that knows nothing of the above.
            self._qkv_same_embed_dim = False

    def _is_extended(self) -> bool:
        return self.num_kv_heads != self.num_heads or self.rotary is not None or self.window is not None

    def _shrink_keys_and_values(self, device: Any, dtype: torch.dtype | None) -> None:
        """Parameters for ``num_kv_heads`` in place of those that torch's constructor made."""
        width = self.num_kv_heads * self.head_dim

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*size, device=device, dtype=dtype))

        if self.in_proj_weight is not None:
            self.in_proj_weight = parameter(self.embed_dim + 2 * width, self.embed_dim)
        else:
            self.k_proj_weight, self.v_proj_weight = parameter(width, self.kdim), parameter(width, self.vdim)
        if self.in_proj_bias is not None:
            self.in_proj_bias = parameter(self.embed_dim + 2 * width)
        if self.bias_k is not None:
            self.bias_k, self.bias_v = parameter(1, 1, width), parameter(1, 1, width)
        self._reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
        projected: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attended values and, if ``need_weights``, the weights.

        Args:
            cache: the keys and values before these: the new ones are appended, and attention is causal. Needs
                ``need_weights=False``, no padding mask, no gradient and no key bias; nothing is dropped. ``attn_mask``,
                if given, is floating, with a column for every place of the cache, and without a window.
            projected: what :meth:`project_memory` made of ``key``, which is ``value``: neither is projected again.
            Others: as torch.nn.MultiheadAttention; ``is_causal`` alone is the causal mask, and with ``attn_mask``
                says that this mask is it. ``attn_mask`` may be (H, T, S), the same for every sequence.

        Returns:
            (T, B, E), (B, T, E) or (T, E) as query, and the weights (B, T, S), or (B, H, T, S) if not averaged, or
            None.
        """
        error = argument_error(
            query, key, value, self.num_heads, (self.embed_dim, self.kdim, self.vdim), self.batch_first,
            key_padding_mask, attn_mask, getattr(cache, "capacity", None), True,
        )  # fmt: skip
        if error is not None:
            if cache is not None or self._is_extended():
                raise error
            # torch serves it (nested tensors) or says in its own words what is wrong.
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if cache is not None:
            self._check_cache(cache, key_padding_mask, need_weights, attn_mask)
        return multi_head_attention(
            query, key, value, self._projections(), batch_first=self.batch_first, key_padding_mask=key_padding_mask,
            attn_mask=attn_mask, is_causal=is_causal, dropout_p=self.dropout if self.training else 0.0,
            need_weights=need_weights, average_attn_weights=average_attn_weights, add_zero_attn=self.add_zero_attn,
            window=self.window, rotary=self.rotary, cache=cache, projected=projected,
        )  # fmt: skip

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of ``memory``, (B, S, E) if ``batch_first`` else (S, B, E), for calls that attend to it."""
        if self.kdim != self.vdim or memory.ndim != 3 or memory.shape[-1] != self.kdim:
            raise value_error("memory.shape", tuple(memory.shape), f"3 sizes, the last {self.kdim}, kdim and vdim")
        return project_memory(memory if self.batch_first else memory.transpose(0, 1), self._projections())

    def _projections(self) -> Projections:
        return Projections(
            self.num_heads, self.num_kv_heads, self.in_proj_weight, self.q_proj_weight, self.k_proj_weight,
            self.v_proj_weight, self.in_proj_bias, self.bias_k, self.bias_v, self.out_proj.weight, self.out_proj.bias,
        )  # fmt: skip

    def _check_cache(
        self, cache: object, key_padding_mask: Tensor | None, need_weights: bool, attn_mask: Tensor | None
    ) -> None:
        if not isinstance(cache, KeyValueCache):
            raise type_error("cache", f"a {type(cache).__name__}", "a KeyValueCache or None")
        if need_weights:
            raise value_error("need_weights", True, "False where a cache is given")
        for name, tensor in (("key_padding_mask", key_padding_mask), ("bias_k", self.bias_k)):
            if tensor is not None:
                raise value_error(name, "given", "None where a cache is given")
        if attn_mask is not None and (attn_mask.dtype is torch.bool or self.window is not None or self.add_zero_attn):
            what = f"given, of {attn_mask.dtype}"
            expected = "floating or None where a cache is given, None with a window or a key of zeros"
            raise value_error("attn_mask", what, expected)

    def make_cache(
        self, batch_size: int, capacity: int, *, page_size: int | None = None, rolling: bool = False
    ) -> KeyValueCache:
        """An empty cache for ``batch_size`` sequences of up to ``capacity`` positions, on the parameters' device.

        Args:
            page_size: positions of a page, for a :class:`PagedKeyValueCache`.
            rolling: drop what lies before the module's window when it is full: a :class:`RollingKeyValueCache`.
        """
        weight = self.out_proj.weight
        sizes = (batch_size, self.num_kv_heads, capacity, self.head_dim)
        placed: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        if rolling:
            left = self.window if self.window is None or isinstance(self.window, int) else self.window[0]
            if left is None or left < 0 or page_size is not None:
                raise value_error("rolling", rolling, "False where the window has no left end or a page_size is given")
            return RollingKeyValueCache(*sizes, window=left, **placed)
        if page_size is not None:
            return PagedKeyValueCache(*sizes, page_size=page_size, **placed)
        return KeyValueCache(*sizes, **placed)
