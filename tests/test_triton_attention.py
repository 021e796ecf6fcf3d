"""Triton attention kernels against the float64 formula; under Triton's interpreter where there is no GPU."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import patch_language_once_per_launch

from fusewright.testing import assert_accurate, bits_equal, budget_of, unit
from fusewright_kernels import dispatch, library, philox, triton_support
from fusewright_kernels.attention import backend_reference, backend_triton, tiles

pytestmark = pytest.mark.skipif(
    triton_support.unavailable_reason() is not None, reason=str(triton_support.unavailable_reason())
)

DEVICE = "cpu" if triton_support.INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INFINITY = float("inf")
# Two tiles of queries and three of keys where tiles are small, none of them full at the end.
T, S = 27, 45

forward = library.overload("attention_forward", "triton")
backward = library.overload("attention_backward", "triton")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_language_once_per_launch(monkeypatch)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that short sequences have masked and unmasked ones, and wide rows several pieces."""

    def tile(itemsize: int, d: int, dv: int, architecture: int, by_pair: bool) -> tiles.Tile:
        block_d, block_dv = (min(tiles.padded(width), 32) for width in (d, dv))
        return tiles.Tile(16, 16, block_d, block_dv, 4, 1)

    for name in ("forward_tile", "backward_key_tile", "backward_query_tile"):
        monkeypatch.setattr(tiles, name, tile)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@dataclass(frozen=True)
class Options:
    """The arguments of the op behind query, key and value."""

    mask: Tensor | None = None
    block_mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_size: int = 0
    scale: float = 0.25
    softcap: float = 0.0
    dropout_p: float = 0.0
    window_left: int = -1
    window_right: int = -1
    bottom_right: bool = False

    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def wanted(self) -> tuple[bool, ...]:
        mask_gradient = self.mask is not None and self.mask.is_floating_point()
        return (True, True, True, mask_gradient, self.sinks is not None)


CAUSAL = Options(window_right=0)
NAMES = ("grad_query", "grad_key", "grad_value", "grad_mask", "grad_sinks")


