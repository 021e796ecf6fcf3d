"""Triton kernels of attention over a cache against the float64 formula; interpreted where there is no GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import patch_language_once_per_launch

from fusewright.testing import assert_accurate, bits_equal, budget_of
from fusewright_kernels import dispatch, library, triton_support
from fusewright_kernels.attention import backend_reference, backend_triton_decode, tiles

pytestmark = pytest.mark.skipif(
    triton_support.unavailable_reason() is not None, reason=str(triton_support.unavailable_reason())
)

DEVICE = "cpu" if triton_support.INTERPRETED else "cuda"
NAN = float("nan")
B, H, HK, D, DV, CAPACITY = 4, 2, 1, 16, 24, 96

decode = library.overload("attention_decode", "triton")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_language_once_per_launch(monkeypatch)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a short cache has several splits of several tiles, and wide rows several pieces."""

    def tile(itemsize: int, d: int, dv: int, architecture: int, rows: int) -> tiles.Tile:
        block_d, block_dv = (min(tiles.padded(width), 32) for width in (d, dv))
        return tiles.Tile(16, 16, block_d, block_dv, 4, 1)

    monkeypatch.setattr(tiles, "decode_tile", tile)
    monkeypatch.setattr(tiles, "SPLIT_LENGTH", 32)
    monkeypatch.setattr(tiles, "JOINED", tiles.Tile(16, 2, 32, 32, 4, 1))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def inputs(
    queries: int = 3, heads: int = H, key_heads: int = HK, width: int = D, value_width: int = DV,
    dtype: torch.dtype = torch.float32, capacity: int = CAPACITY,
) -> list[Tensor]:  # fmt: skip
    """Query, caches and lengths: none, less than there are queries, within a tile, at the end of one, all."""
    lengths = torch.tensor([0, 2, min(capacity, 45), capacity], device=DEVICE)
    return [
        random(B, heads, queries, width, dtype=dtype),
        random(B, key_heads, capacity, width, dtype=dtype),
        random(B, key_heads, capacity, value_width, dtype=dtype),
        lengths,
    ]


def paged(cache: Tensor, page_size: int, order: Tensor) -> Tensor:
    """The cache in pages: page p of sequence b is ``order[b, p]``."""
    rows = cache.unflatten(2, (order.shape[1], page_size)).transpose(1, 2).flatten(0, 1)
    return torch.empty_like(rows).index_copy_(0, order.flatten(), rows)


def call(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, table: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    return decode(query, key, value, lengths, table, *arguments(**options))


def arguments(
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, softcap: float = 0.0, window_left: int = -1
) -> tuple[Any, ...]:
    return alibi_slopes, sinks, 0.3, softcap, window_left


def check(tensors: list[Tensor], table: Tensor | None = None, **options: Any) -> None:
    doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
    wide = {name: option.double() if isinstance(option, Tensor) else option for name, option in options.items()}
    expected, expected_statistics = backend_reference.attention_decode(*doubles, table, *arguments(**wide))
    output, statistics = call(*tensors, table, **options)
    query = tensors[0]
    assert output.dtype is query.dtype
    assert_accurate(output, expected, budget=budget_of(query.dtype, interpreted=triton_support.INTERPRETED))
    assert statistics.dtype is torch.float32
    lse, expected_lse = (backend_reference.log_sum_exp(both.double()) for both in (statistics, expected_statistics))
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_dtypes(queries: int, dtype: torch.dtype) -> None:
    check(inputs(queries, dtype=dtype))


FEATURES = {
    "window": lambda: {"window_left": 37},
    "softcap": lambda: {"softcap": 1.5},
    "alibi": lambda: {"alibi_slopes": torch.rand(B, H, device=DEVICE)},
    "shared_alibi": lambda: {"alibi_slopes": torch.rand(1, H, device=DEVICE)},
    "sinks": lambda: {"sinks": random(H)},
}


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, queries: int) -> None:
    check(inputs(queries), **FEATURES[feature]())


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (2, 2), (6, 1), (4, 2)])
def test_groups_of_heads(heads: int, key_heads: int) -> None:
    """The heads of a group fill the rows of one block, and of several where they do not fit."""
    check(inputs(3, heads, key_heads), sinks=random(heads), alibi_slopes=torch.rand(1, heads, device=DEVICE))


@pytest.mark.parametrize(("width", "value_width"), [(1, 1), (70, 16), (16, 70)])
def test_widths(width: int, value_width: int) -> None:
    """Wider than a tile: in pieces."""
    check(inputs(2, width=width, value_width=value_width))


@pytest.mark.parametrize(("page_size", "window_left"), [(1, -1), (12, -1), (48, -1), (12, 40)])
def test_pages(page_size: int, window_left: int) -> None:
    query, key, value, lengths = inputs()
    pages = CAPACITY // page_size
    order = torch.randperm(B * pages).reshape(B, pages).to(DEVICE)
    dense = call(query, key, value, lengths, window_left=window_left)
    # Behind its length a sequence has no pages, whatever the table says.
    table = order.masked_fill(torch.arange(pages, device=DEVICE) * page_size >= lengths[:, None], -(2**40))
    caches = [paged(cache, page_size, order) for cache in (key, value)]
    for left, right in zip(call(query, *caches, lengths, table, window_left=window_left), dense, strict=True):
        assert bits_equal(left, right)


