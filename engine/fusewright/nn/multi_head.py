"""Multi-head attention as one function: what the module and the replacement of torch's function both run."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusewright import functional
from fusewright.nn.attention_weights import WeightOptions, attention_weights
from fusewright.nn.kv_cache import KeyValueCache
from fusewright.nn.rotary import RotaryEmbedding
from fusewright_kernels import philox
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError, type_error, value_error


class Projections(NamedTuple):
    """The parameters of multi-head attention with H query and HK key/value heads of width D.

    Attributes:
        num_heads, num_kv_heads: H and HK, HK divides H.
        packed: ((H + 2 HK) D, E), the weights of query, key and value one below the other, or None.
        query, key, value: (H D, E), (HK D, kdim), (HK D, vdim), if ``packed`` is None.
        bias: ((H + 2 HK) D,) or None.
        key_bias, value_bias: HK D elements each, one more key and value for every sequence, or None.
        output, output_bias: (E, H D) and (E,) or None.
    """

    num_heads: int
    num_kv_heads: int
    packed: Tensor | None
    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None


def argument_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    widths: tuple[int, int, int],
    batch_first: bool,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    capacity: int | None = None,
    shared_heads: bool = False,
) -> ArgumentTypeError | ArgumentValueError | None:
    """What :func:`multi_head_attention` could not compute with, if anything.

    Args:
        widths: last sizes that query, key and value must have.
        capacity: of a cache, whose places the last size of ``attn_mask`` then counts.
        shared_heads: whether ``attn_mask`` may be (H, T, S), which torch does not take.
        Others: as in :func:`multi_head_attention`.
    """
    if query.ndim not in (2, 3):
        return value_error("query.ndim", query.ndim, "2 (one sequence) or 3")
    for name, tensor, width in zip(("query", "key", "value"), (query, key, value), widths, strict=True):
        if tensor.is_nested or not tensor.dtype.is_floating_point:
            return type_error(name, f"nested or of dtype {tensor.dtype}", "a dense floating tensor")
        if tensor.ndim != query.ndim or tensor.shape[-1] != width:
            return value_error(f"{name}.shape", tuple(tensor.shape), f"{query.ndim} sizes, the last {width}")
    if key.shape[:-1] != value.shape[:-1]:
        return value_error("value.shape", tuple(value.shape), f"the leading sizes of key, {tuple(key.shape[:-1])}")
    batch_dim = 0 if batch_first else 1
    if query.ndim == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
        return value_error("key's batch size", key.shape[batch_dim], f"{query.shape[batch_dim]}, that of query")
    batch = query.shape[batch_dim] if query.ndim == 3 else 1
    length, keys = (tensor.shape[0 if tensor.ndim == 2 else 1 - batch_dim] for tensor in (query, key))
    columns = keys if capacity is None else capacity
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "key_padding_mask": ((keys,),) if query.ndim == 2 else ((batch, keys),),
        "attn_mask": ((length, columns), (batch * num_heads, length, columns)),
    }
    if shared_heads:
        shapes["attn_mask"] += ((num_heads, length, columns),)
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is None:
            continue
        if mask.dtype is not torch.bool and not mask.dtype.is_floating_point:
            return type_error(f"{name}.dtype", mask.dtype, "torch.bool or a floating dtype")
        if tuple(mask.shape) not in shapes[name]:
            return value_error(f"{name}.shape", tuple(mask.shape), " or ".join(map(str, shapes[name])))
    return None


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projections: Projections,
    *,
    batch_first: bool,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    average_attn_weights: bool = True,
    add_zero_attn: bool = False,
    window: int | tuple[int, int] | None = None,
    rotary: RotaryEmbedding | None = None,
    cache: KeyValueCache | None = None,
    projected: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Project, attend with H heads, project back. Arguments must have passed :func:`argument_error`.

    Args:
        query: (T, B, E), or (B, T, E) if ``batch_first``, or one sequence (T, E).
        key, value: (S, B, kdim) and (S, B, vdim) likewise.
        key_padding_mask: (B, S) or (S,): True leaves a key out, floats are added to its logits.
        attn_mask: (T, S), (B * H, T, S) or (H, T, S), likewise.
        is_causal: query i sees keys up to i. ``attn_mask`` is then taken to say just that and is not read, unless
            there are keys that belong to no position (``key_bias``, ``add_zero_attn``), where it is what counts.
        dropout_p: dropout on the weights.
        need_weights: also return them; averaged over heads if ``average_attn_weights``.
        add_zero_attn: one more key and value of zeros.
        window: as in :func:`fusewright.functional.scaled_dot_product_attention`.
        rotary: turns queries and keys by their positions.
        cache: holds the keys and values before these, which are appended; without padding, dropout and weights.
            ``attn_mask`` is then a bias on the logits, floating, with a column for every place of the cache.
        projected: what :func:`project_memory` made of ``key``, which is ``value``, before.

    Returns:
        Attended values in query's layout, and the weights (B, T, S), (B, H, T, S), (T, S) or (H, T, S), or None.
        S counts the key bias and the key of zeros.
    """
    batched = query.ndim == 3
    if not batched:
        query, key, value = _each(lambda sequence: sequence.unsqueeze(0), query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not batch_first:
        query, key, value = _each(lambda sequences: sequences.transpose(0, 1), query, key, value)
    heads = _heads(query, key, value, projections) if projected is None else (_queries(query, projections), *projected)
    positions = 0 if cache is None else cache.positions
    if rotary is not None:
        heads = (rotary(heads[0], positions), rotary(heads[1], positions), heads[2])
    weights = None
    if cache is None:
        extra_keys = projections.key_bias is not None or add_zero_attn
        causal = is_causal and not (extra_keys and attn_mask is not None)
        one_more_key = projections.key_bias is not None
        mask = _merged_mask(None if causal else attn_mask, key_padding_mask, projections.num_heads, one_more_key)
        attended, weights = _attend(
            *_with_bias(heads, projections), mask, _causal_window(window, causal), dropout_p, add_zero_attn,
            need_weights, average_attn_weights,
        )  # fmt: skip
    else:
        bias = _merged_mask(attn_mask, None, projections.num_heads, False)
        attended = _decode(*heads, cache, bias, window, add_zero_attn)
    if batched and not batch_first:
        output = functional.linear(attended.permute(2, 0, 1, 3).flatten(2), projections.output, projections.output_bias)
    else:
        output = functional.linear(attended.transpose(1, 2).flatten(2), projections.output, projections.output_bias)
    if batched:
        return output, weights
    return output.squeeze(0), None if weights is None else weights.squeeze(0)


def project_memory(memory: Tensor, projections: Projections) -> tuple[Tensor, Tensor]:
    """Keys (B, HK, S, D) and values (B, HK, S, DV) of ``memory`` (B, S, E), for many calls that attend to it."""
    no_query = memory.new_empty(memory.shape[0], 0, projections.output.shape[0])
    _, key, value = _heads(no_query, memory, memory, projections)
    return key, value


def _each(
    function: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``function`` of each, applied once to tensors that are the same object, so that they still are."""
    new_query = function(query)
    new_key = new_query if key is query else function(key)
    return new_query, new_key, new_key if value is key else function(value)


def _queries(query: Tensor, projections: Projections) -> Tensor:
    """Projected queries (B, H, T, D)."""
    width = projections.output.shape[1]
    weight = projections.query if projections.packed is None else projections.packed[:width]
    bias = None if projections.bias is None else projections.bias[:width]
    return _rows_times(query, weight, bias).unflatten(-1, (projections.num_heads, -1)).transpose(1, 2)


def _heads(query: Tensor, key: Tensor, value: Tensor, projections: Projections) -> tuple[Tensor, Tensor, Tensor]:
    """Projected queries (B, H, T, D), keys and values (B, HK, S, D): views of as few matrix products as possible."""
    heads, key_heads, packed = projections.num_heads, projections.num_kv_heads, projections.packed
    width = projections.output.shape[1] // heads
    sizes = [heads * width, key_heads * width, key_heads * width]
    if packed is not None and query is key and key is value:
        parts = _rows_times(query, packed, projections.bias).split(sizes, dim=-1)
    else:
        together, inputs = (sizes, [query, key, value])
        if packed is not None and key is value:
            together, inputs = [sizes[0], 2 * sizes[1]], [query, key]
        separate = (projections.query, projections.key, projections.value)
        weights = separate if packed is None else packed.split(together)
        biases = (None,) * len(inputs) if projections.bias is None else projections.bias.split(together)
        products = [_rows_times(*arguments) for arguments in zip(inputs, weights, biases, strict=True)]
        parts = (*products[:-1], *products[-1].split(sizes[len(products) - 1 :], dim=-1))
    q, k, v = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts)
    return q, k, v


def _rows_times(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(B, T, N) from ``rows`` (B, T, E), in the order of memory: torch copies a transposed view before a product."""
    assert weight is not None
    if rows.stride(0) < rows.stride(1):
        return functional.linear(rows.transpose(0, 1), weight, bias).transpose(0, 1)
    return functional.linear(rows, weight, bias)


def _with_bias(heads: tuple[Tensor, Tensor, Tensor], projections: Projections) -> tuple[Tensor, Tensor, Tensor]:
    """``heads`` with the key and value bias behind the keys and values."""
    query, key, value = heads
    if projections.key_bias is None or projections.value_bias is None:
        return heads
    shape = (key.shape[0], key.shape[1], 1, key.shape[3])
    key_bias = projections.key_bias.reshape(1, shape[1], 1, shape[3]).to(key.dtype)
    value_bias = projections.value_bias.reshape(1, shape[1], 1, shape[3]).to(value.dtype)
    return query, torch.cat([key, key_bias.expand(shape)], 2), torch.cat([value, value_bias.expand(shape)], 2)


def _merged_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, num_heads: int, one_more_key: bool
) -> Tensor | None:
    """Both masks as one of functional's (1 or B, 1 or H, 1 or T, S), True takes part or added to the logits."""
    if attn_mask is not None:
        attn_mask = attn_mask[None, None] if attn_mask.ndim == 2 else attn_mask.unflatten(0, (-1, num_heads))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None]
    present = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    if one_more_key:
        # The value that hides nothing, in either kind of mask.
        present = [torch.nn.functional.pad(mask, (0, 1), value=0) for mask in present]
    hiding = [mask for mask in present if mask.dtype is torch.bool]
    added = [mask for mask in present if mask.dtype is not torch.bool]
    if not added:
        return ~(hiding[0] | hiding[1] if len(hiding) == 2 else hiding[0]) if hiding else None
    total = added[0] + added[1] if len(added) == 2 else added[0]
    return total.masked_fill(hiding[0], -torch.inf) if hiding else total


