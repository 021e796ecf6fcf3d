"""Attention over a key/value cache: checks, appending, dispatch."""

import torch
from torch import Tensor

from fusewright_kernels import dispatch, library
from fusewright_kernels.attention import backend_native, backend_reference, backend_triton_decode, checks
from fusewright_kernels.checks import floating_tensor, same_device, type_error, value_error
from fusewright_kernels.rotary.op import rotary_embedding

dispatch.register(
    "attention_decode",
    {
        "cuda": backend_native.refuse_cuda,
        "triton": backend_triton_decode.refuse,
        "cpu": backend_native.refuse_cpu,
    },
)


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fusewright.functional.decode_attention`."""
    _check_operands(query, key_cache, value_cache, block_table)
    lengths = _lengths(cache_seqlens, query)
    appended = _check_new_rows(query, key_cache, value_cache, new_key, new_value)
    _check_rotary(rotary_cos, rotary_sin, query)
    capacity = key_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    _check_lengths(lengths, appended, capacity, query.shape[2], rotary_cos)
    table = None if block_table is None else _pages(block_table, lengths + appended, key_cache)
    scale_value, softcap_value = checks.scale(scale, query.shape[3]), checks.softcap(softcap)
    window_left = checks.window(None if window is None else (window, 0), True).left
    slopes, sink_logits = checks.alibi_slopes(alibi_slopes, query), checks.sinks(sinks, query)
    chosen = dispatch.choose("attention_decode", query.device.type, (query.dtype,), query.ndim, backend)

    totals = lengths + appended
    if rotary_cos is not None and rotary_sin is not None:
        last = torch.arange(query.shape[2], device=query.device) - query.shape[2]
        query = _turned(query, rotary_cos, rotary_sin, (totals[:, None] + last).clamp_min(0), rotary_interleaved)
    if new_key is not None and new_value is not None:
        positions = lengths[:, None] + torch.arange(appended, device=query.device)
        if rotary_cos is not None and rotary_sin is not None:
            new_key = _turned(new_key, rotary_cos, rotary_sin, positions, rotary_interleaved)
        _append(key_cache, new_key, positions, table)
        _append(value_cache, new_value, positions, table)
    query, key_cache, value_cache = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key_cache, value_cache)
    )
    forced = (backend or dispatch.FORCED_BACKEND) is not None
    chosen = backend_native.decode_backend_of(chosen, forced, query, key_cache, value_cache)
    output, statistics = library.overload("attention_decode", chosen)(
        query, key_cache, value_cache, totals, table, slopes, sink_logits, scale_value, softcap_value, window_left
    )
    return (output, backend_reference.log_sum_exp(statistics)) if return_lse else output


def _append(cache: Tensor, rows: Tensor, positions: Tensor, table: Tensor | None) -> None:
    """Write rows (B, HK, T, D) at ``positions`` (B, T) of their sequences, in place."""
    batches = torch.arange(positions.shape[0], device=positions.device)[:, None]
    if table is None:
        cache[batches, :, positions] = rows.transpose(1, 2)
    else:
        size = cache.shape[2]
        cache[table[batches, positions // size], :, positions % size] = rows.transpose(1, 2)


def _check_operands(query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor | None) -> None:
    checks.operands(query, key_cache, value_cache, smallest_ndim=4, heads_dim=1, enable_gqa=True)
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        if tensor.ndim != 4:
            raise value_error(f"{name}.ndim", tensor.ndim, "4")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise value_error(f"{name}.requires_grad", True, "False: decoding over a cache has no gradient")
    if key_cache.shape[2] != value_cache.shape[2]:
        raise value_error(
            "value_cache.shape[2]", value_cache.shape[2], f"{key_cache.shape[2]}, the length of key_cache"
        )
    if value_cache.shape[0] != key_cache.shape[0]:
        raise value_error("value_cache.shape[0]", value_cache.shape[0], f"{key_cache.shape[0]}, that of key_cache")
    if block_table is None and key_cache.shape[0] != query.shape[0]:
        raise value_error("key_cache.shape[0]", key_cache.shape[0], f"{query.shape[0]}, the batch size of query")


def _integers(name: str, tensor: object, query: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise type_error(name, f"a {type(tensor).__name__}", "a torch.Tensor")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise type_error(f"{name}.dtype", tensor.dtype, "torch.int32 or torch.int64")
    same_device(name, tensor, "query", query)
    return tensor.to(torch.int64)


def _lengths(cache_seqlens: Tensor, query: Tensor) -> Tensor:
    lengths = _integers("cache_seqlens", cache_seqlens, query)
    if lengths.shape != query.shape[:1]:
        raise value_error("cache_seqlens.shape", tuple(lengths.shape), f"({query.shape[0]},), one per sequence")
    return lengths


def _check_new_rows(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, new_key: Tensor | None, new_value: Tensor | None
) -> int:
    """How many rows are appended to each sequence."""
    if (new_key is None) != (new_value is None):
        raise value_error("new_value", "None" if new_value is None else "given", "given together with new_key")
    if new_key is None or new_value is None:
        return 0
    for name, rows, cache in (("new_key", new_key, key_cache), ("new_value", new_value, value_cache)):
        floating_tensor(name, rows)
        same_device(name, rows, "query", query)
        expected = (query.shape[0], cache.shape[1], new_key.shape[2] if new_key.ndim == 4 else 1, cache.shape[3])
        if tuple(rows.shape) != expected:
            raise value_error(f"{name}.shape", tuple(rows.shape), f"{expected}")
        if rows.dtype is not query.dtype:
            raise type_error(f"{name}.dtype", rows.dtype, f"{query.dtype}, the dtype of query")
    return new_key.shape[2]


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    return rotary_embedding(heads, cos, sin, positions, interleaved, in_place=False, backend=None)


def _check_rotary(cos: Tensor | None, sin: Tensor | None, query: Tensor) -> None:
    if (cos is None) != (sin is None):
        raise value_error("rotary_sin", "None" if sin is None else "given", "given together with rotary_cos")
    if cos is None or sin is None:
        return
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        floating_tensor(name, table)
        same_device(name, table, "query", query)
        if table.ndim != 2 or 2 * table.shape[1] > query.shape[3] or table.shape != cos.shape:
            raise value_error(f"{name}.shape", tuple(table.shape), f"(positions, at most {query.shape[3] // 2})")


def _check_lengths(lengths: Tensor, appended: int, capacity: int, queries: int, rotary_cos: Tensor | None) -> None:
    most = capacity if rotary_cos is None else min(capacity, rotary_cos.shape[0])
    sound = ((lengths >= 0) & (lengths + appended <= most)).all()
    expected = f"lengths in [0, {most - appended}]: room for {appended} more rows in {most}"
    if torch.compiler.is_compiling() or lengths.is_cuda:
        torch._assert_async(sound, f"cache_seqlens must hold {expected}")
    elif not sound:
        raise value_error("cache_seqlens", lengths.tolist(), expected)


def _pages(block_table: Tensor, totals: Tensor, key_cache: Tensor) -> Tensor:
    table = _integers("block_table", block_table, key_cache)
    if table.ndim != 2 or table.shape[0] != totals.shape[0]:
        raise value_error("block_table.shape", tuple(table.shape), f"({totals.shape[0]}, pages of a sequence)")
    pages, size = key_cache.shape[0], key_cache.shape[2]
    used = torch.arange(table.shape[1], device=table.device) * size < totals[:, None]
    sound = (((table >= 0) & (table < pages)) | ~used).all()
    if torch.compiler.is_compiling() or table.is_cuda:
        torch._assert_async(sound, f"block_table must hold pages in [0, {pages - 1}]")
    elif not sound:
        raise value_error("block_table", table.tolist(), f"pages in [0, {pages - 1}]")
    return table.contiguous()
