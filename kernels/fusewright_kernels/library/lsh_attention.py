"""Schemas of LSH attention: hashing, sorting, attention within chunks of sorted positions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels.library.registry import define

# More than any number of buckets: they are 32-bit numbers in the kernels.
ANY_BUCKETS = 2**31 - 1

# lsh_rotations: standard normal (H, D, R, columns) float32 drawn by a generator of the device that is seeded with
# `seed` (int64 (1,)). Opaque to a trace, which knows no generators.

define(
    "lsh_rotations",
    "(Tensor seed, int heads, int width, int rounds, int columns) -> Tensor",
    lambda seed, heads, width, rounds, columns: seed.new_empty((heads, width, rounds, columns), dtype=torch.float32),
)


# lsh_hash: bucket of each vector in each round, (B, H, R, T) int64. vectors (B, H, T, D) with unit last stride; each of
# `rotations` (H, D, R, NB_f / 2) gives one digit of the bucket, the first the lowest: the index of the largest among
# the rotated coordinates and their negatives. Where key_padding_mask (B, T) is true: the bucket behind the last.


def _lsh_hash_fake(vectors: Tensor, rotations: Sequence[Tensor], key_padding_mask: Tensor | None) -> Tensor:
    batch, heads, length, _ = vectors.shape
    return vectors.new_empty((batch, heads, rotations[0].shape[2], length), dtype=torch.int64)


define("lsh_hash", "(Tensor vectors, Tensor[] rotations, Tensor? key_padding_mask) -> Tensor", _lsh_hash_fake)

# lsh_sort: positions in order of (bucket, position): buckets (B, H, R, T) int64, each in [0, n_buckets)
# -> (B, H, R, T) int32.

define(
    "lsh_sort",
    f"(Tensor buckets, int n_buckets={ANY_BUCKETS}) -> Tensor",
    lambda buckets, n_buckets=ANY_BUCKETS: buckets.new_empty(buckets.shape, dtype=torch.int32),
)

# lsh_attention: the sorted positions of each round are cut into chunks of chunk_length <= T, the last one maybe
# shorter, and the chunks of all rounds form one ring. Query i in chunk c meets the keys in chunks c - chunks_before to
# c + chunks_after of the ring, once for each place where they meet; itself it never meets. One softmax runs over all
# its copies, with logits scale * x_i x_j / |x_j|.
#   query_key, value   (B, H, T, D) and (B, H, T, DV), unit last strides
#   order              int32 (B, H, R, T), of lsh_sort
#   buckets            int64 (B, H, R, T): only pairs of the same bucket and round meet; None: all of a window
#   key_padding_mask   bool (B, T): true is met by nobody
#   is_causal          only earlier positions are met
#   allow_duplicates   if false, each key counts once: its copies share its weight
#   seed               int64 (1,) for dropout: the copy at place n of the window of position i in round r is column n of
#                      row ((b * H + h) * R + r) * T + i of philox.keep_mask
# statistics (2, B, H, T) float32 (float64 for float64): a reference near the largest logit of the row and the sum of
# exp(logit - reference). A row that meets nobody sees itself alone: its output is its value, its sum is 0 and its
# reference its own logit scale * |x_i|.

_LSH_INPUTS = (
    "Tensor query_key, Tensor value, Tensor order, Tensor? buckets, Tensor? key_padding_mask, Tensor? seed,"
    " int chunk_length, int chunks_before, int chunks_after, bool is_causal, float scale, bool allow_duplicates,"
    " float dropout_p"
)


def _lsh_forward_fake(query_key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    statistics_dtype = torch.promote_types(query_key.dtype, torch.float32)
    return (
        value.new_empty(value.shape),
        query_key.new_empty((2, *query_key.shape[:3]), dtype=statistics_dtype),
    )


define("lsh_attention_forward", f"({_LSH_INPUTS}) -> (Tensor output, Tensor statistics)", _lsh_forward_fake)


def _lsh_backward_fake(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    query_key: Tensor,
    value: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    return query_key.new_empty(query_key.shape), value.new_empty(value.shape)


define(
    "lsh_attention_backward",
    f"(Tensor grad_output, Tensor? grad_lse, Tensor output, Tensor statistics, {_LSH_INPUTS})"
    " -> (Tensor grad_query_key, Tensor grad_value)",
    _lsh_backward_fake,
)