def _causal_window(window: int | tuple[int, int] | None, is_causal: bool) -> tuple[int, int]:
    left, right = (-1, -1) if window is None else (window, window) if isinstance(window, int) else window
    return left, 0 if is_causal else right


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    window: tuple[int, int],
    dropout_p: float,
    zero_key: bool,
    need_weights: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attended values (B, H, T, D), and the weights if they are needed."""
    # A key and a value of zeros add a logit of 0 without a value: that is a sink.
    sinks = query.new_zeros(query.shape[1]) if zero_key else None
    seed = philox.seed_tensor(None, query.device) if dropout_p > 0.0 else None
    result = functional.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, enable_gqa=True, window=window, sinks=sinks, seed=seed,
        return_lse=need_weights,
    )  # fmt: skip
    if isinstance(result, Tensor):
        return result, None
    attended, lse = result
    options = WeightOptions(query.shape[3] ** -0.5, window, zero_key, average, seed, dropout_p)
    return attended, attention_weights(query, key, lse, mask, options)


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: KeyValueCache,
    bias: Tensor | None,
    window: int | tuple[int, int] | None,
    zero_key: bool,
) -> Tensor:
    """Causal attention of the newest queries over the cache, the new keys and values appended."""
    left, right = _causal_window(window, True)
    sinks = query.new_zeros(query.shape[1]) if zero_key else None
    if bias is not None:
        cache.append(key, value)
        return cache.attend(query, bias)
    if cache.is_empty and query.shape[2] > 1:
        cache.append(key, value)
        # The keys are all at hand, and a prompt has queries enough for the kernel that is made for many.
        attended = functional.scaled_dot_product_attention(
            query, key, value, enable_gqa=True, window=(left, right), sinks=sinks
        )
        assert isinstance(attended, Tensor)
        return attended
    cache.append(key, value)
    return cache.attend(query, window=None if left < 0 else left, sinks=sinks)
