"""What attention promises whatever the values are: masks hide, rows are independent, memory around stays untouched."""

import math

import pytest
import torch
from op_support import DTYPES

from fusewright import functional, patterns, testing
from fusewright.testing import layouts

backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
NAN, INF = math.nan, math.inf


def _qkv(*sizes, dtype=torch.float32, seed=0):
    """(B, H, HK, T, S, D) as query, key and value."""
    batch, heads, key_heads, queries, keys, width = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, queries, width), (batch, key_heads, keys, width), (batch, key_heads, keys, width))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _with_gradients(inputs, **options):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = functional.scaled_dot_product_attention(*leaves, enable_gqa=True, **options)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@backends
def test_rows_without_a_key_are_zero(backend, dtype):
    inputs = _qkv(1, 2, 1, 70, 66, 16, dtype=dtype)
    mask = torch.rand(70, 66) < 0.5
    mask[[0, 3, 69]] = False
    results = _with_gradients(inputs, attn_mask=mask, backend=backend)
    for result in results[:2]:
        assert result[:, :, [0, 3, 69]].eq(0).all()
    testing.assert_no_nan(*results)
    _, lse = functional.scaled_dot_product_attention(*inputs, mask, enable_gqa=True, return_lse=True, backend=backend)
    assert lse[:, :, [0, 3, 69]].eq(-INF).all() and lse[:, :, 1].isfinite().all()


@pytest.mark.parametrize("hidden", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive", "causal"])
@backends
def test_masked_keys_and_values_reach_nothing(backend, kind, dtype, hidden):
    inputs = _qkv(1, 2, 2, 70, 70, 8, dtype=dtype)
    visible = torch.rand(70, 70, generator=torch.Generator().manual_seed(2)) < 0.5
    if kind == "causal":
        options, gone = {"is_causal": True, "window": (-1, 0)}, slice(69, 70)
        keep = slice(0, 69)
    else:
        visible[:, 13:15] = False
        options = {"attn_mask": visible if kind == "bool" else torch.where(visible, 0.5, -INF).to(dtype)}
        gone, keep = slice(13, 15), slice(0, 70)
    expected = _with_gradients(inputs, backend=backend, **options)
    poisoned = [tensor.clone() for tensor in inputs]
    for tensor in poisoned[1:]:
        tensor[:, :, gone] = hidden
    actual = _with_gradients(poisoned, backend=backend, **options)
    # Close and not equal: blocks that hold something not finite are summed in another order.
    for index in (0, 1):
        torch.testing.assert_close(actual[index][:, :, keep], expected[index][:, :, keep])
    if kind != "causal":
        for index in (2, 3):
            torch.testing.assert_close(actual[index], expected[index])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@backends
def test_nan_in_a_query_stays_in_its_row(backend, dtype):
    inputs = _qkv(1, 1, 1, 70, 70, 8, dtype=dtype)
    expected = _with_gradients(inputs, is_causal=True, backend=backend)
    inputs[0][0, 0, 40, 3] = NAN
    actual = _with_gradients(inputs, is_causal=True, backend=backend)
    rows = [row for row in range(70) if row != 40]
    for index in (0, 1):
        assert actual[index][:, :, 40].isnan().all()
        torch.testing.assert_close(actual[index][:, :, rows], expected[index][:, :, rows])
    for index in (2, 3):  # keys behind query 40 take no part in its row
        torch.testing.assert_close(actual[index][:, :, 41:], expected[index][:, :, 41:])
        assert actual[index][:, :, :41].isnan().all()


@backends
def test_infinite_value_reaches_the_rows_that_see_it(backend):
    query, key, value = _qkv(1, 1, 1, 70, 70, 8)
    value[0, 0, 30, 2] = INF
    output = functional.scaled_dot_product_attention(query, key, value, is_causal=True, backend=backend)
    assert output[0, 0, :30].isfinite().all()
    assert not output[0, 0, 30:, 2].isfinite().any()
    assert output[0, 0, 30:, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("sizes", [(0, 2, 1, 5, 5, 4), (2, 2, 1, 0, 5, 4), (2, 2, 1, 5, 0, 4), (1, 0, 0, 5, 5, 4),
                                   (1, 0, 0, 2, 5, 4), (1, 2, 1, 5, 5, 1), (1, 1, 1, 1, 1, 1)], ids=str)  # fmt: skip
@backends
def test_empty_and_smallest_sizes(backend, sizes):
    inputs = _qkv(*sizes)
    results = _with_gradients(inputs, backend=backend)
    assert [result.shape for result in results] == [inputs[0].shape, *(tensor.shape for tensor in inputs)]
    if sizes[4] == 0:
        assert results[0].eq(0).all()
    testing.assert_no_nan(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_bits_do_not_depend_on_threads_batch_or_run(causal, dtype):
    inputs = _qkv(3, 4, 2, 150, 200, 24, dtype=dtype)

    def run(*tensors):
        return _with_gradients(tensors, is_causal=causal, backend="cpu")

    testing.assert_repeatable(run, inputs)
    testing.assert_thread_count_invariant(run, inputs)

    def forward(*tensors):
        return functional.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=True, backend="cpu")

    testing.assert_batch_invariant(forward, inputs)
    # Queries taken together differ in number with the number of tasks; a row must not show it.
    long = _qkv(1, 1, 1, 700, 90, 24, dtype=dtype)
    whole = forward(*long)
    assert testing.bits_equal(forward(long[0][:, :, :65].contiguous(), *long[1:]), whole[:, :, :65].contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_gives_the_same_bits(dtype):
    inputs = _qkv(2, 4, 2, 35, 70, 10, dtype=dtype)
    expected = _with_gradients(inputs, backend="cpu")
    for change in (layouts.transposed, layouts.gapped, layouts.every_second, layouts.misaligned,
                   lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):  # fmt: skip
        for actual, result in zip(_with_gradients([change(t) for t in inputs], backend="cpu"), expected, strict=True):
            torch.testing.assert_close(actual, result, rtol=0, atol=0)


def test_output_lies_in_memory_as_the_query():
    """A caller that merges heads by transpose and reshape pays no copy."""
    inputs = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in _qkv(2, 4, 4, 6, 6, 8)]
    assert functional.scaled_dot_product_attention(*inputs).transpose(1, 2).is_contiguous()


def test_expanded_tensors_are_not_copied_and_right():
    query, key, value = _qkv(1, 1, 1, 20, 30, 8)
    views = [query.expand(3, 4, 20, 8), key.expand(3, 4, 30, 8), value.expand(3, 4, 30, 8)]
    actual = _with_gradients(views, backend="cpu")
    expected = _with_gradients([view.contiguous() for view in views], backend="cpu")
    for result, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 33])
