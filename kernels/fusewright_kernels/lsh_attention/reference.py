"""LSH attention as plain PyTorch: hashing, sorting, and attention within a ring of chunks.

Every round sorts the positions by (bucket, position) and cuts them into chunks of C; the chunks of all rounds form one
ring. A position meets, in each round, the positions of its own chunk and of the chunks before and behind it in the
ring, and one softmax runs over all these copies. Kitaev, Kaiser, Levskaya, "Reformer: the efficient transformer", 2020.

:func:`attention` gathers the chunks and is what a naive program would run; :func:`dense_attention` states the same as
one (T, T) matrix of multiplicities, to check the other against. Low precision is computed in float32 and rounded once.
Every function is made of differentiable operations. Letters: B batch, H heads, T length, D and DV widths, R rounds,
C chunk length, N = R * ceil(T / C) chunks of the ring, W chunks of a window.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_INFINITY = float("inf")

# A vector shorter than this has no direction: as a key it is zero, and no gradient flows into its length.
SHORTEST = 1e-12


def _compute(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def hash_vectors(vectors: Tensor, rotations: Sequence[Tensor], key_padding_mask: Tensor | None) -> Tensor:
    """Bucket of each position (B, H, R, T), int64: the largest of the rotated coordinates and their negatives.

    Several factors (H, D, R, NB_f / 2) give the digits of a number, the first the lowest. Padding gets the bucket
    behind the last. Andoni et al., "Practical and optimal LSH for angular distance", 2015.
    """
    vectors = _compute(vectors)
    buckets = torch.zeros((), dtype=torch.int64, device=vectors.device)
    place_value = 1
    for factor in rotations:
        rotated = torch.einsum("bhtd,hdrn->bhrtn", vectors, factor.to(vectors.dtype))
        buckets = buckets + place_value * torch.cat([rotated, -rotated], dim=-1).argmax(-1)
        place_value *= 2 * factor.shape[-1]
    if key_padding_mask is not None:
        buckets = torch.where(key_padding_mask[:, None, None, :], place_value, buckets)
    return buckets


def sort_positions(buckets: Tensor) -> Tensor:
    """Positions (B, H, R, T) int32 in order of (bucket, position)."""
    return buckets.sort(dim=-1, stable=True).indices.to(torch.int32)


def inverse_norm(vectors: Tensor) -> Tensor:
    """1 / |x| of each vector (..., D) -> (...), 0 where it has no direction."""
    square = vectors.square().sum(-1)
    has_direction = square > SHORTEST**2
    return torch.where(has_direction, torch.where(has_direction, square, 1.0).rsqrt(), 0.0)


class _Windows(NamedTuple):
    """What each position meets in each round, as sorted: (B, H, N, C) positions, each with W * C copies of keys."""

    positions: Tensor  # (B, H, N, C) int64, T where a chunk is not full
    keys: Tensor  # (B, H, N, W * C) positions of the copies, likewise
    visible: Tensor  # (B, H, N, C, W * C)
    counts: Tensor | None  # how many visible copies of the key there are in all, where each key is to count once
    keep: Tensor | None  # dropout's keep mask


def _neighbours(chunks: Tensor, before: int, after: int) -> Tensor:
    """(B, H, N, C) -> (B, H, N, W * C): the chunks from ``before`` to ``after`` of each, round the ring."""
    return torch.cat([chunks.roll(-offset, dims=2) for offset in range(-before, after + 1)], dim=-1)


def _at(table: Tensor, positions: Tensor) -> Tensor:
    """``table`` (B, H, T, ...) at ``positions`` (B, H, ...) in which T, behind the last, reads zeros."""
    padded = torch.cat([table, torch.zeros_like(table[:, :, :1])], dim=2)
    flat = positions.flatten(2)
    index = flat.reshape(*flat.shape, *[1] * (table.ndim - 3)).expand(*flat.shape, *table.shape[3:])
    return padded.gather(2, index).unflatten(2, positions.shape[2:])


def _windows(
    order: Tensor,
    buckets: Tensor | None,
    key_padding_mask: Tensor | None,
    keep: Tensor | None,
    chunk_length: int,
    before: int,
    after: int,
    causal: bool,
    allow_duplicates: bool,
) -> _Windows:
    batch, heads, rounds, length = order.shape
    chunks = -(-length // chunk_length)
    padding = chunks * chunk_length - length
    positions = torch.nn.functional.pad(order.to(torch.int64), (0, padding), value=length)
    positions = positions.reshape(batch, heads, rounds * chunks, chunk_length)
    keys = _neighbours(positions, before, after)
    visible = (keys < length)[..., None, :] & (positions < length)[..., None]
    visible = visible & (positions[..., None] != keys[..., None, :])
    if causal:
        visible = visible & (keys[..., None, :] < positions[..., None])
    if key_padding_mask is not None:
        padded = key_padding_mask[:, None, :].expand(batch, heads, length)
        visible = visible & ~_at(padded, keys)[..., None, :]
    if buckets is not None:
        # Buckets of different rounds differ, as each round has rotations of its own.
        round_of = torch.arange(rounds, device=order.device)[:, None].expand(rounds, length)
        width = buckets.max() + 1 if buckets.numel() > 0 else 1
        sorted_buckets = (buckets + round_of * width).gather(-1, order.to(torch.int64))
        sorted_buckets = torch.nn.functional.pad(sorted_buckets, (0, padding), value=-1).reshape(positions.shape)
        same = sorted_buckets[..., None] == _neighbours(sorted_buckets, before, after)[..., None, :]
        visible = visible & same
    counts = None
    if not allow_duplicates:
        counts = _copies(order, buckets, positions, keys, chunk_length, before, after)
    if keep is not None:
        # Row (b, h, r, i) of the mask is that of position i, so it is brought to the sorted order of the round.
        keep = keep.reshape(batch, heads, rounds, length, keep.shape[-1])
        keep = keep.gather(3, order.to(torch.int64)[..., None].expand_as(keep))
        keep = torch.nn.functional.pad(keep, (0, 0, 0, padding)).reshape(visible.shape)
    return _Windows(positions, keys, visible, counts, keep)


def chunk_of_positions(order: Tensor, chunk_length: int) -> Tensor:
    """Number in the ring of the chunk that holds position i in round r, (B, H, R, T)."""
    rounds, length = order.shape[-2:]
    places = torch.arange(length, device=order.device) // chunk_length
    first = torch.arange(rounds, device=order.device)[:, None] * -(-length // chunk_length)
    chunks = (places + first).expand(order.shape)
    return torch.empty_like(chunks).scatter_(-1, order.to(torch.int64), chunks)


def _copies(
    order: Tensor,
    buckets: Tensor | None,
    positions: Tensor,
    keys: Tensor,
    chunk_length: int,
    before: int,
    after: int,
) -> Tensor:
    """In how many places of all rounds each pair of a window meets, (B, H, N, C, W * C)."""
    rounds, length = order.shape[-2:]
    ring = rounds * -(-length // chunk_length)
    chunk = chunk_of_positions(order, chunk_length)
    counts = torch.zeros((*positions.shape, keys.shape[-1]), dtype=torch.int64, device=order.device)
    for query_round in range(rounds):
        query_chunk = _at(chunk[:, :, query_round], positions)[..., None]
        for key_round in range(rounds) if buckets is None else (query_round,):
            key_chunk = _at(chunk[:, :, key_round], keys)[..., None, :]
            for offset in range(-before, after + 1):
                meets = (query_chunk + offset) % ring == key_chunk
                if buckets is not None:
                    bucket = buckets[:, :, query_round]
                    meets = meets & (_at(bucket, positions)[..., None] == _at(bucket, keys)[..., None, :])
                counts += meets
    return counts


def _statistics(logits: Tensor, windows: _Windows, length: int) -> tuple[Tensor, Tensor]:
    """Maximum and sum of exp(logit - maximum) of each position over all rounds, (B, H, T); -inf and 0 without any."""
    batch, heads = logits.shape[:2]
    flat = windows.positions.flatten(2)
    largest = logits.detach().amax(-1).flatten(2)
    maximum = torch.full((batch, heads, length + 1), -_INFINITY, dtype=logits.dtype, device=logits.device)
    maximum = maximum.scatter_reduce(2, flat, largest, "amax")
    shift = torch.where(maximum == -_INFINITY, 0.0, maximum)
    sums = torch.exp(logits - _at(shift[..., :length], windows.positions)[..., None]).sum(-1).flatten(2)
    total = torch.zeros_like(maximum).scatter_add(2, flat, sums)
    return maximum[..., :length], total[..., :length]


def _logits(query: Tensor, key: Tensor, windows: _Windows, scale: float) -> Tensor:
    logits = torch.matmul(_at(query, windows.positions), _at(key, windows.keys).mT) * scale
    if windows.counts is not None:
        logits = logits - windows.counts.clamp(min=1).to(logits.dtype).log()
    return torch.where(windows.visible, logits, -_INFINITY)


def _weights(logits: Tensor, maximum: Tensor, total: Tensor, windows: _Windows) -> Tensor:
    """Probabilities of the copies, 0 where they take no part."""
    alone = total == 0.0
    shift, factor = torch.where(alone, 0.0, maximum), torch.where(alone, 0.0, 1.0 / torch.where(alone, 1.0, total))
    weights = torch.exp(logits - _at(shift, windows.positions)[..., None])
    return torch.where(windows.visible, weights * _at(factor, windows.positions)[..., None], 0.0)


def _kept(weights: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    if keep is None:
        return weights
    return torch.where(keep, weights * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0), 0.0)


def _finite(tensor: Tensor) -> Tensor:
    return torch.where(torch.isfinite(tensor), tensor, torch.zeros_like(tensor))


def _sum_to_positions(rows: Tensor, positions: Tensor, length: int) -> Tensor:
    """Rows (B, H, N, C, D) of ``positions`` (B, H, N, C) added up per position, (B, H, T, D)."""
    flat, width = positions.flatten(2), rows.shape[-1]
    sums = rows.new_zeros((*rows.shape[:2], length + 1, width))
    sums = sums.scatter_add(2, flat[..., None].expand(*flat.shape, width), rows.flatten(2, 3))
    return sums[:, :, :length]


def _reached(visible: Tensor, rows: Tensor) -> Tensor:
    """Where a sum of ``rows`` over visible pairs holds something that is not finite."""
    return torch.matmul(visible.to(rows.dtype), (~torch.isfinite(rows)).to(rows.dtype)) > 0


def attention(
    query_key: Tensor,
    value: Tensor,
    order: Tensor,
    buckets: Tensor | None,
    key_padding_mask: Tensor | None,
    keep: Tensor | None,
    chunk_length: int,
    before: int,
    after: int,
    causal: bool,
    scale: float,
    allow_duplicates: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, DV) and statistics (2, B, H, T) of ``lsh_attention_forward``, which see in ``library``.

    ``keep`` is dropout's keep mask ((B * H * R * T), W * C) or None.
    """
    length = query_key.shape[2]
    query, values = _compute(query_key), _compute(value)
    inverse = inverse_norm(query)
    windows = _windows(
        order, buckets, key_padding_mask, keep, chunk_length, before, after, causal, allow_duplicates
    )  # fmt: skip
    logits = _logits(query, query * inverse[..., None], windows, scale)
    maximum, total = _statistics(logits, windows, length)
    weights = _weights(logits, maximum, total, windows)
    # A masked value must not reach a result whatever it holds, and 0 * NaN is NaN.
    rows = _at(values, windows.keys)
    products = torch.matmul(_kept(weights, windows.keep, dropout_p), _finite(rows))
    products = torch.where(_reached(windows.visible, rows), float("nan"), products)
    output = _sum_to_positions(products, windows.positions, length)
    alone = total == 0.0
    output = torch.where(alone[..., None], values, output)
    own = query.square().sum(-1) * inverse * scale
    return output.to(value.dtype), torch.stack([torch.where(alone, own, maximum), total])


