"""Exact attention: scaled dot-product, packed, against a cache, and additive."""

from collections.abc import Sequence

from torch import Tensor

from fusewright_kernels.attention import op as _attention


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
