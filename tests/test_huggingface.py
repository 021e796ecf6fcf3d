"""Models of transformers, small and random, before and after ``attn_implementation="fusewright"`` and ``patch``."""

import importlib
import sys

import pytest
import torch
import transformers
from enable_support import normal, served_by_ours
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import fusewright
from fusewright.integrations.huggingface import attention_forward
from fusewright.integrations.import_hooks import when_imported
from fusewright_kernels.checks import ArgumentValueError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 1, 1, 1]])
RIGHT_PADDED = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
LEFT_PADDED = RIGHT_PADDED.flip(1)

CAUSAL = {
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "mistral": lambda: transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=3),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=3),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=3
    ),
}


def _with_weights(model):
    """Weights large enough for every part to matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def _results(model, kept, **inputs):
    """Outputs at the positions ``kept`` and the gradients of all parameters that have one."""
    output = model(**inputs)
    output = output.logits if "logits" in output else output.last_hidden_state
    output = output if kept is None else output[kept]
    loss = (output * normal(*output.shape, seed=8)).sum()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {"output": output.detach(), **dict(zip(parameters, gradients, strict=True))}


def _assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None
            continue
        # Some gradients, as a key bias's, are 0 but for rounding.
        atol = max(2e-5 * value.abs().max().item(), 1e-6)
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def _check(model, kept, **inputs):
    """``model`` with eager attention, then with ours, then patched too: the same outputs and gradients."""
    _with_weights(model)
    expected = _results(model, kept, **inputs)
    model.set_attn_implementation("fusewright")
    assert served_by_ours(lambda _: model(**inputs), None)
    _assert_same(_results(model, kept, **inputs), expected)
    report = fusewright.patch(model)
    assert report.swapped and not report.kept
    _assert_same(_results(model, kept, **inputs), expected)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models(name, padding):
    model = transformers.AutoModelForCausalLM.from_config(CAUSAL[name](), attn_implementation="eager")
    mask = {"none": None, "right": RIGHT_PADDED, "left": LEFT_PADDED}[padding]
    _check(model, None if mask is None else mask.bool(), input_ids=TOKENS, attention_mask=mask)


@pytest.mark.parametrize("padding", ["none", "right"])
def test_bert(padding):
    model = transformers.BertForMaskedLM._from_config(
        transformers.BertConfig(**SMALL, **NO_DROPOUT, max_position_embeddings=16), attn_implementation="eager"
    )
    mask = None if padding == "none" else RIGHT_PADDED
    _check(model, None if mask is None else mask.bool(), input_ids=TOKENS, attention_mask=mask)


@pytest.mark.parametrize("padding", ["none", "right"])
def test_t5(padding):
    model = transformers.T5ForConditionalGeneration._from_config(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50, dropout_rate=0.0),
        attn_implementation="eager",
    )
    masks = {} if padding == "none" else {"attention_mask": RIGHT_PADDED, "decoder_attention_mask": RIGHT_PADDED}
    kept = RIGHT_PADDED.bool() if masks else None
    _check(model, kept, input_ids=TOKENS, decoder_input_ids=TOKENS.flip(0), **masks)


def test_vit():
    config = transformers.ViTConfig(
        **{k: v for k, v in SMALL.items() if k != "vocab_size"}, **NO_DROPOUT, image_size=8, patch_size=2, num_labels=3
    )
    model = transformers.ViTForImageClassification._from_config(config, attn_implementation="eager")
    _check(model, None, pixel_values=normal(2, 3, 8, 8))


def test_reformer():
    """It has attention of its own; ``patch`` takes its normalisations."""
    config = transformers.ReformerConfig(
        attn_layers=["local", "lsh"], hidden_size=32, num_attention_heads=2, attention_head_size=16, vocab_size=50,
        feed_forward_size=48, axial_pos_shape=[4, 8], axial_pos_embds_dim=[16, 16], lsh_attn_chunk_length=8,
        local_attn_chunk_length=8, num_buckets=4, num_hashes=2, is_decoder=True, hash_seed=0, hidden_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0, max_position_embeddings=32,
    )  # fmt: skip
    model = _with_weights(transformers.ReformerModelWithLMHead(config))
    inputs = {"input_ids": TOKENS.repeat(1, 5)[:, :32], "attention_mask": torch.ones(2, 32, dtype=torch.int64)}
    expected = _results(model, None, **inputs)
    assert len(fusewright.patch(model).swapped) == 5
    _assert_same(_results(model, None, **inputs), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_generation_with_a_cache(name):
    model = transformers.AutoModelForCausalLM.from_config(CAUSAL[name](), attn_implementation="eager")
    _with_weights(model).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(TOKENS, attention_mask=LEFT_PADDED, **options)
    fusewright.patch(model)
    model.set_attn_implementation("fusewright")
    assert torch.equal(model.generate(TOKENS, attention_mask=LEFT_PADDED, **options), expected)


def test_bfloat16_is_no_worse():
    model = _with_weights(transformers.AutoModelForCausalLM.from_config(CAUSAL["llama"](), attn_implementation="eager"))
    inputs = {"input_ids": TOKENS, "attention_mask": RIGHT_PADDED}
    model.bfloat16().double()
    exact = model(**inputs).logits[RIGHT_PADDED.bool()]
    model.bfloat16()
    errors = []
    for implementation in ("eager", "fusewright"):
        model.set_attn_implementation(implementation)
        if implementation == "fusewright":
            fusewright.patch(model)
        errors.append((model(**inputs).logits[RIGHT_PADDED.bool()] - exact).norm())
    assert errors[1] <= 1.2 * errors[0]


def test_compiles_without_a_break():
    model = transformers.AutoModelForCausalLM.from_config(CAUSAL["llama"](), attn_implementation="fusewright")
    fusewright.patch(_with_weights(model))
    expected = model(TOKENS, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keys", [5, 9])
def test_interface_is_that_of_sdpa(mask, is_causal, bias, keys):
    query, key, value = normal(2, 4, 5, 8), normal(2, 4, keys, 8, seed=1), normal(2, 4, keys, 8, seed=2)
    masks = {"bool": normal(2, 1, 5, keys, seed=3) > -0.5, "float": normal(2, 1, 5, keys, seed=3), None: None}
    options = {"scaling": 0.3, "is_causal": is_causal, "position_bias": normal(1, 4, 5, keys, seed=4) if bias else None}
    arguments = (torch.nn.Module(), query, key, value, masks[mask])
    expected, actual = sdpa_attention_forward(*arguments, **options)[0], attention_forward(*arguments, **options)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_what_the_interface_does_not_do():
    tensors = [normal(1, 2, 3, 8)] * 3
    with pytest.raises(ArgumentValueError, match="cache is a dict"):
        attention_forward(torch.nn.Module(), *tensors, None, cache={})
    with pytest.warns(UserWarning, match="no attention weights"):
        attention_forward(torch.nn.Module(), *tensors, None, output_attentions=True)


def test_registers_as_soon_as_the_registry_is_imported(tmp_path, monkeypatch):
    (tmp_path / "fusewright_test_registry.py").write_text("ready = True")
    monkeypatch.syspath_prepend(tmp_path)
    name, seen = "fusewright_test_registry", []
    finders = list(sys.meta_path)
    when_imported(name, lambda: seen.append(sys.modules[name].ready))
    assert seen == [] and sys.meta_path[1:] == finders
    module = importlib.import_module(name)
    assert seen == [True] and sys.meta_path == finders
    assert importlib.reload(module) is module and seen == [True]
    when_imported(name, lambda: seen.append("at once"))
    assert seen == [True, "at once"]
    monkeypatch.delitem(sys.modules, name)


def test_is_registered():
    assert AttentionInterface()["fusewright"] is attention_forward
    assert AttentionMaskInterface()["fusewright"] is sdpa_mask
