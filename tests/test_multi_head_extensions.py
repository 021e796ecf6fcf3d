"""What MultiheadAttention has beyond torch's: grouped heads, rotary positions, a cache."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fusewright.nn import KeyValueCache, MultiheadAttention, RotaryEmbedding
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

WIDTH, HEADS, BATCH, QUERIES, KEYS = 24, 4, 3, 6, 9


def _normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"kdim": 10, "vdim": 14}, {"add_bias_kv": True}], ids=str)
def test_grouped_heads_are_repeated_heads(options):
    grouped = MultiheadAttention(WIDTH, HEADS, num_kv_heads=2, **options)
    full = nn.MultiheadAttention(WIDTH, HEADS, **options)
    width = WIDTH // HEADS

    def repeated(tensor):
        """The rows of each key head once for each of its query heads."""
        return tensor.unflatten(0, (2, width)).repeat_interleave(2, dim=0).flatten(0, 1)

    state = grouped.state_dict()
    for name in ("in_proj_weight", "in_proj_bias"):
        if name in state:
            query, key, value = state[name].split([WIDTH, 2 * width, 2 * width])
            state[name] = torch.cat([query, repeated(key), repeated(value)])
    for name in ("k_proj_weight", "v_proj_weight"):
        if name in state:
            state[name] = repeated(state[name])
    for name in ("bias_k", "bias_v"):
        if name in state:
            state[name] = repeated(state[name].flatten())[None, None]
    full.load_state_dict(state)
    widths = (WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
    inputs = [
        _normal(*size, seed=i) for i, size in enumerate(zip((QUERIES, KEYS, KEYS), (BATCH,) * 3, widths, strict=True))
    ]
    for average in (True, False):
        for actual, expected in zip(
            grouped(*inputs, average_attn_weights=average), full(*inputs, average_attn_weights=average), strict=True
        ):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_pairs_as_complex_numbers(interleaved):
    rotary = RotaryEmbedding(8, base=100.0, interleaved=interleaved, max_positions=2)
    heads = _normal(2, 3, 5, 10)
    turned = rotary(heads, 7)
    angles = (7 + torch.arange(5))[:, None] * 100.0 ** (-torch.arange(4) / 4)
    first, second = (slice(0, 8, 2), slice(1, 8, 2)) if interleaved else (slice(0, 4), slice(4, 8))
    expected = torch.complex(heads[..., first], heads[..., second]) * torch.polar(torch.ones(5, 4), angles)
    torch.testing.assert_close(turned[..., first], expected.real)
    torch.testing.assert_close(turned[..., second], expected.imag)
    assert torch.equal(turned[..., 8:], heads[..., 8:])
    per_sequence = rotary(heads, torch.tensor([7, 0]))
    torch.testing.assert_close(per_sequence[0], turned[0])
    torch.testing.assert_close(per_sequence[1], rotary(heads)[1])


def test_rotary_tables():
    rotary = RotaryEmbedding(8, max_positions=4)
    assert not rotary.state_dict()
    assert rotary.bfloat16().cos.dtype is torch.float32
    from_meta = RotaryEmbedding(8, max_positions=4, device="meta").to_empty(device="cpu")
    assert torch.equal(from_meta.cos, rotary.cos) and torch.equal(from_meta.sin, rotary.sin)
    reference = torch.arange(8, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)
    rotary(_normal(1, 1, 8, 8))
    torch.testing.assert_close(rotary.cos[:8], reference.cos().float())
    for arguments, message in (((7,), "dim is 7"), ((8, -1.0), "base is -1.0"), ((8, 1.0, False, 0), "max_positions")):
        with pytest.raises(ArgumentValueError, match=message):
            RotaryEmbedding(*arguments)
    with pytest.raises(ArgumentValueError, match="offset is -1"):
        rotary(_normal(1, 1, 8, 8), -1)
    with pytest.raises(ArgumentValueError, match=r"heads\.shape"):
        rotary(_normal(1, 1, 8, 6))


EXTENSIONS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "rotary": {"rotary": 6},
    "window": {"window": (3, 0)},
    "zero key": {"add_zero_attn": True},
    "all": {"num_kv_heads": 1, "rotary": 4, "window": (2, 0), "add_zero_attn": True, "batch_first": True},
}


def _extended(name):
    options = dict(EXTENSIONS[name])
    if "rotary" in options:
        options["rotary"] = RotaryEmbedding(options["rotary"])
    torch.manual_seed(2)
    return MultiheadAttention(WIDTH, HEADS, **options).eval()


@pytest.mark.parametrize("name", EXTENSIONS)
def test_decoding_over_a_cache_is_causal_attention(name):
    module = _extended(name)
    length_dim = 1 if module.batch_first else 0
    size = (BATCH, 11, WIDTH) if module.batch_first else (11, BATCH, WIDTH)
    x = _normal(*size)
    with torch.no_grad():
        expected = module(x, x, x, need_weights=False, is_causal=True)[0]
        cache = module.make_cache(BATCH, 11)
        steps = [
            module(part, part, part, need_weights=False, cache=cache)[0]
            for part in x.split([4, 1, 1, 3, 1, 1], dim=length_dim)
        ]
    torch.testing.assert_close(torch.cat(steps, length_dim), expected)
    assert cache.lengths.tolist() == [11] * BATCH


def test_cache_of_prompts_of_different_lengths():
    module = _extended("all")
    lengths = torch.tensor([5, 2, 4])
    prompts, following = _normal(BATCH, 5, WIDTH), _normal(BATCH, 1, WIDTH, seed=1)
    with torch.no_grad():
        cache = module.make_cache(BATCH, 6)
        module(prompts, prompts, prompts, need_weights=False, cache=cache)
        cache.reset(lengths)
        actual = module(following, following, following, need_weights=False, cache=cache)[0]
        for b, length in enumerate(lengths.tolist()):
            whole = torch.cat([prompts[b : b + 1, :length], following[b : b + 1]], 1)
            expected = module(whole, whole, whole, need_weights=False, is_causal=True)[0]
            torch.testing.assert_close(actual[b, 0], expected[0, -1])
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0]


def test_a_compiled_decoding_step_is_compiled_once_for_every_length():
    module = _extended("all")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, backend=counter)
    x = _normal(BATCH, 6, WIDTH)
    with torch.no_grad():
        expected = module(x, x, x, need_weights=False, is_causal=True)[0]
        cache = module.make_cache(BATCH, 6)
        steps = [compiled(part, part, part, need_weights=False, cache=cache)[0] for part in x.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), expected)
    # Once with the first length as a constant, once for all.
    assert counter.frame_count <= 2


def test_bad_caches():
    module = _extended("plain")
    x = _normal(2, BATCH, WIDTH)
    cache = module.make_cache(BATCH, 3)
    for call, message in (
        ({}, "need_weights is True"),
        (
            {"need_weights": False, "attn_mask": torch.zeros(2, 3, dtype=torch.bool)},
            "attn_mask is given, of torch.bool",
        ),
        ({"need_weights": False}, "key.requires_grad is True"),
    ):
        with pytest.raises(ArgumentValueError, match=message):
            module(x, x, x, cache=cache, **call)
    with pytest.raises(ArgumentTypeError, match="cache is a str"):
        module(x, x, x, need_weights=False, cache="cache")
    with torch.no_grad():
        module(x, x, x, need_weights=False, cache=cache)
        with pytest.raises(ArgumentValueError, match="the cache's length is 4, expected at most its capacity 3"):
            module(x, x, x, need_weights=False, cache=cache)
    assert cache.lengths.tolist() == [2] * BATCH
    with pytest.raises(ArgumentValueError, match=r"key.shape is \(1, 4, 1, 6\)"):
        cache.append(torch.zeros(1, 4, 1, 6), torch.zeros(1, 4, 1, 6))
    with pytest.raises(ArgumentTypeError, match=r"key\.dtype"):
        cache.append(*(torch.zeros(BATCH, 4, 1, 6).double(),) * 2)
    with pytest.raises(ArgumentValueError, match="lengths is"):
        cache.reset(torch.tensor([3, 0, 0]))
    assert KeyValueCache(2, 1, 4, 8, 6).value.shape == (2, 1, 4, 6)


def test_inside_torchs_encoder_layer():
    """torch's fast path must not run past an extended module."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True).eval()
    x = _normal(BATCH, QUERIES, WIDTH)
    torch.manual_seed(2)
    layer.self_attn = MultiheadAttention(WIDTH, HEADS, batch_first=True, num_kv_heads=2).eval()
    with torch.no_grad():
        actual = layer(x)
    torch.testing.assert_close(actual, layer(x).detach())


def test_copies():
    module = _extended("all")
    x = _normal(BATCH, QUERIES, WIDTH)
    assert torch.equal(copy.deepcopy(module)(x, x, x)[0], module(x, x, x)[0])


@pytest.mark.parametrize("options", [{}, {"bias": False, "num_kv_heads": 2}, {"kdim": 10, "vdim": 10}], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_memory_is_projected_once(options, batch_first):
    module = MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **options)
    query, memory = _normal(3, BATCH, WIDTH), _normal(5, BATCH, options.get("kdim", WIDTH), seed=1)
    if batch_first:
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    projected = module.project_memory(memory)
    actual = module(query, memory, memory, projected=projected)
    for one, other in zip(actual, module(query, memory, memory), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentValueError, match=r"memory.shape is \(5, 7\)"):
        module.project_memory(_normal(5, 7))
