"""The default overload of each op: the plain formula in the shape of the op's schema."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import library, philox
from fusewright_kernels.library.lsh_attention import ANY_BUCKETS
from fusewright_kernels.lsh_attention import reference


def lsh_rotations(seed: Tensor, heads: int, width: int, rounds: int, columns: int) -> Tensor:
    generator = torch.Generator(seed.device).manual_seed(int(seed))
    shape = (heads, width, rounds, columns)
    return torch.randn(shape, generator=generator, device=seed.device, dtype=torch.float32)


def lsh_hash(vectors: Tensor, rotations: Sequence[Tensor], key_padding_mask: Tensor | None) -> Tensor:
    return reference.hash_vectors(vectors, rotations, key_padding_mask)


def lsh_sort(buckets: Tensor, n_buckets: int = ANY_BUCKETS) -> Tensor:
    return reference.sort_positions(buckets)


def _keep_mask(
    order: Tensor, seed: Tensor | None, chunk_length: int, before: int, after: int, dropout_p: float
) -> Tensor | None:
    if seed is None or dropout_p == 0.0:
        return None
    return philox.keep_mask(seed, order.numel(), (before + 1 + after) * chunk_length, dropout_p)


def plain_attention(
    query_key: Tensor,
    value: Tensor,
    order: Tensor,
    buckets: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`reference.attention` with the arguments of the op ``lsh_attention_forward``."""
    chunk_length, before, after = arguments[:3]
    keep = _keep_mask(order, seed, chunk_length, before, after, arguments[6])
    return reference.attention(query_key, value, order, buckets, key_padding_mask, keep, *arguments)


def log_sum_exp(statistics: Tensor) -> Tensor:
    """(B, H, T) of the statistics (2, B, H, T)."""
    alone = statistics[1] == 0.0
    return statistics[0] + torch.where(alone, 1.0, statistics[1]).log()


def lsh_attention_forward(query_key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    output, statistics = plain_attention(query_key, value, *arguments)
    return output.contiguous(), statistics


def lsh_attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    query_key: Tensor,
    value: Tensor,
    order: Tensor,
    buckets: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    chunk_length, before, after = arguments[:3]
    keep = _keep_mask(order, seed, chunk_length, before, after, arguments[6])
    gradients = reference.attention_backward(
        grad_output, grad_lse, query_key, value, statistics, order, buckets, key_padding_mask, keep, *arguments
    )
    return gradients[0].contiguous(), gradients[1].contiguous()


def attach() -> None:
    for op in (lsh_rotations, lsh_hash, lsh_sort, lsh_attention_forward, lsh_attention_backward):
        library.attach_reference(op.__name__, op)