def test_pages_with_every_feature() -> None:
    query, key, value, lengths = inputs(2, 4, 2, dtype=torch.bfloat16)
    order = torch.randperm(B * 6).reshape(B, 6).to(DEVICE)
    features: dict[str, Any] = {}
    for name in FEATURES:
        features |= FEATURES[name]()
    features |= {"alibi_slopes": torch.rand(B, 4, device=DEVICE), "sinks": random(4)}
    check([query, paged(key, 16, order), paged(value, 16, order), lengths], order, **features)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_without_keys(with_sinks: bool) -> None:
    """A sequence of no keys, and the first of three queries over two."""
    output, (reference, total) = call(*inputs(), sinks=random(H) if with_sinks else None)
    assert output[0].eq(0.0).all() and output[1, :, 0].eq(0.0).all()
    assert total[0].eq(1.0 if with_sinks else 0.0).all()
    assert with_sinks or reference[0].eq(-torch.inf).all()


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("window_left", [-1, 20])
def test_what_no_query_sees_reaches_nothing(queries: int, window_left: int) -> None:
    query, key, value, lengths = inputs(queries)
    expected = call(query, key, value, lengths, window_left=window_left)
    positions = torch.arange(CAPACITY, device=DEVICE)
    hidden = positions >= lengths[:, None]
    if window_left >= 0:
        hidden |= positions < lengths[:, None] - queries - window_left
    for cache in (key, value):
        cache.masked_fill_(hidden[:, None, :, None], NAN)
    for left, right in zip(call(query, key, value, lengths, window_left=window_left), expected, strict=True):
        assert bits_equal(left, right)


@pytest.mark.parametrize("name", ["key", "value"])
def test_the_last_key_reaches_only_the_last_query(name: str) -> None:
    query, key, value, lengths = inputs()
    expected = call(query, key, value, lengths)[0]
    (key if name == "key" else value)[2, :, 44] = NAN
    output = call(query, key, value, lengths)[0]
    torch.testing.assert_close(output[2, :, :2], expected[2, :, :2])
    assert output[2, :, 2].isnan().all()
    others = [0, 1, 3]
    assert bits_equal(output[others], expected[others])


def test_bits_depend_neither_on_the_batch_nor_on_the_capacity() -> None:
    """One split that ends the work gives what the joining kernel makes of one."""
    query, key, value, lengths = inputs()
    lengths = lengths.clamp(max=30)
    sinks = random(H)
    together = call(query, key, value, lengths, sinks=sinks)
    alone = call(query[2:3], key[2:3, :, :31], value[2:3, :, :31], lengths[2:3], sinks=sinks)
    assert bits_equal(together[0][2:3], alone[0])
    assert bits_equal(together[1][:, 2:3], alone[1])


def test_layouts() -> None:
    query, key, value, lengths = inputs()
    expected = call(query, key, value, lengths)
    views = [random(B, 3, H, D + 5)[..., 2:-3].transpose(1, 2)]
    views += [random(B, CAPACITY + 3, HK, width)[:, 2:-1].transpose(1, 2) for width in (D, DV)]
    for view, tensor in zip(views, (query, key, value), strict=True):
        view.copy_(tensor)
    output, statistics = call(*views, lengths)
    assert output.stride() == library.in_layout_of(views[0], output.shape).stride()
    assert bits_equal(output, expected[0]) and bits_equal(statistics, expected[1])


@pytest.mark.parametrize("changes", [{"queries": 0}, {"capacity": 0}])
def test_no_queries_or_no_room(changes: dict[str, int]) -> None:
    query, key, value, lengths = inputs(**changes)
    output, statistics = call(query, key, value, lengths.clamp(max=key.shape[2]))
    assert output.eq(0.0).all() and statistics[1].eq(0.0).all()


def test_fake_agrees() -> None:
    query, key, value, lengths = inputs(1)
    options = arguments(torch.rand(1, H, device=DEVICE), random(H), 3.0, 50)
    torch.library.opcheck(decode, (query, key, value, lengths, None, *options),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip


def test_every_width_has_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for itemsize in (2, 4):
        for width in range(1, 513):
            for rows in (1, 64):
                tile = tiles.decode_tile(itemsize, width, 513 - width, 90, rows)
                assert min(tile[:4]) >= tiles.NARROWEST
                assert tiles.SPLIT_LENGTH % tile.block_n == 0


def test_refusals_name_the_cause() -> None:
    served = dispatch.Call("attention_decode", DEVICE, (torch.bfloat16,), 4)
    assert backend_triton_decode.refuse(served) is None
    assert "float64" in str(backend_triton_decode.refuse(served._replace(dtypes=(torch.float64,))))
