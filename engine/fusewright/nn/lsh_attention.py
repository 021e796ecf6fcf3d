"""Self-attention by locality-sensitive hashing as a module."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright.nn.checks import self_attention_inputs
from fusewright.nn.linear import Linear
from fusewright.nn.lsh_cache import LSHCache
from fusewright_kernels.checks import probability, type_error, value_error


class LSHSelfAttention(nn.Module):
    """Multi-head self-attention among positions that hash alike, :func:`fusewright.functional.lsh_attention`.

    Queries and keys share one projection. Each call draws new rotations from torch's default generator.

    Args:
        embed_dim: E.
        num_heads: H.
        head_dim: D, None is E / H.
        n_hashes, chunk_length, n_buckets, chunks_before, chunks_after, is_causal, scale, attend_across_buckets,
            allow_duplicates: as in the functional.
        dropout: of the attention weights, in training.
        bias: whether the projections have one.

    Shape: (B, T, E) to the same, for any T.

    Source: Kitaev, Kaiser, Levskaya, "Reformer: the efficient transformer", 2020.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        n_hashes: int = 4,
        chunk_length: int = 64,
        n_buckets: int | Sequence[int] | None = None,
        chunks_before: int = 1,
        chunks_after: int = 0,
        is_causal: bool = False,
        scale: float = 1.0,
        attend_across_buckets: bool = True,
        allow_duplicates: bool = True,
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (head_dim is None and embed_dim % num_heads != 0):
            raise value_error("num_heads", num_heads, f"a divisor of embed_dim, {embed_dim}, or head_dim given")
        probability("dropout", dropout)
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.n_hashes, self.chunk_length, self.is_causal = n_hashes, chunk_length, is_causal
        self._options = {
            "n_buckets": n_buckets, "chunks_before": chunks_before,
            "chunks_after": chunks_after, "is_causal": is_causal, "scale": scale,
            "attend_across_buckets": attend_across_buckets, "allow_duplicates": allow_duplicates,
        }  # fmt: skip
        width = num_heads * self.head_dim
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.query_key_proj = Linear(embed_dim, width, **options)
        self.value_proj = Linear(embed_dim, width, **options)
        self.out_proj = Linear(width, embed_dim, **options)

    def forward(
        self,
        hidden: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        n_hashes: int | None = None,
        buckets: Tensor | None = None,
        seed: int | Tensor | None = None,
        cache: LSHCache | None = None,
    ) -> Tensor:
        """
        Args:
            hidden: (B, T, E).
            key_padding_mask: (B, T), bool, True for padding.
            n_hashes: rounds of this call instead of the module's: more of them come closer to full attention.
            buckets, seed: as in the functional.
            cache: the positions before these, of :meth:`make_cache`; these are appended. Into an empty cache they go
                by one full call, behind others each by its own: row t is that of a full call on what came up to t.
        """
        self_attention_inputs(hidden, self.embed_dim, key_padding_mask=key_padding_mask)
        query_key, value = (
            projection(hidden).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projection in (self.query_key_proj, self.value_proj)
        )
        if cache is not None:
            self._check_cache(cache, key_padding_mask=key_padding_mask, n_hashes=n_hashes, buckets=buckets, seed=seed)
            return self._project(self._decode(cache, query_key, value))
        attended = functional.lsh_attention(
            query_key,
            value,
            n_hashes=self.n_hashes if n_hashes is None else n_hashes,
            chunk_length=self.chunk_length,
            key_padding_mask=key_padding_mask,
            buckets=buckets,
            seed=seed,
            dropout_p=self.dropout if self.training else 0.0,
            **self._options,  # type: ignore[arg-type]
        )
        assert isinstance(attended, Tensor)
        return self._project(attended)

    def _project(self, attended: Tensor) -> Tensor:
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def make_cache(self, batch_size: int, capacity: int, seed: int | Tensor | None = None) -> LSHCache:
        """An empty cache for ``batch_size`` sequences of up to ``capacity`` positions, on the parameters' device."""
        n_buckets: Any = self._options["n_buckets"]
        weight = self.value_proj.weight
        return LSHCache(
            batch_size, self.num_heads, capacity, self.head_dim, n_hashes=self.n_hashes, n_buckets=n_buckets,
            chunk_length=self.chunk_length, seed=seed, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip

    def _check_cache(self, cache: object, **others: object) -> None:
        if not isinstance(cache, LSHCache):
            raise type_error("cache", f"a {type(cache).__name__}", "an LSHCache or None")
        if not self._options["is_causal"]:
            raise value_error("is_causal", False, "True where a cache is given")
        for name, argument in others.items():
            if argument is not None:
                raise value_error(name, "given", "None where a cache is given")

    def _decode(self, cache: LSHCache, query_key: Tensor, value: Tensor) -> Tensor:
        names = ("chunks_before", "chunks_after", "scale", "attend_across_buckets", "allow_duplicates")
        options: dict[str, Any] = {name: self._options[name] for name in names}
        options["chunk_length"] = self.chunk_length
        if cache.length == 0:
            cache.append(query_key, value)
            vectors, values, buckets = cache.filled()
            attended = functional.lsh_attention(vectors, values, buckets=buckets, is_causal=True, **options)
            assert isinstance(attended, Tensor)
            return attended
        rows = []
        for new_vector, new_value in zip(query_key.split(1, 2), value.split(1, 2), strict=True):
            cache.append(new_vector, new_value)
            row = functional.lsh_decode_attention(*cache.filled(), **options)
            assert isinstance(row, Tensor)
            rows.append(row)
        return torch.cat(rows, dim=2)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, n_hashes={self.n_hashes}, dropout={self.dropout}"