def test_reads_and_writes_stay_inside_the_tensors(width, dtype):
    inputs = _qkv(1, 2, 1, 67, 131, width, dtype=dtype)
    guards = [testing.guarded(tensor) for tensor in inputs]
    mask = testing.guarded(torch.randn(67, 131).to(dtype))
    with testing.poisoned_allocations():
        results = _with_gradients([guard.tensor for guard in guards], attn_mask=mask.tensor, backend="cpu")
    testing.assert_no_nan(*results)
    for guard in (*guards, mask):
        guard.check()


@backends
def test_dropout_is_a_function_of_the_seed(backend):
    inputs = _qkv(1, 2, 2, 64, 64, 16)

    def run(seed):
        return _with_gradients(inputs, dropout_p=0.4, seed=seed, backend=backend)

    for first, second in zip(run(3), run(3), strict=True):
        assert testing.bits_equal(first, second)
    assert not torch.equal(run(3)[0], run(4)[0])
    state = torch.get_rng_state()
    run(5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    drawn = [functional.scaled_dot_product_attention(*inputs, dropout_p=0.4, backend=backend) for _ in range(2)]
    assert not torch.equal(*drawn)
    torch.manual_seed(1)
    again = functional.scaled_dot_product_attention(*inputs, dropout_p=0.4, backend=backend)
    assert torch.equal(again, drawn[0])


@backends
def test_everything_dropped_is_zero(backend):
    for result in _with_gradients(_qkv(1, 1, 1, 9, 9, 4), dropout_p=1.0, seed=0, backend=backend):
        assert result.eq(0).all()


def test_patterns_select_blocks():
    window = patterns.Window(1, 0, 4).blocks(3, 4)
    assert window[0].tolist() == [[True, False, False, False], [True, True, False, False], [False, True, True, False]]
    assert patterns.Global(1, 4).blocks(3, 3)[0].sum() == 5
    assert patterns.Strided(2, 4).blocks(4, 4)[0, 3].tolist() == [False, True, False, True]
    assert patterns.Random(2, seed=1, block_size=4).blocks(5, 6).sum(-1).eq(2).all()
    union = patterns.Window(0, 0, 4) | patterns.Global(1, 4)
    assert union.blocks(3, 3)[0].tolist() == [[True, True, True], [True, True, False], [True, False, True]]
    per_head = patterns.PerHead([patterns.Window(0, 0, 4), patterns.Global(1, 4)])
    assert per_head.block_mask(2, 9, 9, torch.device("cpu")).shape == (2, 3, 3)


def test_pattern_per_head_is_each_head_alone():
    query, key, value = _qkv(1, 2, 2, 70, 70, 8)
    each = [patterns.Window(1, 0, 16), patterns.Strided(2, 16)]
    together = functional.scaled_dot_product_attention(query, key, value, pattern=patterns.PerHead(each))
    for head, pattern in enumerate(each):
        alone = functional.scaled_dot_product_attention(
            query[:, head : head + 1], key[:, head : head + 1], value[:, head : head + 1], pattern=pattern
        )
        assert testing.bits_equal(together[:, head : head + 1].contiguous(), alone)