def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query_key: Tensor,
    value: Tensor,
    statistics: Tensor,
    order: Tensor,
    buckets: Tensor | None,
    key_padding_mask: Tensor | None,
    keep: Tensor | None,
    chunk_length: int,
    before: int,
    after: int,
    causal: bool,
    scale: float,
    allow_duplicates: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of query_key and value."""
    length = query_key.shape[2]
    query, values, grad = _compute(query_key), _compute(value), _compute(grad_output)
    inverse = inverse_norm(query)
    key = query * inverse[..., None]
    windows = _windows(
        order, buckets, key_padding_mask, keep, chunk_length, before, after, causal, allow_duplicates
    )  # fmt: skip
    logits = _logits(query, key, windows, scale)
    maximum, total = statistics[0].to(query.dtype), statistics[1].to(query.dtype)
    alone = total == 0.0
    weights = _weights(logits, maximum, total, windows)
    grads = _at(grad, windows.positions)
    grad_weights = torch.matmul(grads, _at(values, windows.keys).mT)
    grad_weights = torch.where(windows.visible, _kept(grad_weights, windows.keep, dropout_p), 0.0)
    delta = _sum_to_positions((weights * grad_weights).sum(-1, keepdim=True), windows.positions, length)[..., 0]
    if grad_lse is not None:
        delta = delta - grad_lse.to(delta.dtype)
    grad_logits = weights * (grad_weights - _at(delta, windows.positions)[..., None])
    grad_logits = torch.where(windows.visible, grad_logits, 0.0) * scale
    kept = _kept(weights, windows.keep, dropout_p)
    grad_value_rows = torch.matmul(kept.mT, _finite(grads))
    grad_value_rows = torch.where(_reached(windows.visible.mT, grads), float("nan"), grad_value_rows)
    grad_value = _sum_to_positions(grad_value_rows, windows.keys, length)
    grad_value = grad_value + torch.where(alone[..., None], grad, 0.0)
    grad_query = torch.matmul(grad_logits, _finite(_at(key, windows.keys)))
    grad_query = _sum_to_positions(grad_query, windows.positions, length)
    grad_key = torch.matmul(grad_logits.mT, _finite(_at(query, windows.positions)))
    grad_key = _sum_to_positions(grad_key, windows.keys, length)
    # The derivative of x / |x| takes away what points along x.
    along = (key * grad_key).sum(-1, keepdim=True)
    grad_query = grad_query + inverse[..., None] * (grad_key - key * along)
    if grad_lse is not None:
        grad_query = grad_query + torch.where(alone, grad_lse.to(key.dtype) * scale, 0.0)[..., None] * key
    return grad_query.to(query_key.dtype), grad_value.to(value.dtype)


def multiplicities(
    order: Tensor,
    buckets: Tensor | None,
    key_padding_mask: Tensor | None,
    chunk_length: int,
    before: int,
    after: int,
    causal: bool,
    allow_duplicates: bool,
) -> Tensor:
    """How often the softmax of position i counts position j, (B, H, T, T) int64; who meets nobody counts itself."""
    batch, heads, rounds, length = order.shape
    ring = rounds * -(-length // chunk_length)
    chunk = chunk_of_positions(order, chunk_length)
    counts = torch.zeros((batch, heads, length, length), dtype=torch.int64, device=order.device)
    for query_round in range(rounds):
        for key_round in range(rounds) if buckets is None else (query_round,):
            for offset in range(-before, after + 1):
                query_chunk = (chunk[:, :, query_round, :, None] + offset) % ring
                meets = query_chunk == chunk[:, :, key_round, None, :]
                if buckets is not None:
                    meets = meets & (buckets[:, :, query_round, :, None] == buckets[:, :, query_round, None, :])
                counts += meets
    positions = torch.arange(length, device=order.device)
    hidden = positions[:, None] <= positions if causal else positions[:, None] == positions
    if key_padding_mask is not None:
        hidden = hidden | key_padding_mask[:, None, None, :]
    counts = torch.where(hidden, 0, counts if allow_duplicates else counts.clamp(max=1))
    alone = (counts == 0).all(-1, keepdim=True) & (positions[:, None] == positions)
    return counts + alone


def dense_attention(query_key: Tensor, value: Tensor, counts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, DV) and log-sum-exp (B, H, T): a softmax in which each pair has its multiplicity."""
    query, values = _compute(query_key), _compute(value)
    key = query * inverse_norm(query)[..., None]
    logits = torch.matmul(query, key.mT) * scale + counts.to(query.dtype).log()
    return torch.softmax(logits, -1) @ values, logits.logsumexp(-1)


def default_buckets(length: int, chunk_length: int) -> tuple[int, ...]:
    """Factors of the number of buckets: about two chunks' worth of positions share a bucket.

    Above 128 buckets two factors near the square root, so that rotations stay small.
    """
    wanted = 2 * max(1, length // chunk_length)
    if wanted <= 128:
        return (wanted,)
    first = 2 ** math.ceil(math.log2(math.sqrt(wanted)))
    return first, 2 * max(1, round(wanted / (2 * first)))
