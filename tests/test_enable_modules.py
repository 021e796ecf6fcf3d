"""torch's own modules on our kernels, unchanged: same results in training and inference."""

import pytest
import torch
from enable_support import assert_same, everything_is_given_back, normal, served_by_ours
from torch import nn

import fusewright

pytestmark = pytest.mark.usefixtures(everything_is_given_back.__name__)


def _modules(batch_first, dropout=0.0):
    torch.manual_seed(0)
    options = {"dropout": dropout, "batch_first": batch_first}
    encoder = nn.TransformerEncoderLayer(16, 4, 24, **options)
    decoder = nn.TransformerDecoderLayer(16, 4, 24, norm_first=True, **options)
    return {
        "attention": nn.MultiheadAttention(16, 4, **options),
        "encoder layer": encoder,
        "encoder": nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False),
        "decoder layer": decoder,
        "decoder": nn.TransformerDecoder(decoder, 2),
        "transformer": nn.Transformer(16, 4, 1, 1, 24, **options),
    }


def _call(name, batch_first):
    """Inputs and masks of the module ``name``."""
    size = (3, 6, 16) if batch_first else (6, 3, 16)
    x, memory = normal(*size), normal(*size, seed=1)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    padding = torch.arange(6) >= torch.tensor([6, 4, 3])[:, None]
    float_padding = torch.zeros(3, 6).masked_fill(padding, -torch.inf)
    return {
        "attention": [((x, x, x), {"key_padding_mask": padding}), ((x, memory, memory), {"attn_mask": causal}),
                      ((x, x, x), {"need_weights": False, "attn_mask": causal, "is_causal": True}),
                      ((x, x, x), {"average_attn_weights": False})],
        "encoder layer": [((x,), {}), ((x, causal), {"is_causal": True}), ((x,), {"src_key_padding_mask": padding})],
        "encoder": [((x,), {}), ((x,), {"mask": causal, "src_key_padding_mask": float_padding})],
        "decoder layer": [((x, memory), {"tgt_mask": causal, "memory_key_padding_mask": padding})],
        "decoder": [((x, memory), {"tgt_mask": causal, "tgt_is_causal": True, "tgt_key_padding_mask": float_padding})],
        "transformer": [((x, memory), {"tgt_mask": causal, "src_key_padding_mask": padding,
                                          "memory_key_padding_mask": padding})],
    }[name]  # fmt: skip


def _outputs(module, arguments, options):
    """Every output, and the gradients of the parameters where the module is in training."""
    leaf = arguments[0]
    if module.training:
        leaf = leaf.clone().requires_grad_()
    inputs = [leaf if argument is arguments[0] else argument for argument in arguments]
    with torch.set_grad_enabled(module.training):
        results = module(*inputs, **options)
    results = [result for result in (results if isinstance(results, tuple) else (results,)) if result is not None]
    if not module.training:
        return results
    loss = sum((result * normal(*result.shape, seed=4)).sum() for result in results)
    return [result.detach() for result in results] + list(torch.autograd.grad(loss, [leaf, *module.parameters()]))


@pytest.mark.parametrize("batch_first", [False, True], ids=["sequence first", "batch first"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["attention", "encoder layer", "encoder", "decoder layer", "decoder", "transformer"])
def test_modules_run_unchanged(name, training, batch_first):
    module = _modules(batch_first)[name].train(training)
    for arguments, options in _call(name, batch_first):
        expected = _outputs(module, arguments, options)
        with fusewright.enabled():
            actual = _outputs(module, arguments, options)
            with torch.no_grad():
                assert served_by_ours(module, *arguments, **options)
        assert_same(actual, expected)
        if name == "attention":
            assert actual[0].is_contiguous() or batch_first


def test_padded_positions_of_a_nested_encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.arange(6) >= torch.tensor([6, 4, 3])[:, None]
    x = normal(3, 6, 16)
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        with fusewright.enabled():
            actual = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(actual[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


def test_modules_with_dropout_train():
    module = _modules(True, dropout=0.2)["encoder layer"].train()
    with fusewright.enabled():
        outputs = [module(normal(2, 6, 16)) for _ in range(2)]
    assert not torch.equal(*outputs)


def test_module_in_bfloat16_and_autocast():
    module = _modules(True)["encoder layer"].eval()
    x = normal(3, 6, 16)
    expected = module(x)
    with fusewright.enabled():
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(module(x).float(), expected, rtol=0.05, atol=0.05)
        torch.testing.assert_close(module.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.08)


def test_float64_modules_are_torchs():
    module = _modules(False)["attention"].double()
    arguments = [normal(6, 3, 16).double()] * 3
    expected = module(*arguments)
    with fusewright.enabled():
        actual = module(*arguments)
        assert not served_by_ours(module, *arguments)
    assert all(torch.equal(left, right) for left, right in zip(actual, expected, strict=True))


def test_module_errors_are_torchs():
    module = _modules(False)["attention"]
    x = normal(6, 3, 16)
    for arguments, options in (
        ((x, x, x[:5]), {}),
        ((x, x, x), {"attn_mask": torch.zeros(2, 2)}),
        ((x, x, x), {"is_causal": True}),
        ((x[..., :7], x, x), {}),
        ((x, x, x), {"key_padding_mask": torch.zeros(3, 7)}),
    ):
        with pytest.raises(Exception) as expected:
            module(*arguments, **options)
        with fusewright.enabled(), pytest.raises(type(expected.value)) as actual:
            module(*arguments, **options)
        assert str(actual.value) == str(expected.value)


def test_extra_keys_behind_a_causal_hint_are_torchs():
    module = nn.MultiheadAttention(16, 4, add_bias_kv=True, add_zero_attn=True)
    x, causal = normal(6, 3, 16), nn.Transformer.generate_square_subsequent_mask(6)
    call = {"attn_mask": causal, "is_causal": True, "need_weights": False}
    expected = module(x, x, x, **call)[0]
    with fusewright.enabled():
        torch.testing.assert_close(module(x, x, x, **call)[0], expected)


def test_compiled_modules_follow():
    layer = _modules(True)["encoder layer"].eval()
    x = normal(3, 6, 16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected = compiled(x)
    with fusewright.enabled():
        torch.testing.assert_close(compiled(x), expected)
        assert served_by_ours(torch.compile(layer, backend="eager"), x)
    torch.testing.assert_close(compiled(x), expected)
