"""LSH attention: checks, hashing and sorting, dispatch, autograd."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusewright_kernels import autograd, cpu_kernels, dispatch, library, philox, row_kernels
from fusewright_kernels.checks import probability, value_error
from fusewright_kernels.checks import seed as check_seed
from fusewright_kernels.lsh_attention import backend_reference, backend_triton, checks, decode
from fusewright_kernels.lsh_attention.function import LshAttention
from fusewright_kernels.lsh_attention.reference import default_buckets

backend_reference.attach()
dispatch.register("lsh_attention", {"triton": backend_triton.refuse, "cpu": cpu_kernels.refuse})
# Hashing and sorting, which have kernels in CUDA C++ where the attention has none.
dispatch.register(
    "lsh_hash", {"cuda": row_kernels.refuse_cuda, "triton": backend_triton.refuse, "cpu": cpu_kernels.refuse}
)


def lsh_hash(
    vectors: Tensor, rotations: Tensor | Sequence[Tensor], key_padding_mask: Tensor | None, backend: str | None
) -> Tensor:
    """See :func:`fusewright.functional.lsh_hash`."""
    checks.operand("vectors", vectors)
    factors = checks.rotations(rotations, vectors)
    mask = checks.key_padding_mask(key_padding_mask, vectors)
    return _hash(vectors, factors, mask, _backend("lsh_hash", vectors, backend))


def _backend(op: str, vectors: Tensor, forced: str | None) -> str:
    return dispatch.choose(op, vectors.device.type, (vectors.dtype,), vectors.ndim, forced)


def _hash(vectors: Tensor, rotations: list[Tensor], key_padding_mask: Tensor | None, backend: str) -> Tensor:
    """Which bucket a vector falls into has no gradient."""
    wide = torch.float64 if vectors.dtype is torch.float64 else torch.float32
    factors = [factor.detach().to(wide) for factor in rotations]
    return library.overload("lsh_hash", backend)(_unit_stride(vectors.detach()), factors, key_padding_mask)


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def lsh_attention(
    query_key: Tensor,
    value: Tensor,
    n_hashes: int,
    chunk_length: int,
    n_buckets: int | Sequence[int] | None,
    chunks_before: int,
    chunks_after: int,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    rotations: Tensor | Sequence[Tensor] | None,
    buckets: Tensor | None,
    seed: int | Tensor | None,
    scale: float,
    attend_across_buckets: bool,
    allow_duplicates: bool,
    dropout_p: float,
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fusewright.functional.lsh_attention`."""
    checks.operand("query_key", query_key)
    checks.operand("value", value, "query_key", query_key)
    checks.integer("n_hashes", n_hashes, least=1)
    checks.integer("chunk_length", chunk_length, least=1)
    checks.integer("chunks_before", chunks_before, least=0)
    checks.integer("chunks_after", chunks_after, least=0)
    probability("dropout_p", dropout_p)
    check_seed("seed", seed)
    scale = checks.scale(scale)
    mask = checks.key_padding_mask(key_padding_mask, query_key)
    if rotations is not None and buckets is not None:
        raise value_error("rotations", "given", "None where buckets are given: they would not be used")
    factors = None if rotations is None else checks.rotations(rotations, query_key, n_hashes)
    sizes = None if n_buckets is None else checks.bucket_factors(n_buckets)
    if buckets is not None:
        largest_bucket = checks.LONGEST - 1 if sizes is None else math.prod(sizes)
        checks.buckets(buckets, query_key, largest_bucket)
    query_key, value = (autograd.low_precision_under_autocast(tensor) for tensor in (query_key, value))
    query_key, value = _unit_stride(query_key), _unit_stride(value)
    chosen = _backend("lsh_attention", query_key, backend)
    length = query_key.shape[2]
    seed_on_device = None
    if length <= chunk_length and attend_across_buckets:
        # One chunk holds every position, so all meet in every round alike, whatever their buckets are.
        order = torch.arange(length, dtype=torch.int32, device=query_key.device)
        order = order.expand(*query_key.shape[:2], 1, length).contiguous()
        chunks_before = chunks_after = 0
        chunk_length = max(1, length)
    else:
        chunk_length = max(1, min(chunk_length, length))
        hashing = _backend("lsh_hash", query_key, backend)
        if buckets is None:
            if factors is None:
                seed_on_device = philox.seed_tensor(seed, query_key.device)
                sizes = sizes or default_buckets(length, chunk_length)
                factors = draw_rotations(seed_on_device, query_key.shape[1], query_key.shape[3], n_hashes, sizes)
            buckets = _hash(query_key, factors, mask, hashing)
            largest_bucket = math.prod([2 * factor.shape[3] for factor in factors])
        order = library.overload("lsh_sort", hashing)(buckets.contiguous(), largest_bucket + 1)
    if dropout_p > 0.0 and seed_on_device is None:
        seed_on_device = philox.seed_tensor(seed, query_key.device)
    arguments = (
        query_key, value, order, None if attend_across_buckets else buckets, mask,
        seed_on_device if dropout_p > 0.0 else None, chunk_length, chunks_before, chunks_after, bool(is_causal), scale,
        bool(allow_duplicates), float(dropout_p),
    )  # fmt: skip
    if autograd.derivative_possible(query_key, value):
        output, _, lse = autograd.apply(LshAttention, *arguments, return_lse, chosen)
    else:
        output, statistics = library.overload("lsh_attention_forward", chosen)(*arguments)
        lse = backend_reference.log_sum_exp(statistics) if return_lse else None
    return output if lse is None else (output, lse)


def lsh_decode_attention(
    query_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    chunk_length: int,
    chunks_before: int,
    chunks_after: int,
    key_padding_mask: Tensor | None,
    scale: float,
    attend_across_buckets: bool,
    allow_duplicates: bool,
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fusewright.functional.lsh_decode_attention`."""
    checks.operand("query_key", query_key)
    checks.operand("value", value, "query_key", query_key)
    if query_key.shape[2] == 0:
        raise value_error("query_key.shape[2]", 0, "at least one position")
    checks.integer("chunk_length", chunk_length, least=1)
    checks.integer("chunks_before", chunks_before, least=0)
    checks.integer("chunks_after", chunks_after, least=0)
    scale = checks.scale(scale)
    mask = checks.key_padding_mask(key_padding_mask, query_key)
    checks.buckets(buckets, query_key, checks.LONGEST - 1)
    return decode.lsh_decode_attention(
        query_key, value, buckets, chunk_length, chunks_before, chunks_after, mask, scale, attend_across_buckets,
        allow_duplicates, return_lse, _backend("lsh_attention", query_key, backend),
    )  # fmt: skip


def draw_rotations(seed: Tensor, heads: int, width: int, rounds: int, n_buckets: Sequence[int]) -> list[Tensor]:
    """Factors (H, D, R, NB_f / 2) for the even factors of a number of buckets, on the device of ``seed``."""
    columns = [size // 2 for size in n_buckets]
    drawn = library.overload("lsh_rotations", "reference")(seed, heads, width, rounds, sum(columns))
    return list(drawn.split(columns, dim=-1))
