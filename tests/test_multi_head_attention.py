"""MultiheadAttention against torch's."""

import copy

import pytest
import torch
from torch import nn

from fusewright.nn import MultiheadAttention, RotaryEmbedding, attention_weights
from fusewright_kernels.checks import ArgumentValueError

WIDTH, HEADS, BATCH, QUERIES, KEYS = 24, 4, 3, 6, 9


def _normal(*size, dtype=torch.float32, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _pair(dtype=torch.float32, **options):
    """torch's module and ours with the same parameters, every bias different from 0."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = MultiheadAttention(WIDTH, HEADS, **options)
    assert ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype), ours.to(dtype)


def _inputs(batch_first=False, unbatched=False, self_attention=False, kdim=WIDTH, vdim=WIDTH, dtype=torch.float32):
    """query, key, value in the layout asked for; key is value where their widths allow it."""

    def tensor(length, width, seed):
        if unbatched:
            return _normal(length, width, dtype=dtype, seed=seed)
        size = (BATCH, length, width) if batch_first else (length, BATCH, width)
        return _normal(*size, dtype=dtype, seed=seed)

    query = tensor(QUERIES, WIDTH, 1)
    if self_attention:
        return query, query, query
    key = tensor(KEYS, kdim, 2)
    return query, key, key if vdim == kdim else tensor(KEYS, vdim, 3)


def _results(module, inputs, **options):
    """Output, weights and the gradients of inputs and parameters, through output and weights alike."""
    leaves = {id(tensor): tensor.detach().clone().requires_grad_() for tensor in inputs}
    output, weights = module(*(leaves[id(tensor)] for tensor in inputs), **options)
    loss = (output.float() * _normal(*output.shape, seed=8)).sum()
    if weights is not None:
        loss = loss + (weights.float() * _normal(*weights.shape, seed=9)).sum()
    names = [name for name, _ in module.named_parameters()]
    gradients = torch.autograd.grad(loss, [*leaves.values(), *module.parameters()])
    named = dict(zip([f"input {i}" for i in range(len(leaves))] + names, gradients, strict=True))
    return {"output": output.detach(), "weights": None if weights is None else weights.detach(), **named}


def _assert_same(actual, expected, rtol=1e-4, atol=2e-5):
    assert actual.keys() == expected.keys()
    for name in expected:
        if expected[name] is None:
            assert actual[name] is None
            continue
        torch.testing.assert_close(
            actual[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


CONSTRUCTORS = {
    "plain": {},
    "no bias": {"bias": False},
    "key bias": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "both extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim and vdim": {"kdim": 10, "vdim": 14},
    "kdim, extra keys, no bias": {"kdim": 10, "vdim": 10, "add_bias_kv": True, "add_zero_attn": True, "bias": False},
}
LAYOUTS = {
    "sequence first": {},
    "batch first": {"batch_first": True},
    "unbatched": {"unbatched": True},
    "self": {"self_attention": True},
    "self, batch first": {"self_attention": True, "batch_first": True},
}


@pytest.mark.parametrize("weights", [None, True, False], ids=["no weights", "averaged", "per head"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_is_torchs(constructor, layout, weights):
    options, layout_options = CONSTRUCTORS[constructor], LAYOUTS[layout]
    if "kdim" in options and "self_attention" in layout_options:
        pytest.skip("self-attention has one width")
    batch_first = layout_options.get("batch_first", False)
    theirs, ours = _pair(batch_first=batch_first, **options)
    inputs = _inputs(**layout_options, **{name: options[name] for name in ("kdim", "vdim") if name in options})
    call = {"need_weights": weights is not None, "average_attn_weights": bool(weights)}
    _assert_same(_results(ours, inputs, **call), _results(theirs, inputs, **call))


def _masks(kind):
    """key_padding_mask (B, S) and attn_mask without a row that sees nothing."""
    generator = torch.Generator().manual_seed(5)
    padding = torch.arange(KEYS) >= torch.tensor([9, 5, 7])[:, None]
    blocked = torch.rand(QUERIES, KEYS, generator=generator) < 0.4
    blocked[:, 0] = False
    per_head = torch.rand(BATCH * HEADS, QUERIES, KEYS, generator=generator) < 0.4
    per_head[:, :, 0] = False
    causal = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)

    def floating(mask):
        return torch.zeros(mask.shape).masked_fill(mask, -torch.inf) + torch.rand(mask.shape, generator=generator)

    return {
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": floating(padding)},
        "pairs": {"attn_mask": blocked},
        "float pairs": {"attn_mask": floating(blocked)},
        "heads": {"attn_mask": per_head},
        "padding and pairs": {"key_padding_mask": padding, "attn_mask": blocked},
        "padding and heads": {"key_padding_mask": padding, "attn_mask": per_head},
        "float padding and float heads": {"key_padding_mask": floating(padding), "attn_mask": floating(per_head)},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and padding": {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
    }[kind]


MASKS = (
    "padding", "float padding", "pairs", "float pairs", "heads", "padding and pairs", "padding and heads",
    "float padding and float heads", "causal", "causal and padding",
)  # fmt: skip


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["plain", "extra keys"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, options, need_weights):
    if kind == "causal" and options and not need_weights:
        pytest.skip("torch hides the extra keys from causal queries here and nowhere else")
    theirs, ours = _pair(**options)
    call = {**_masks(kind), "need_weights": need_weights}
    _assert_same(_results(ours, _inputs(), **call), _results(theirs, _inputs(), **call))


def test_unbatched_masks():
    theirs, ours = _pair()
    inputs = _inputs(unbatched=True)
    for call in (
        {"key_padding_mask": _masks("padding")["key_padding_mask"][1]},
        {"attn_mask": _masks("heads")["attn_mask"][:HEADS], "average_attn_weights": False},
    ):
        _assert_same(_results(ours, inputs, **call), _results(theirs, inputs, **call))


def test_masks_may_mix_bool_and_float():
    ours = _pair()[1]
    mixed = {"key_padding_mask": _masks("padding")["key_padding_mask"], "attn_mask": _masks("float pairs")["attn_mask"]}
    floats = mixed | {
        "key_padding_mask": torch.zeros(BATCH, KEYS).masked_fill(mixed["key_padding_mask"], -torch.inf),
    }
    _assert_same(_results(ours, _inputs(), **mixed), _results(ours, _inputs(), **floats))


def test_a_float_mask_gets_its_gradient():
    theirs, ours = _pair()
    mask = _normal(QUERIES, KEYS).requires_grad_()
    gradients = []
    for module in (theirs, ours):
        output, weights = module(*_inputs(), attn_mask=mask)
        gradients.append(torch.autograd.grad((output.square().sum() + weights.square().sum()), mask)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
def test_bfloat16(need_weights):
    theirs, ours = _pair(torch.bfloat16)
    exact = _results(copy.deepcopy(theirs).double(), [t.double() for t in _inputs(dtype=torch.bfloat16)])
    actual = _results(ours, _inputs(dtype=torch.bfloat16), need_weights=need_weights)
    baseline = _results(theirs, _inputs(dtype=torch.bfloat16), need_weights=need_weights)
    assert actual["output"].dtype is torch.bfloat16
    names = ("output", "weights") if need_weights else ("output",)
    for name in names:
        error = (actual[name].double() - exact[name]).norm()
        assert error <= 1.2 * (baseline[name].double() - exact[name]).norm() + 1e-3


def test_float64_runs():
    theirs, ours = _pair(torch.float64)
    inputs = _inputs(dtype=torch.float64)
    _assert_same(_results(ours, inputs), _results(theirs, inputs), rtol=1e-10, atol=1e-10)


def test_autocast_follows_torch():
    theirs, ours = _pair()
    exact = theirs(*_inputs())[0]
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = theirs(*_inputs())[0], ours(*_inputs())[0]
    assert actual.dtype is expected.dtype is torch.bfloat16
    assert (actual - exact).norm() <= 1.2 * (expected - exact).norm()


def test_a_query_without_a_key_gives_zeros():
    ours = _pair()[1]
    mask = torch.zeros(QUERIES, KEYS, dtype=torch.bool)
    mask[2] = True
    results = _results(ours, _inputs(), attn_mask=mask)
    assert torch.equal(results["weights"][:, 2], torch.zeros(BATCH, KEYS))
    torch.testing.assert_close(results["output"][2], ours.out_proj.bias.detach().expand(BATCH, -1))
    assert all(tensor.isfinite().all() for tensor in results.values())


def test_dropout_weights_are_those_that_made_the_output():
    ours = MultiheadAttention(8, 1, dropout=0.5, bias=False)
    with torch.no_grad():
        ours.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))
        ours.out_proj.weight.copy_(torch.eye(8))
    x = _normal(40, 8)
    torch.manual_seed(3)
    output, weights = ours(x, x, x)
    torch.testing.assert_close(output, weights @ x)
    assert 0.3 < (weights == 0.0).float().mean() < 0.7
    torch.manual_seed(3)
    assert torch.equal(ours(x, x, x)[0], output)
    assert not torch.equal(ours(x, x, x)[0], output)
    assert (ours.eval()(x, x, x)[1] > 0.0).all()


def test_same_seed_same_parameters():
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True)
    torch.manual_seed(1)
    ours = MultiheadAttention(WIDTH, HEADS, add_bias_kv=True)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(theirs.state_dict()[name], ours.state_dict()[name]) for name in theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("average", [True, False])
def test_weights_by_blocks(monkeypatch, average):
    theirs, ours = _pair(add_zero_attn=True)
    call = {"average_attn_weights": average, **_masks("heads")}
    monkeypatch.setattr(attention_weights, "_BLOCK_ELEMENTS", 2 * BATCH * HEADS * KEYS)
    _assert_same(_results(ours, _inputs(), **call), _results(theirs, _inputs(), **call))


def test_weights_of_blocks_are_not_kept_for_the_backward():
    ours = MultiheadAttention(16, 4)
    x = _normal(96, 2, 16)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(x, x, x)
    assert max(sizes) < 2 * 4 * 96 * 96


@pytest.mark.parametrize(
    "call",
    [
        {"attn_mask": torch.zeros(QUERIES, KEYS + 1)},
        {"attn_mask": torch.zeros(QUERIES, KEYS, dtype=torch.int64)},
        {"key_padding_mask": torch.zeros(BATCH, KEYS + 1)},
        {"key_padding_mask": torch.zeros(KEYS)},
        {"key": _normal(KEYS, BATCH, WIDTH + 1)},
        {"value": _normal(KEYS + 1, BATCH, WIDTH)},
        {"query": _normal(1, QUERIES, BATCH, WIDTH)},
    ],
    ids=lambda call: f"{next(iter(call))} {tuple(next(iter(call.values())).shape)}",
)
def test_errors_are_torchs(call):
    theirs, ours = _pair()
    arguments = dict(zip(("query", "key", "value"), _inputs(), strict=True)) | call
    with pytest.raises(Exception) as expected:
        theirs(**arguments)
    with pytest.raises(type(expected.value)) as actual:
        ours(**arguments)
    assert str(actual.value) == str(expected.value)


def test_bad_constructor_arguments():
    for options, message in (
        ({"num_kv_heads": 3}, "num_kv_heads is 3"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"rotary": RotaryEmbedding(8)}, "rotary.dim is 8"),
    ):
        with pytest.raises(ArgumentValueError, match=message):
            MultiheadAttention(WIDTH, HEADS, **options)
    with pytest.raises(AssertionError):
        MultiheadAttention(WIDTH, 5)
    with pytest.raises(ArgumentValueError, match=r"attn_mask.shape is \(2, 2\)"):
        MultiheadAttention(WIDTH, HEADS, num_kv_heads=2)(*_inputs(), attn_mask=torch.zeros(2, 2))


def test_transforms_and_compile():
    theirs, ours = _pair(batch_first=True)
    x = _normal(BATCH, QUERIES, WIDTH)
    parameters = dict(ours.named_parameters())

    def loss(parameters, sample):
        output, weights = torch.func.functional_call(ours, parameters, (sample, sample, sample))
        return output.square().sum() + weights.square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    expected = torch.func.grad(loss)(parameters, x[1])
    for name in parameters:
        torch.testing.assert_close(per_sample[name][1], expected[name], rtol=1e-3, atol=1e-4)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    _assert_same(_results(compiled._orig_mod, (x, x, x)), _results(theirs, (x, x, x)))
    for actual, eager in zip(compiled(x, x, x), ours(x, x, x), strict=True):
        torch.testing.assert_close(actual, eager)


def test_window_is_a_mask():
    theirs, ours = _pair()
    ours.window = (2, 1)
    distance = torch.arange(KEYS) - torch.arange(QUERIES)[:, None]
    mask = (distance < -2) | (distance > 1)
    _assert_same(_results(ours, _inputs()), _results(theirs, _inputs(), attn_mask=mask))


def test_causal_without_a_mask():
    theirs, ours = _pair()
    inputs = _inputs(self_attention=True)
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    _assert_same(_results(ours, inputs, is_causal=True), _results(theirs, inputs, attn_mask=mask))
