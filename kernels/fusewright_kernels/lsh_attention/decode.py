"""LSH attention of the newest position over a cache of all: its chunks are looked up and only their rows are read."""

import torch
from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.attention.op import scaled_dot_product_attention
from fusewright_kernels.lsh_attention import checks, reference


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
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """The last row of ``lsh_attention``, by a backend that was chosen; arguments are checked."""
    length = query_key.shape[2]
    chunk_length = min(chunk_length, length)
    if length <= chunk_length and attend_across_buckets:
        positions = torch.arange(length, device=query_key.device).expand(*query_key.shape[:2], -1)
        visible = positions < length - 1
    else:
        order = library.overload("lsh_sort", backend)(buckets.contiguous(), checks.LONGEST)
        positions, visible, rounds = _window(order, buckets, chunk_length, chunks_before, chunks_after)
        if not attend_across_buckets:
            visible = visible & _in_own_bucket(buckets, positions, rounds)
    if key_padding_mask is not None:
        visible = visible & ~key_padding_mask[:, None].expand(*visible.shape[:2], -1).gather(2, positions)
    mask = visible
    if not allow_duplicates:
        copies = torch.zeros(query_key.shape[:3], device=query_key.device)
        copies = copies.scatter_add(2, positions, visible.float()).gather(2, positions)
        mask = torch.where(visible, -copies.clamp(min=1.0).log(), -torch.inf)
    # Few rows, so that unit keys in at least float32 cost little.
    wide = torch.promote_types(query_key.dtype, torch.float32)
    query, own_value = query_key[:, :, -1:].to(wide), value[:, :, -1:].to(wide)
    keys, values = (_rows(tensor, positions).to(wide) for tensor in (query_key, value))
    keys = keys * reference.inverse_norm(keys)[..., None]
    output, lse = scaled_dot_product_attention(
        query, keys, values, mask[:, :, None], 0.0, False, scale, False, None, None, None, None, None, "top_left", True,
        None, None,
    )  # fmt: skip
    alone = ~visible.any(-1)[..., None]
    output = torch.where(alone[..., None], own_value, output).to(value.dtype)
    if not return_lse:
        return output
    own = scale * query.square().sum(-1) * reference.inverse_norm(query)
    return output, torch.where(alone, own, lse)


def _window(
    order: Tensor, buckets: Tensor, chunk_length: int, before: int, after: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Positions (B, H, K) that the newest one's windows of all rounds hold, where there is another position, and the
    rounds of the query's copy and of the key's copy."""
    _, _, rounds, length = order.shape
    chunks = -(-length // chunk_length)
    device = order.device
    # It comes behind all of its bucket.
    place = (buckets[..., :-1] <= buckets[..., -1:]).sum(-1)
    first = torch.arange(rounds, device=device) * chunks
    offsets = torch.arange(-before, after + 1, device=device)
    ring = (place // chunk_length + first)[..., None] + offsets
    ring = ring % (rounds * chunks)
    places = (ring % chunks * chunk_length)[..., None] + torch.arange(chunk_length, device=device)
    key_rounds = (ring // chunks)[..., None].expand_as(places)
    query_rounds = torch.arange(rounds, device=device)[:, None, None].expand_as(places)
    index = (key_rounds * length + places.clamp(max=length - 1)).flatten(2)
    positions = order.flatten(2).gather(2, index).to(torch.int64)
    visible = (places < length).flatten(2) & (positions != length - 1)
    return positions, visible, (query_rounds.flatten(2), key_rounds.flatten(2))


def _in_own_bucket(buckets: Tensor, positions: Tensor, rounds: tuple[Tensor, Tensor]) -> Tensor:
    query_rounds, key_rounds = rounds
    key_buckets = buckets.flatten(2).gather(2, key_rounds * buckets.shape[3] + positions)
    return (query_rounds == key_rounds) & (buckets[..., -1].gather(2, query_rounds) == key_buckets)


def _rows(tensor: Tensor, positions: Tensor) -> Tensor:
    return tensor.gather(2, positions[..., None].expand(*positions.shape, tensor.shape[3]))
