"""Locality-sensitive hashing and the attention among positions that hash alike."""

from collections.abc import Sequence

from torch import Tensor

from fusewright_kernels.lsh_attention import op as _lsh_attention


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


def lsh_decode_attention(
    query_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    *,
    chunk_length: int = 64,
    chunks_before: int = 1,
    chunks_after: int = 0,
    key_padding_mask: Tensor | None = None,
    scale: float = 1.0,
    attend_across_buckets: bool = True,
    allow_duplicates: bool = True,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The last row of :func:`lsh_attention` on the same buckets: a new position among all that came before.

    Buckets of all positions are sorted, in time that grows with T; of vectors and values only the rows that the new
    position meets are read, at most R chunks' windows.

    Args:
        query_key: (B, H, T, D), float32, bfloat16, float16 or float64, T >= 1; the new position is the last.
        value: (B, H, T, DV), likewise.
        buckets: (B, H, R, T), int64, of :func:`lsh_hash`.
        chunk_length, chunks_before, chunks_after, key_padding_mask, scale, attend_across_buckets, allow_duplicates,
            return_lse: as in :func:`lsh_attention`.

    Returns:
        (B, H, 1, DV), of value's dtype; with ``return_lse`` the log-sum-exp (B, H, 1) beside it.

    Source: Kitaev, Kaiser, Levskaya, "Reformer: the efficient transformer", 2020.
    """
    return _lsh_attention.lsh_decode_attention(
        query_key, value, buckets, chunk_length, chunks_before, chunks_after, key_padding_mask, scale,
        attend_across_buckets, allow_duplicates, return_lse, backend,
    )  # fmt: skip