def inputs(
    batch: int = 1, heads: int = 2, key_heads: int = 1, length: int = T, key_length: int = S, width: int = 16,
    value_width: int = 16, dtype: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    return [
        random(batch, heads, length, width, dtype=dtype),
        random(batch, key_heads, key_length, width, dtype=dtype),
        random(batch, key_heads, key_length, value_width, dtype=dtype),
    ]


def run(
    tensors: list[Tensor], options: Options, grad_output: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    output, statistics = forward(*tensors, *options.arguments())
    gradients = backward(grad_output, grad_lse, output, statistics, *tensors, *options.arguments(), *options.wanted())
    return output, statistics, gradients


def oracle(
    tensors: list[Tensor], options: Options, grad_output: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    doubles = [double(tensor) for tensor in (*tensors, *options.arguments())]
    output, statistics = backend_reference.attention_forward(*doubles)
    gradients = backend_reference.attention_backward(
        double(grad_output), double(grad_lse), output, statistics, *doubles, *options.wanted()
    )
    return output, statistics, gradients


def check(tensors: list[Tensor], options: Options, grad_output: Tensor | None = None) -> tuple[Tensor, ...]:
    """Forward and every gradient of one call, which come back."""
    query, _, value = tensors
    grad_lse = random(*query.shape[:3])
    if grad_output is None:
        grad_output = random(*query.shape[:3], value.shape[3], dtype=query.dtype)
    output, statistics, gradients = run(tensors, options, grad_output, grad_lse)
    expected, expected_statistics, expected_gradients = oracle(tensors, options, grad_output, grad_lse)
    interpreted = triton_support.INTERPRETED
    assert output.dtype is query.dtype
    assert_accurate(output, expected, budget=budget_of(query.dtype, interpreted=interpreted), name="output")
    check_statistics(statistics, expected_statistics)
    likes = (*tensors, options.mask, options.sinks)
    for name, actual, exact, like, want in zip(
        NAMES, gradients, expected_gradients, likes, options.wanted(), strict=True
    ):
        if want:
            assert actual.dtype is like.dtype
            magnitude = None
            if name == "grad_sinks":
                magnitude = sink_terms(options, expected, expected_statistics, grad_output, grad_lse)
            budget = budget_of(like.dtype, interpreted=interpreted)
            # A float32 mask's gradient is as accurate as the output that was saved for it.
            budget = budget.scaled(max(1.0, unit(query.dtype) / unit(like.dtype)))
            assert_accurate(actual, exact, "gradient", magnitude=magnitude, budget=budget, name=name)
    return output, *gradients


def sink_terms(options: Options, output: Tensor, statistics: Tensor, grad_output: Tensor, grad_lse: Tensor) -> float:
    """Root-sum-square size of what the gradient of a sink is a sum of: one product per row and column of the output."""
    weights = torch.exp(options.sinks.double()[:, None] - backend_reference.log_sum_exp(statistics.double()))
    squares = (grad_output.double() * output).square().sum(-1) + grad_lse.double().square()
    return (weights.square() * squares).sum((0, 2)).mean().sqrt().item()


def check_statistics(statistics: Tensor, expected: Tensor) -> None:
    """Their log-sum-exp; and a reference that is near the maximum, so that no exp overflows."""
    assert statistics.dtype is torch.float32
    lse, expected_lse = (backend_reference.log_sum_exp(both.double()) for both in (statistics, expected))
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics[0].double(), expected[0].double(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("options", [Options(), CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype, options: Options) -> None:
    check(inputs(1, 4, 2, dtype=dtype, width=64, value_width=64), options)


@pytest.mark.parametrize("bottom_right", [False, True])
@pytest.mark.parametrize(("length", "key_length"), [(1, 1), (1, 20), (20, 1), (20, 35), (35, 20), (32, 32)])
def test_causal_alignments(small_tiles: None, length: int, key_length: int, bottom_right: bool) -> None:
    check(inputs(length=length, key_length=key_length), replace(CAUSAL, bottom_right=bottom_right))


WIDTHS = [(1, 1), (3, 5), (16, 16), (80, 80), (128, 128), (128, 16), (24, 257), (257, 40)]


@pytest.mark.parametrize(
    ("width", "value_width", "dtype"),
    [(*widths, dtype) for widths in WIDTHS for dtype in DTYPES[:2]] + [(512, 512, torch.bfloat16)],
)
def test_widths(width: int, value_width: int, dtype: torch.dtype) -> None:
    tensors = inputs(1, 1, 1, 9, 11, width, value_width, dtype)
    check(tensors, replace(CAUSAL, bottom_right=True, scale=width**-0.5))


def test_pieces_of_wide_rows(small_tiles: None) -> None:
    check(inputs(1, 1, 1, 17, 20, 70, 40), replace(CAUSAL, scale=0.1))


@pytest.mark.parametrize("length", [5, 33])
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 1), (4, 2), (3, 3)])
def test_groups_of_heads(heads: int, key_heads: int, length: int) -> None:
    """Short lengths pack the heads of a group into one block of rows."""
    slopes = torch.rand(2, heads, device=DEVICE)
    check(inputs(2, heads, key_heads, length), Options(alibi_slopes=slopes, sinks=random(heads)))


def test_group_in_small_tiles(small_tiles: None) -> None:
    check(inputs(2, 6, 2, 7), replace(CAUSAL, bottom_right=True))


MASK_SHAPES = [(2, 2, T, S), (1, 1, T, S), (2, 1, 1, S), (1, 2, T, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks(small_tiles: None, kind: str, shape: tuple[int, ...]) -> None:
    mask = random(*shape)
    check(inputs(2), Options(mask=mask > -0.5 if kind == "bool" else mask))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_mask(small_tiles: None, dtype: torch.dtype) -> None:
    mask = random(1, 2, T, S, dtype=dtype)
    mask = torch.where(mask > 1.0, -INFINITY, mask)
    check(inputs(1, dtype=dtype), Options(mask=mask))


def test_mask_layouts(small_tiles: None) -> None:
    check(inputs(), Options(mask=random(1, 2, S, T).transpose(2, 3)))
    check(inputs(), Options(mask=random(1, 1, T, 2 * S)[..., ::2] > 0.0))


def sequences(*lengths: int) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)


def blocks(heads: int, block_size: int) -> Tensor:
    kept = torch.rand(heads, -(-T // block_size), -(-S // block_size), device=DEVICE) > 0.4
    kept[:, :, 0] = True
    return kept


# Each set of options is made anew by its test, from its seed. The packed lengths leave a tail on either side and have
# an empty sequence, queries without keys and keys without queries.
FEATURES = {
    "window": lambda: {"window_left": 9, "window_right": 4},
    "left_window": lambda: {"window_left": 12, "bottom_right": True},
    "causal": lambda: {"window_right": 0, "bottom_right": True},
    "softcap": lambda: {"softcap": 1.5},
    "alibi": lambda: {"alibi_slopes": torch.rand(1, 2, device=DEVICE)},
    "sinks": lambda: {"sinks": random(2)},
    "dropout": lambda: {"seed": torch.tensor([2**40 + 7], device=DEVICE), "dropout_p": 0.3},
    "blocks": lambda: {"block_mask": blocks(2, 16), "block_size": 16},
    "shared_blocks": lambda: {"block_mask": blocks(1, 32), "block_size": 32},
    "odd_blocks": lambda: {"block_mask": blocks(2, 5), "block_size": 5},
    "packed": lambda: {"cu_seqlens_q": sequences(10, 0, 0, 4, 9), "cu_seqlens_k": sequences(8, 0, 5, 0, 30)},
    "packed_int32": lambda: {
        "cu_seqlens_q": sequences(15, 12).int(), "cu_seqlens_k": sequences(20, 25).int(), "bottom_right": True
    },
    "mask": lambda: {"mask": random(1, 2, T, S)},
    "bool_mask": lambda: {"mask": random(1, 1, T, S) > -0.5},
}  # fmt: skip
PAIRS = [
    ("softcap", "alibi"), ("softcap", "mask"), ("sinks", "mask"), ("sinks", "dropout"), ("dropout", "causal"),
    ("dropout", "mask"), ("packed", "causal"), ("packed", "alibi"), ("packed", "dropout"), ("packed_int32", "window"),
    ("blocks", "causal"), ("odd_blocks", "window"), ("blocks", "mask"), ("packed_int32", "blocks"), ("packed", "sinks"),
    ("bool_mask", "causal"), ("alibi", "left_window"), ("blocks", "softcap"),
]  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_features(small_tiles: None, feature: str) -> None:
    check(inputs(), Options(**FEATURES[feature]()))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs_of_features(small_tiles: None, pair: tuple[str, str]) -> None:
    check(inputs(), Options(**(FEATURES[pair[0]]() | FEATURES[pair[1]]())))


def test_features_in_the_shipped_tiles() -> None:
    names = ("softcap", "alibi", "sinks", "dropout", "mask", "window", "odd_blocks")
    features: dict[str, Any] = {}
    for name in names:
        features |= FEATURES[name]()
    check(inputs(dtype=torch.bfloat16), Options(**features))


@pytest.mark.parametrize("kind", ["causal", "bool", "additive", "packed"])
def test_rows_without_keys(small_tiles: None, kind: str) -> None:
    tensors = inputs(1, 2, 2, T, T - 17)
    mask = torch.ones(1, 1, T, T - 17, dtype=torch.bool, device=DEVICE)
    mask[:, :, :17] = False
    options = {
        "causal": replace(CAUSAL, bottom_right=True),
        "bool": Options(mask=mask),
        "additive": Options(mask=torch.where(mask, 0.0, -INFINITY)),
        "packed": Options(cu_seqlens_q=sequences(17, T - 17), cu_seqlens_k=sequences(0, T - 17)),
    }[kind]
    check(tensors, options)
    output, statistics, gradients = run(tensors, options, random(1, 2, T, 16), random(1, 2, T))
    assert output[:, :, :17].eq(0.0).all()
    assert statistics[0, :, :, :17].eq(-INFINITY).all()
    assert statistics[1, :, :, :17].eq(0.0).all()
    assert gradients[0][:, :, :17].eq(0.0).all()


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), torch.float32), (INFINITY, torch.float32), (float("nan"), torch.bfloat16)]
)
def test_what_is_masked_reaches_nothing(small_tiles: None, value: float, dtype: torch.dtype) -> None:
    """A masked key, in a tile of its own or beside visible ones, is as good as zero."""
    tensors = inputs(1, 1, 1, dtype=dtype)
    hidden = torch.zeros(S, dtype=torch.bool, device=DEVICE)
    hidden[[3, 20, 33, 44]] = True
    options = Options(mask=~hidden.expand(1, 1, 1, S), window_right=30)
    grad_output, grad_lse = random(1, 1, T, 16, dtype=dtype), random(1, 1, T)
    clean = [tensors[0], *(tensor.masked_fill(hidden[:, None], 0.0) for tensor in tensors[1:])]
    dirty = [tensors[0], *(tensor.masked_fill(hidden[:, None], value) for tensor in tensors[1:])]
    expected, actual = (run(each, options, grad_output, grad_lse) for each in (clean, dirty))
    for left, right in zip((*actual[:2], *actual[2][:3]), (*expected[:2], *expected[2][:3]), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("value", [float("nan"), INFINITY])
@pytest.mark.parametrize("name", ["key", "value"])
def test_special_values_reach_only_the_rows_that_see_them(small_tiles: None, name: str, value: float) -> None:
    """Key 20 under a causal mask: queries before it do not meet it, those from it on do."""
    clean = inputs(1, 2, 1, T, T)
    dirty = [tensor.clone() for tensor in clean]
    dirty[1 if name == "key" else 2][:, :, 20, 3] = value
    grad_output, grad_lse = random(1, 2, T, 16), random(1, 2, T)
    output, _, gradients = run(dirty, CAUSAL, grad_output, grad_lse)
    expected, _, expected_gradients = run(clean, CAUSAL, grad_output, grad_lse)
    torch.testing.assert_close(output[:, :, :20], expected[:, :, :20])
    torch.testing.assert_close(gradients[0][:, :, :20], expected_gradients[0][:, :, :20])
    if name == "key" and value != value:
        assert output[:, :, 20:].isnan().all()
    if name == "value":
        assert not output[:, :, 20:, 3].isfinite().any()
        torch.testing.assert_close(output[..., :3], expected[..., :3])


@pytest.mark.parametrize("name", ["query", "grad_output"])
def test_a_special_row_reaches_only_what_it_sees(small_tiles: None, name: str) -> None:
    """Query 20 under a causal mask: keys behind it do not meet it."""
    clean, clean_gradient, grad_lse = inputs(1, 2, 1, T, T), random(1, 2, T, 16), random(1, 2, T)
    dirty, dirty_gradient = [tensor.clone() for tensor in clean], clean_gradient.clone()
    (dirty[0] if name == "query" else dirty_gradient)[:, :, 20, 3] = float("nan")
    output, _, (grad_query, grad_key, grad_value, *_) = run(dirty, CAUSAL, dirty_gradient, grad_lse)
    expected, _, expected_gradients = run(clean, CAUSAL, clean_gradient, grad_lse)
    others = torch.arange(T, device=DEVICE) != 20
    if name == "query":
        assert output[:, :, 20].isnan().all()
    torch.testing.assert_close(output[:, :, others], expected[:, :, others], equal_nan=name != "query")
    torch.testing.assert_close(grad_query[:, :, others], expected_gradients[0][:, :, others])
    assert grad_query[:, :, 20].isnan().all()
    assert grad_key[:, :, :21].isnan().all()
    assert grad_value[:, :, :21, 3].isnan().all()
    for actual, exact in zip((grad_key, grad_value), expected_gradients[1:3], strict=True):
        torch.testing.assert_close(actual[:, :, 21:], exact[:, :, 21:])


@pytest.mark.parametrize("lowest", [-1e9, -1e30])
def test_a_large_finite_mask_is_an_average(small_tiles: None, lowest: float) -> None:
    """On a whole row: every logit rounds to the same number, so the row is the average of the values."""
    query, key, value = inputs(1, 2, 2)
    mask = torch.zeros(1, 1, T, S, device=DEVICE)
    mask[:, :, 11] = lowest
    grad_output = torch.zeros(1, 2, T, 16, device=DEVICE)
    grad_output[:, :, 11] = random(1, 2, 16)
    output, statistics, gradients = run([query, key, value], Options(mask=mask), grad_output, None)
    torch.testing.assert_close(output[:, :, 11], value.mean(2))
    assert statistics[0, :, :, 11].eq(lowest).all()
    torch.testing.assert_close(gradients[2], (grad_output[:, :, 11:12] / S).expand_as(value))
    delta = torch.einsum("bhd,bhsd->bhs", grad_output[:, :, 11], value)
    expected = (delta - delta.mean(-1, keepdim=True)) / S
    torch.testing.assert_close(gradients[3][0, 0, 11], expected.sum((0, 1)), rtol=1e-4, atol=1e-6)


LAYOUTS = {
    "contiguous": lambda *shape: random(*shape),
    "heads_last": lambda b, h, t, d: random(b, t, h, d).transpose(1, 2),
    "gapped": lambda b, h, t, d: random(b, h, t + 3, d + 7)[:, :, 1:-2, 2 : d + 2],
    "shared_projection": lambda b, h, t, d: random(b, t, 3, h, d)[:, :, 1].transpose(1, 2),
    "expanded_heads": lambda b, h, t, d: random(b, 1, t, d).expand(b, h, t, d),
    "expanded_rows": lambda b, h, t, d: random(b, h, 1, d).expand(b, h, t, d),
}
GRADIENT_LAYOUTS = {
    "scalar": lambda *shape: random(1, 1, 1, 1).expand(*shape),
    "columns_first": lambda b, h, t, d: random(b, h, d, t).transpose(2, 3),
    "heads_last": LAYOUTS["heads_last"],
    "gapped": LAYOUTS["gapped"],
    "expanded_rows": LAYOUTS["expanded_rows"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(small_tiles: None, layout: str) -> None:
    shapes = ((1, 2, 17, 16), (1, 2, 20, 16), (1, 2, 20, 16))
    tensors = [LAYOUTS[layout](*shape) for shape in shapes]
    results = check(tensors, CAUSAL)
    for actual, like in zip(results[:4], (tensors[0], *tensors), strict=True):
        assert actual.stride() == library.in_layout_of(like, like.shape).stride()


@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
def test_gradient_layouts(small_tiles: None, layout: str) -> None:
    check(inputs(1, 2, 1, 17, 20), CAUSAL, GRADIENT_LAYOUTS[layout](1, 2, 17, 16))


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("batch", "length", "key_length"), [(1, 0, 5), (1, 5, 0), (1, 0, 0), (0, 5, 5)])
def test_no_rows_or_no_keys(batch: int, length: int, key_length: int, with_sinks: bool) -> None:
    sinks = random(2) if with_sinks else None
    for options in (replace(CAUSAL, sinks=sinks), Options(mask=random(1, 1, 1, 1), sinks=sinks)):
        tensors = inputs(batch, 2, 1, length, key_length)
        check(tensors, options)


@pytest.mark.parametrize("feature", ["causal", "dropout", "mask"])
def test_the_same_bits_at_every_call(small_tiles: None, feature: str) -> None:
    tensors, options = inputs(), Options(**FEATURES[feature](), sinks=random(2))
    grad_output, grad_lse = random(1, 2, T, 16), random(1, 2, T)
    first, second = (run(tensors, options, grad_output, grad_lse) for _ in range(2))
    for left, right in zip((*first[:2], *first[2]), (*second[:2], *second[2]), strict=True):
        assert bits_equal(left, right)


def test_a_row_does_not_depend_on_its_batch(small_tiles: None) -> None:
    tensors = inputs(3, 2, 1)
    together, statistics = forward(*tensors, *CAUSAL.arguments())
    alone, alone_statistics = forward(*(tensor[1:2] for tensor in tensors), *CAUSAL.arguments())
    assert bits_equal(together[1:2], alone)
    assert bits_equal(statistics[:, 1:2], alone_statistics)


def test_gradients_not_asked_for_are_empty(small_tiles: None) -> None:
    tensors, options = inputs(), Options(mask=random(1, 1, T, S), sinks=random(2), softcap=2.0)
    output, statistics = forward(*tensors, *options.arguments())
    arguments = (random(1, 2, T, 16), None, output, statistics, *tensors, *options.arguments())
    every = backward(*arguments, *[True] * 5)
    for index in range(5):
        some = backward(*arguments, *[position == index for position in range(5)])
        for position, (gradient, full) in enumerate(zip(some, every, strict=True)):
            assert bits_equal(gradient, full) if position == index else gradient.shape == (0,)


@pytest.mark.parametrize("dropout_p", [2.0**-33, 0.4, 1.0])
def test_dropout_mask_is_philox(small_tiles: None, dropout_p: float) -> None:
    """With equal logits and one-hot values the output shows which weights were kept."""
    seed = torch.tensor([-(2**61) - 7], device=DEVICE)
    query, key, value = inputs(2, 2, 1, 19, S, 16, S)
    value = torch.eye(S, device=DEVICE).expand(2, 1, S, S).contiguous()
    options = Options(seed=seed, dropout_p=dropout_p)
    output, statistics = forward(torch.zeros_like(query), key, value, *options.arguments())
    keep = philox.keep_mask(seed, 2 * 2 * 19, S, dropout_p).reshape(2, 2, 19, S)
    assert torch.equal(output != 0.0, keep)
    assert statistics[1].eq(S).all()


def test_fakes_agree() -> None:
    tensors = [random(1, T, 2, 16, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    options = Options(mask=random(1, 1, T, T), sinks=random(2), window_right=0)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (*tensors, *options.arguments()), test_utils=checks)
    output, statistics = forward(*tensors, *options.arguments())
    torch.library.opcheck(
        backward,
        (output, None, output, statistics, *tensors, *options.arguments(), *options.wanted()),
        test_utils=checks,
    )


def test_every_width_has_a_tile() -> None:
    for table in (tiles.forward_tile, tiles.backward_key_tile, tiles.backward_query_tile):
        for itemsize, width, by_pair in itertools.product((2, 4), range(1, 513), (False, True)):
            tile = table(itemsize, width, 513 - width, 90, by_pair)
            assert min(tile[:4]) >= tiles.NARROWEST
            assert min(tile.block_d, tile.block_dv) <= tiles.WIDEST[itemsize]


def test_refusals_name_the_cause() -> None:
    served = dispatch.Call("attention", DEVICE, (torch.bfloat16, torch.bool), 4)
    assert backend_triton.refuse(served) is None
    assert backend_triton.refuse(served._replace(dtypes=(torch.float16, torch.float32))) is None
    assert "float64" in str(backend_triton.refuse(served._replace(dtypes=(torch.float64,))))
    assert "xpu" in str(backend_triton.refuse(served._replace(device_type="xpu")))
