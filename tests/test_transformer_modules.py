"""Transformer layers and stacks against torch's."""

import copy
import warnings

import pytest
import torch
from enable_support import assert_same, normal
from torch import nn

import fusewright
from fusewright import nn as fused
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

WIDTH, HEADS, HIDDEN, BATCH, LENGTH, MEMORY = 16, 4, 24, 3, 6, 5
NAMES = ("TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder", "TransformerDecoder",
         "Transformer")  # fmt: skip


def _softsign(hidden):
    return nn.functional.softsign(hidden)


def _module(library, name, **options):
    """The module ``name`` of torch.nn or of ours, two layers in a stack, with weights that are not near 0."""
    torch.manual_seed(0)
    options = {"dim_feedforward": HIDDEN, "dropout": 0.0, **options}
    if name == "Transformer":
        module = library.Transformer(WIDTH, HEADS, 1, 2, **options)
    elif name.endswith("Layer"):
        module = getattr(library, name)(WIDTH, HEADS, **options)
    else:
        layer = getattr(library, f"{name}Layer")(WIDTH, HEADS, **options)
        norm = library.LayerNorm(WIDTH)
        stack = getattr(library, name)
        module = stack(layer, 2, norm, enable_nested_tensor=False) if "Encoder" in name else stack(layer, 2, norm)
    return module


