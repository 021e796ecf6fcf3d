"""One documented function per op.

Tensors may have any strides; nothing is copied to make it contiguous. Every function takes ``backend``: ``"cpu"``,
``"triton"``, ``"cuda"`` or ``"reference"`` forces one and raises if it cannot serve the call; None picks the best.
Arguments that cannot be served raise ``ValueError`` or ``TypeError``, both also ``RuntimeError``, before any kernel
runs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusewright.recurrent_functional import gru as gru
from fusewright.recurrent_functional import gru_cell as gru_cell
from fusewright.recurrent_functional import lstm as lstm
from fusewright.recurrent_functional import lstm_cell as lstm_cell
from fusewright.recurrent_functional import rnn_relu as rnn_relu
from fusewright.recurrent_functional import rnn_relu_cell as rnn_relu_cell
from fusewright.recurrent_functional import rnn_tanh as rnn_tanh
from fusewright.recurrent_functional import rnn_tanh_cell as rnn_tanh_cell
from fusewright_kernels.attention import op as _attention
from fusewright_kernels.linear_attention import op as _linear_attention
from fusewright_kernels.lsh_attention import op as _lsh_attention
from fusewright_kernels.normalization import op as _normalization
from fusewright_kernels.softmax import op as _softmax


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    zero_centered_weight: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation over the trailing dimensions: ``(x - mean) / sqrt(variance + eps) * weight + bias``.

    Statistics and sums are float32, by two passes over a row that is read from memory once.

    Args:
        input: (*, *normalized_shape), float32, bfloat16, float16 or float64.
        normalized_shape: the trailing sizes normalised over.
        weight: normalized_shape, of any floating dtype (float64 only with float64), or None for 1.
        bias: normalized_shape, likewise, or None for 0.
        eps: added to the variance, finite and >= 0.
        zero_centered_weight: multiply by ``1 + weight`` (a weight that is trained from 0).
        out: contiguous tensor like ``input`` to write to; not differentiable.

    Returns:
        A contiguous tensor of input's shape and dtype (``out`` if given). Under CUDA autocast float32, as torch.

    Source: Ba, Kiros, Hinton, "Layer normalization", 2016; torch.nn.functional.layer_norm.
    """
    return _normalization.norm(input, normalized_shape, weight, bias, eps, True, zero_centered_weight, out, backend)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    zero_centered_weight: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Root-mean-square normalisation over the trailing dimensions: ``x / sqrt(mean(x^2) + eps) * weight``.

    Args:
        input: (*, *normalized_shape), float32, bfloat16, float16 or float64.
        normalized_shape: the trailing sizes normalised over.
        weight: normalized_shape, of any floating dtype (float64 only with float64), or None for 1.
        eps: added to the mean square; None is the machine epsilon of the type that statistics are computed in
            (float32, for float64 float64), as torch.
        bias: normalized_shape, added last, or None for 0.
        zero_centered_weight: multiply by ``1 + weight``, as Gemma does.
        out: contiguous tensor like ``input`` to write to; not differentiable.

    Returns:
        A contiguous tensor of input's shape and dtype (``out`` if given). Under CUDA autocast float32, as torch.

    Source: Zhang, Sennrich, "Root mean square layer normalization", 2019; torch.nn.functional.rms_norm.
    """
    return _normalization.norm(input, normalized_shape, weight, bias, eps, False, zero_centered_weight, out, backend)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    zero_centered_weight: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``new_residual = dropout(input) + residual`` and its layer normalisation, in one pass over memory.

    The norm is that of ``new_residual`` as it is returned, rounded to ``residual_dtype``.

    Args:
        input: (*, *normalized_shape), a sublayer's output.
        residual: input's shape, input's dtype or float32.
        normalized_shape, weight, bias, eps, zero_centered_weight: as in :func:`layer_norm`.
        dropout_p: probability in [0, 1] that an element of ``input`` is dropped; the others are scaled by 1 / (1 - p).
        seed: seed of the dropout mask, an int or an int64 tensor of one element; the mask is a function of it alone.
            None draws one from torch's default generator.
        residual_dtype: dtype of ``new_residual``, input's or float32; residual's if None.

    Returns:
        ``(normalised, new_residual)``, contiguous, of input's shape; ``normalised`` has input's dtype.
    """
    return _normalization.add_norm(
        input, residual, normalized_shape, weight, bias, eps, True,
        dropout_p, seed, residual_dtype, zero_centered_weight, backend,
    )  # fmt: skip


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    zero_centered_weight: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``new_residual = dropout(input) + residual`` and its RMS normalisation, in one pass over memory.

    Arguments and returns are those of :func:`add_layer_norm`; ``eps`` and ``bias`` as in :func:`rms_norm`.
    """
    return _normalization.add_norm(
        input, residual, normalized_shape, weight, bias, eps, False,
        dropout_p, seed, residual_dtype, zero_centered_weight, backend,
    )  # fmt: skip


def softmax(
    input: Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``exp(x - max) / sum(exp(x - max))`` along ``dim``.

    Args:
        input: any shape, float32, bfloat16, float16 or float64.
        dim: the dimension that sums to one.
        dtype: dtype of the result; input's if None.
        out: contiguous tensor of input's shape and the result's dtype to write to; not differentiable.

    Returns:
        A contiguous tensor of input's shape (``out`` if given). A row of only -inf is NaN, as in torch.

    Source: torch.nn.functional.softmax.
    """
    return _softmax.softmax(input, dim, dtype, out=out, backend=backend)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    pattern: _attention.Pattern | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * query key^T + biases) value`` without ever holding the (T, S) matrix.

    A call of ``torch.nn.functional.scaled_dot_product_attention`` works unchanged. Sums and statistics are float32;
    rows that see no key give 0; a masked key or value reaches nothing, whatever it holds. All keywords combine, and
    all but ``alibi_slopes`` have gradients.

    Args:
        query: (..., H, T, D), float32, bfloat16, float16 or float64 (float64 by the plain formula).
        key: (..., HK, S, D), query's dtype. Leading dimensions broadcast.
        value: (..., HK, S, DV), query's dtype; DV may differ from D.
        attn_mask: broadcasts to (..., H, T, S): bool, True takes part, or floating, added to the logits; not together
            with ``is_causal``. A floating mask gets a gradient in its own shape.
        dropout_p: probability in [0, 1] with which a weight is dropped; the others are scaled by 1 / (1 - dropout_p).
        is_causal: query i sees keys up to i (up to i + S - T with ``causal_alignment="bottom_right"``).
        scale: factor of the products, by default 1 / sqrt(D).
        enable_gqa: H may be a multiple of HK: query head h meets key head h // (H / HK).
        window: (left, right): a query sees that many keys before and behind the one it is aligned with, -1 is no limit;
            an int is both.
        softcap: logits become ``softcap * tanh(logit / softcap)``, before biases.
        alibi_slopes: (H,) or (B, H): adds ``-slope * |j - i|``, counted from the key that query i is aligned with.
        sinks: (H,): one more logit per head that takes part in the softmax and has no value.
        pattern: blocks of queries and keys that take part, see :mod:`fusewright.patterns`.
        causal_alignment: ``"top_left"`` or ``"bottom_right"``: where query 0 stands where T differs from S.
        return_lse: also return the log-sum-exp of the logits (..., H, T), float32, sink included, -inf without a key.
        seed: of dropout, an int or an int64 tensor of one element; None draws one from torch's default generator.

    Returns:
        (..., H, T, DV) in query's dtype, in memory as (..., T, H, DV) if query is; with ``return_lse`` a pair.

    Source: Vaswani et al., "Attention is all you need", 2017; Dao, "FlashAttention-2", 2023.
    """
    return _attention.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        window, softcap, alibi_slopes, sinks, pattern, causal_alignment, return_lse, seed, backend,
    )  # fmt: skip


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of several sequences packed one behind the other, without padding.

    Args:
        query: (total T, H, D); rows behind the last sequence give 0.
        key, value: (total S, HK, D) and (total S, HK, DV), H a multiple of HK.
        cu_seqlens_q: (sequences + 1,) int32 or int64: sequence n holds rows [cu[n], cu[n + 1]) of ``query``.
        cu_seqlens_k: likewise for key and value.
        max_seqlen_q, max_seqlen_k: accepted for calls written for other libraries; nothing depends on them.

    The other arguments, and the errors, are those of :func:`scaled_dot_product_attention`, for each sequence.

    Returns:
        (total T, H, DV); with ``return_lse`` also the log-sum-exp (H, total T).
    """
    return _attention.varlen_attention(
        query, key, value, cu_seqlens_q, cu_seqlens_k, dropout_p, is_causal, scale,
        window, softcap, alibi_slopes, sinks, causal_alignment, return_lse, seed, backend,
    )  # fmt: skip


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens over a key/value cache: append in place, then causal attention. No gradient.

    The keys are split over threads, so that one sequence keeps a machine busy.

    Args:
        query: (B, H, T, D): the last T tokens of each sequence, those appended included.
        key_cache, value_cache: (B, HK, capacity, D) and (B, HK, capacity, DV), H a multiple of HK; or with
            ``block_table`` in pages, (pages, HK, page size, D). Any strides, so a cache (B, capacity, HK, D) is passed
            as ``cache.transpose(1, 2)``.
        cache_seqlens: (B,) int32 or int64, how many keys each sequence holds before the call. It is not changed.
        new_key, new_value: (B, HK, new, D) and (B, HK, new, DV): written behind the keys that are there.
        block_table: (B, pages of a sequence) int32 or int64: key j of sequence b lies in page
            ``block_table[b, j // page size]`` at ``j % page size``.
        rotary_cos, rotary_sin: (positions, R) with 2R <= D: turn query and new_key by the angles of their positions.
        rotary_interleaved: pairs are elements (2i, 2i + 1), else (i, i + R).
        window: see only that many keys before each query.
        scale, softcap, alibi_slopes, sinks, return_lse: as in :func:`scaled_dot_product_attention`.

    Returns:
        (B, H, T, DV); with ``return_lse`` also the log-sum-exp (B, H, T).

    Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Kwon et al., "Efficient memory management for
    large language model serving with PagedAttention", 2023.
    """
    return _attention.decode_attention(
        query, key_cache, value_cache, cache_seqlens, new_key, new_value, block_table, rotary_cos, rotary_sin,
        rotary_interleaved, scale, softcap, window, alibi_slopes, sinks, return_lse, backend,
    )  # fmt: skip


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float = 1.0,
    enable_gqa: bool = False,
    *,
    window: int | Sequence[int] | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Additive (Bahdanau) attention: ``softmax(scale * score_weight . tanh(query + key) + mask) value``.

    The sums of queries and keys (B, H, T, S, D) are never held, nor are the scores. Query and key are the projected
    ones: ``W q`` and ``U k`` of the paper.

    Args:
        query: (B, H, T, D), float32, bfloat16, float16 or float64; leading dimensions broadcast, or may be absent.
        key: (B, H, S, D) of query's dtype; (B, HK, S, D) with ``enable_gqa``, HK dividing H.
        value: (B, H, S, DV), likewise.
        score_weight: (D,), or (H, D) for one per head, of any floating dtype; computed in float32.
        attn_mask, dropout_p, is_causal, enable_gqa, window, causal_alignment, return_lse, seed: as in
            :func:`scaled_dot_product_attention`.
        scale: factor of the scores, finite.

    Returns:
        (B, H, T, DV), of query's dtype; with ``return_lse`` the log-sum-exp (B, H, T) beside it.

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and translate", 2015.
    """
    return _attention.additive_attention(
        query, key, value, score_weight, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, causal_alignment,
        return_lse, seed, backend,
    )  # fmt: skip


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    feature_map: str = "elu",
    eps: float = 1e-6,
    state: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by a product of features: ``f(query) sum f(key) value / (f(query) sum f(key) + eps)``.

    Time and memory grow with the length. What was seen is a state of D by DV + 1 a head: passed on, it decodes token by
    token, or carries a sequence from call to call.

    Args:
        query: (B, H, T, D), float32, bfloat16, float16 or float64.
        key: (B, H, S, D), likewise; as many as queries if causal.
        value: (B, H, S, DV), likewise.
        is_causal: position i sees keys 0 to i, and the state.
        key_padding_mask: (B, S), bool: True takes no part, whatever it holds.
        feature_map: f: ``"elu"``, elu(x) + 1, or ``"identity"`` for features of one's own, which should be positive.
        eps: added to the denominator.
        state: (B, H, D, DV + 1), sums of f(key) [value, 1] over earlier positions; differentiable.
        return_state: also return the state with these keys added, float32 (float64 for float64), differentiable.

    Returns:
        (B, H, T, DV), of query's dtype; with ``return_state`` the state beside it. Sums are float32.

    Source: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs: fast autoregressive transformers with linear
    attention", 2020.
    """
    return _linear_attention.linear_attention(
        query, key, value, is_causal, key_padding_mask, feature_map, eps, state, return_state, backend
    )


def lsh_hash(
    vectors: Tensor,
    rotations: Tensor | Sequence[Tensor],
    *,
    key_padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Buckets of vectors by random rotations: close directions often share a bucket.

    A bucket is the number of the largest among the rotated coordinates and their negatives. Sums are float32, the
    rotated vectors are never stored. Has no gradient.

    Args:
        vectors: (B, H, T, D), float32, bfloat16, float16 or float64.
        rotations: (H, D, R, NB / 2) for R rounds of NB buckets, or a sequence of factors (H, D, R, NB_f / 2): each
            gives a digit of the bucket, the first the lowest, and NB is the product of the NB_f.
        key_padding_mask: (B, T), bool: True puts a position into bucket NB, behind all others.

    Returns:
        (B, H, R, T), int64 in [0, NB), NB for padding. A vector without a direction (zero, NaN) gets a valid bucket.

    Source: Andoni et al., "Practical and optimal LSH for angular distance", 2015; Kitaev, Kaiser, Levskaya,
    "Reformer: the efficient transformer", 2020.
    """
    return _lsh_attention.lsh_hash(vectors, rotations, key_padding_mask, backend)


def lsh_attention(
    query_key: Tensor,
    value: Tensor,
    *,
    n_hashes: int = 4,
    chunk_length: int = 64,
    n_buckets: int | Sequence[int] | None = None,
    chunks_before: int = 1,
    chunks_after: int = 0,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    rotations: Tensor | Sequence[Tensor] | None = None,
    buckets: Tensor | None = None,
    seed: int | Tensor | None = None,
    scale: float = 1.0,
    attend_across_buckets: bool = True,
    allow_duplicates: bool = True,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention among positions whose vectors hash alike: time and memory grow with the length, not with its square.

    Each of R rounds sorts the positions by (bucket, position) and cuts them into chunks of C; the chunks of all rounds
    form one ring. A position meets, in every round, those of its own chunk and of the neighbouring ones, with logits
    ``scale * x_i x_j / |x_j|``, and one softmax runs over all it meets, once for each time they meet. It sees itself
    only if it meets nobody in any round. Where T <= C all meet, and nothing is hashed.

    Args:
        query_key: (B, H, T, D), float32, bfloat16, float16 or float64; query and, at unit length, key at once.
        value: (B, H, T, DV), likewise.
        n_hashes: rounds R; ``buckets`` bring their own.
        chunk_length: positions of a chunk C; T need not be a multiple, the last chunk of a round is shorter.
        n_buckets: even, or even factors of it; None is about 2 T / C, in two factors above 128.
        chunks_before, chunks_after: neighbouring chunks met.
        is_causal: only earlier positions are met.
        key_padding_mask: (B, T), bool: True is met by nobody, whatever it holds, and hashes to a bucket of its own.
        rotations: those of :func:`lsh_hash`, instead of drawn ones.
        buckets: (B, H, R, T), int64 from 0 to ``n_buckets``, instead of hashing.
        seed: of the rotations and of dropout; None draws one from torch's default generator.
        scale: factor of the logits; 1 as in the paper's code, ``D ** -0.5`` as in reformer-pytorch.
        attend_across_buckets: if False only positions of the same bucket meet.
        allow_duplicates: if False a key that is met several times counts once (the paper's formula).
        dropout_p: probability with which each weight is set to zero, in [0, 1].
        return_lse: also return the log-sum-exp (B, H, T), float32 (float64 for float64).

    Returns:
        (B, H, T, DV), of value's dtype; with ``return_lse`` the log-sum-exp beside it.

    Source: Kitaev, Kaiser, Levskaya, "Reformer: the efficient transformer", 2020.
    """
    return _lsh_attention.lsh_attention(
        query_key, value, n_hashes, chunk_length, n_buckets, chunks_before, chunks_after, is_causal, key_padding_mask,
        rotations, buckets, seed, scale, attend_across_buckets, allow_duplicates, dropout_p, return_lse, backend,
    )  # fmt: skip