def _pair(name, **options):
    """torch's module and ours, with the same weights that differ from layer to layer."""
    theirs, ours = _module(nn, name, **options), _module(fused, name, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    assert ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def _inputs(name, batch_first=False, batched=True):
    def sequence(length, seed):
        size = (BATCH, length) if batch_first else (length, BATCH)
        return normal(*(size if batched else (length,)), WIDTH, seed=seed)

    return (sequence(LENGTH, 1),) if "Encoder" in name else (sequence(LENGTH, 1), sequence(MEMORY, 2))


def _masks(name, kind):
    """Keywords of a call; every query sees a key."""
    prefix = "tgt_" if "Decoder" in name or name == "Transformer" else "" if name == "TransformerEncoder" else "src_"
    padded = "tgt" if prefix == "tgt_" else "src"
    length = MEMORY if name == "Transformer" else LENGTH
    if name == "Transformer":
        prefix, padded = "src_", "src"
        length = LENGTH
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    padding = torch.arange(length) >= torch.tensor([length, length - 2, length - 1])[:, None]
    # Left of the diagonal nothing is hidden, so that causal queries see a key.
    float_padding = torch.zeros(BATCH, length).masked_fill(padding, -torch.inf)
    float_causal = nn.Transformer.generate_square_subsequent_mask(length)
    heads = torch.rand(BATCH * HEADS, length, length, generator=torch.Generator().manual_seed(3)) < 0.4
    heads[:, :, 0] = False
    hint = "is_causal" if padded == "src" and name != "Transformer" else f"{padded}_is_causal"
    return {
        "none": {},
        "causal": {f"{prefix}mask": causal},
        "float causal": {f"{prefix}mask": float_causal},
        "hinted": {f"{prefix}mask": float_causal, hint: True},
        "padding": {f"{padded}_key_padding_mask": padding},
        "hinted and padding": {
            f"{prefix}mask": float_causal, hint: True, f"{padded}_key_padding_mask": float_padding,
        },
        "heads": {f"{prefix}mask": heads},
        "heads and padding": {f"{prefix}mask": heads, f"{padded}_key_padding_mask": padding},
    }[kind]  # fmt: skip


MASKS = ("none", "causal", "float causal", "hinted", "padding", "hinted and padding", "heads", "heads and padding")


def _results(module, inputs, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = module(*leaves, **options)
    loss = (output * normal(*output.shape, seed=8)).sum()
    return [output.detach(), *torch.autograd.grad(loss, [*leaves, *module.parameters()])]


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", NAMES)
def test_is_torchs(name, kind, norm_first):
    theirs, ours = _pair(name, norm_first=norm_first)
    inputs, masks = _inputs(name), _masks(name, kind)
    if name == "Transformer":
        inputs = inputs[0], inputs[1]
    assert_same(_results(ours, inputs, **masks), _results(theirs, inputs, **masks), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"bias": False},
        {"activation": "gelu", "layer_norm_eps": 1e-3},
        {"activation": _softsign, "norm_first": True},
    ],
    ids=["batch first", "no bias", "gelu", "callable"],
)
@pytest.mark.parametrize("name", NAMES)
def test_configurations(name, options):
    theirs, ours = _pair(name, **options)
    inputs = _inputs(name, options.get("batch_first", False))
    expected = _results(theirs, inputs)
    assert_same(_results(ours, inputs), expected, rtol=1e-3, atol=1e-4)
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        assert_same([ours(*inputs)], [theirs(*inputs)], rtol=1e-3, atol=1e-4)
        assert_same([ours(*inputs)], expected[:1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_one_sequence(name):
    theirs, ours = _pair(name)
    inputs = _inputs(name, batched=False)
    assert_same(_results(ours, inputs), _results(theirs, inputs), rtol=1e-3, atol=1e-4)


def test_masks_of_the_memory():
    theirs, ours = _pair("Transformer", batch_first=True)
    inputs = _inputs("Transformer", batch_first=True)
    mask = torch.rand(MEMORY, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[:, 0] = False
    padding = torch.arange(LENGTH) >= torch.tensor([6, 3, 4])[:, None]
    options = {"memory_mask": mask, "memory_key_padding_mask": padding}
    assert_same(_results(ours, inputs, **options), _results(theirs, inputs, **options), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_are_torchs(name):
    theirs, ours = _module(nn, name).state_dict(), _module(fused, name).state_dict()
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_autocast_keeps_the_stream(norm_first):
    theirs, ours = _pair("TransformerEncoder", norm_first=norm_first, batch_first=True)
    inputs = _inputs("TransformerEncoder", batch_first=True)
    exact = theirs(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = theirs(*inputs), ours(*inputs)
    assert actual.dtype is expected.dtype
    assert (actual - exact).norm() <= 1.2 * (expected - exact).norm()


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_bfloat16(norm_first):
    # Not relu: a hidden element near 0 falls on either side by chance, and whole gradients with it.
    theirs, ours = _pair("TransformerEncoder", norm_first=norm_first, activation="gelu")
    inputs = [tensor.bfloat16() for tensor in _inputs("TransformerEncoder")]
    exact = _results(copy.deepcopy(theirs).bfloat16().double(), [tensor.double() for tensor in inputs])
    expected = _results(theirs.bfloat16(), inputs)
    for actual, other, truth in zip(_results(ours.bfloat16(), inputs), expected, exact, strict=True):
        assert actual.dtype is torch.bfloat16
        assert (actual - truth).norm() <= 1.3 * (other - truth).norm() + 0.01 * truth.norm()


def test_hooks_of_a_fused_norm_still_run():
    ours = _pair("TransformerEncoderLayer")[1]
    x = _inputs("TransformerEncoderLayer")[0]
    expected, seen = ours(x), []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: seen.append(module))
        for module in (ours.norm1, ours.dropout2)
    ]
    torch.testing.assert_close(ours(x), expected)
    assert seen == [ours.norm1, ours.dropout2]
    for handle in handles:
        handle.remove()


def test_dropout_follows_the_seed_and_keeps_the_mean():
    layer = fused.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.3, norm_first=True)
    x = normal(LENGTH, BATCH, WIDTH)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(layer(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    samples = torch.stack([layer(x) for _ in range(400)])
    expected = layer.eval()(x)
    assert (samples.mean(0) - expected).abs().mean() < 0.1


def test_without_masks_the_hint_is_the_mask():
    ours = _pair("TransformerEncoder")[1]
    x, causal = _inputs("TransformerEncoder")[0], torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    assert_same(_results(ours, [x], is_causal=True), _results(ours, [x], mask=causal, is_causal=False))


def test_nested_tensors_go_to_torch():
    theirs, ours = _pair("TransformerEncoderLayer", batch_first=True)
    x = torch.nested.nested_tensor([normal(3, WIDTH), normal(5, WIDTH)])
    with torch.no_grad():
        expected, actual = theirs.eval()(x), ours.eval()(x)
    assert_same(actual.unbind(), expected.unbind())


@pytest.mark.parametrize("kind", ["bool", "float", "gaps", "all of one"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"norm_first": True}, {"activation": _softsign}],
    ids=["plain", "no bias", "norm first", "softsign"],
)
def test_padding_in_inference_is_what_torch_makes_of_it(options, kind):
    """Zeros where torch takes nested tensors, numbers where it does not, the last norm of either."""
    torch.manual_seed(0)
    modules = []
    for library in (nn, fused):
        layer = library.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.1, batch_first=True, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of nested tensors, from torch's constructor
            modules.append(library.TransformerEncoder(layer, 2, library.LayerNorm(WIDTH)).eval())
    theirs, ours = modules
    ours.load_state_dict(theirs.state_dict())
    padding = torch.arange(LENGTH) >= torch.tensor([6, 3, 4])[:, None]
    if kind == "gaps":
        padding[1, 1] = True
    if kind == "all of one" and not options:  # torch gives NaN without nested tensors
        padding[1] = True
    if kind == "float":
        padding = torch.zeros(BATCH, LENGTH).masked_fill(padding, -torch.inf)
    x = normal(BATCH, LENGTH, WIDTH)
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            if kind == "all of one" and not options and torch.is_grad_enabled():
                continue
            torch.testing.assert_close(
                ours(x, src_key_padding_mask=padding), theirs(x, src_key_padding_mask=padding), rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
def test_caches_decode_what_the_whole_sequence_gives(name):
    options = {"batch_first": True, "num_kv_heads": 2, "rotary": fused.RotaryEmbedding(4), "norm_first": True}
    ours = _module(fused, name, **options)
    x, *memory = _inputs(name, batch_first=True)
    hint = {"is_causal" if name == "TransformerEncoder" else "tgt_is_causal": True}
    expected = ours(x, *memory, **hint)
    caches = ours.make_caches(BATCH, LENGTH)
    with torch.no_grad():
        parts = [ours(x[:, :2], *memory, caches=caches)]
        parts += [ours(x[:, i : i + 1], *memory, caches=caches) for i in range(2, LENGTH)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)


def test_window_and_kv_heads_reach_the_attention():
    rotary = fused.RotaryEmbedding(4)
    model = fused.Transformer(WIDTH, HEADS, 1, 1, HIDDEN, num_kv_heads=2, window=(1, 0), rotary=rotary)
    for layer in (model.encoder.layers[0], model.decoder.layers[0]):
        assert layer.self_attn.window == (1, 0) and layer.self_attn.num_kv_heads == 2
        assert layer.self_attn.rotary.dim == 4
    cross = model.decoder.layers[0].multihead_attn
    assert (cross.window, cross.rotary, cross.num_kv_heads) == (None, None, 2)
    x = normal(LENGTH, BATCH, WIDTH).requires_grad_()
    layer = model.encoder.layers[0].eval()
    assert (torch.autograd.grad(layer(x)[3].sum(), x)[0].abs().sum((1, 2)) > 0).tolist() == [False, False, True, True,
                                                                                           False, False]  # fmt: skip


@pytest.mark.parametrize("batch_first", [False, True])
def test_lsh_attention_takes_the_place_of_exact_attention(batch_first):
    lsh = {"n_hashes": 2, "chunk_length": 64, "is_causal": True}
    layer = fused.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, batch_first=batch_first, norm_first=True, lsh=lsh)
    x = _inputs("TransformerEncoderLayer", batch_first)[0]
    padding = torch.arange(LENGTH) >= torch.tensor([6, 3, 4])[:, None]
    output = layer(x, src_key_padding_mask=padding, is_causal=True)
    stream = x if batch_first else x.transpose(0, 1)
    stream = stream + layer.self_attn(layer.norm1(stream), padding)
    stream = stream + layer._feed_forward(layer.norm2(stream))
    torch.testing.assert_close(output, stream if batch_first else stream.transpose(0, 1))
    one = (x if batch_first else x.transpose(0, 1))[0]
    torch.testing.assert_close(layer(one), (output if batch_first else output.transpose(0, 1))[0])


def test_reversible_encoder_trains_with_the_gradients_of_its_function():
    layer = fused.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, norm_first=True)
    encoder = fused.TransformerEncoder(layer, 3, fused.LayerNorm(WIDTH), reversible=True)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    plain = fused.TransformerEncoder(layer, 3, fused.LayerNorm(WIDTH), enable_nested_tensor=False)
    assert plain.load_state_dict(encoder.state_dict())
    x, padding = normal(LENGTH, BATCH, WIDTH), torch.arange(LENGTH) >= torch.tensor([6, 3, 4])[:, None]

    class Streams(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = plain

        def forward(self, x):
            y1 = y2 = x
            for layer in self.encoder.layers:
                y1 = y1 + layer._attend_self(layer.norm1(y2), None, padding, True, None)
                y2 = y2 + layer._feed_forward(layer.norm2(y1))
            return self.encoder.norm((y1 + y2) / 2)

    actual = _results(encoder, [x], src_key_padding_mask=padding, is_causal=True)
    assert_same(actual, _results(Streams(), [x]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
def test_compiles_without_a_break(name):
    ours = _module(fused, name, batch_first=True, norm_first=True)
    inputs = _inputs(name, batch_first=True)
    hint = {"is_causal" if name == "TransformerEncoder" else "tgt_is_causal": True}
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, **hint), ours(*inputs, **hint))


def test_float_masks_of_an_unknown_pattern_are_not_causal():
    ours = _pair("TransformerEncoder")[1]
    x = _inputs("TransformerEncoder")[0]
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    mask[3, 1] = 0.5
    theirs = _pair("TransformerEncoder")[0]
    assert_same([ours(x, mask)], [theirs(x, mask)], rtol=1e-3, atol=1e-4)


def test_serves_with_fused_kernels():
    layer = fused.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0)
    rows = fusewright.explain(layer, normal(LENGTH, BATCH, WIDTH))
    assert {row.op for row in rows if row.serves} >= {"attention", "norm"}


def test_bad_arguments():
    with pytest.raises(RuntimeError, match="activation should be relu/gelu, not tanh"):
        fused.TransformerEncoderLayer(WIDTH, HEADS, activation="tanh")
    with pytest.raises(ArgumentValueError, match="window is 3"):
        fused.TransformerEncoderLayer(WIDTH, HEADS, window=3, lsh={})
    with pytest.raises(ArgumentTypeError, match="norm_first=True"):
        fused.TransformerEncoder(fused.TransformerEncoderLayer(WIDTH, HEADS), 2, reversible=True)
    hashing = fused.TransformerEncoderLayer(WIDTH, HEADS, lsh={"is_causal": False})
    x = normal(LENGTH, BATCH, WIDTH)
    with pytest.raises(ArgumentValueError, match="is_causal is True"):
        hashing(x, is_causal=True)
    with pytest.raises(ArgumentValueError, match="attn_mask is given"):
        hashing(x, torch.zeros(LENGTH, LENGTH))
    with pytest.raises(ArgumentTypeError, match="self_attn is a LSHSelfAttention"):
        fused.TransformerEncoder(hashing, 1).make_caches(1, 4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        _module(fused, "TransformerEncoder").load_state_dict(
            fused.TransformerEncoder(fused.TransformerEncoderLayer(8, 2, HIDDEN), 2, fused.LayerNorm(8)).state_dict()
        )
