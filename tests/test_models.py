"""The models: against transformers' with the same weights, alone and padded, step by step and at once, in training."""

import copy
import io

import pytest
import torch
import transformers
from enable_support import normal
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention

from fusewright import models
from fusewright.generation import beam_search, generate
from fusewright.models.gpt import prefix_mask
from fusewright.models.rnn_encoder_decoder import KINDS, Alignment
from fusewright.nn import RelativePositionBias
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [12, 13, 14, 15, 0, 0]])
LENGTHS = torch.tensor([6, 4])
PADDING = torch.arange(6) >= LENGTHS[:, None]
SIZES = {"width": 16, "layers": 2, "heads": 2, "dropout": 0.0}


def _model(name, **options):
    torch.manual_seed(0)
    build = {
        "gpt": lambda: models.GPT(20, 32, **SIZES, **options),
        "gpt rotary window": lambda: models.GPT(20, None, **SIZES, rotary=True, num_kv_heads=1, window=3, **options),
        "gpt lsh reversible": lambda: models.GPT(20, 32, **SIZES, lsh={"chunk_length": 8}, reversible=True, **options),
        "bert": lambda: models.BERT(20, 32, **SIZES, **options),
        "encoder-decoder": lambda: models.EncoderDecoder(20, **SIZES, num_buckets=8, max_distance=10, **options),
        "vit": lambda: models.ViT(8, 4, 3, 1, **SIZES, **options),
        "reformer": lambda: models.Reformer(20, (4, 8), (8, 8), **SIZES, chunk_length=8, **options),
        "rnn": lambda: models.RNNEncoderDecoder(20, 20, 12, 16, 2, max_source=9, **options),
        "siamese": lambda: models.SiameseLSTM(20, 12, 16, **options),
        "tagger": lambda: models.LSTMTagger(20, 5, 12, 16, **options),
    }[name]
    return build()


def _loss(name, model):
    """A loss of each model on data that it can learn by heart."""
    if name == "vit":
        return model.loss(normal(4, 1, 8, 8), torch.tensor([0, 1, 2, 1]))
    if name == "siamese":
        return model.loss(TOKENS, TOKENS.flip(1), LENGTHS)
    if name == "tagger":
        return model.loss(TOKENS, TOKENS % 5, LENGTHS)
    if name == "bert":
        targets = TOKENS.clone().masked_fill(torch.arange(6) % 2 == 0, -100)
        return model.loss(TOKENS, targets, torch.tensor([0, 1]), key_padding_mask=PADDING)
    targets = TOKENS.roll(-1, 1)
    if name == "encoder-decoder":
        return model.loss(TOKENS, targets, TOKENS.flip(1), PADDING.flip(1))
    if name == "rnn":
        return model.loss(TOKENS, targets, TOKENS, LENGTHS)
    return model.loss(TOKENS, targets)


NAMES = (
    "gpt",
    "gpt rotary window",
    "gpt lsh reversible",
    "bert",
    "encoder-decoder",
    "vit",
    "reformer",
    "rnn",
    "siamese",
    "tagger",
)


@pytest.mark.parametrize("name", NAMES)
def test_trains(name):
    model = _model(name)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = _loss(name, model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_is_saved_and_loaded(name):
    model, file = _model(name), io.BytesIO()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = _model(name)
    assert other.load_state_dict(torch.load(file), strict=True)
    if name not in ("reformer", "gpt lsh reversible"):  # their rotations are drawn at each call
        assert torch.equal(_loss(name, other), _loss(name, model))
    wrong = {key: value[..., :1] for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name):
    model = _model(name)
    expected, narrow = _loss(name, model), copy.deepcopy(model).bfloat16()
    if name == "vit":
        actual = narrow.loss(normal(4, 1, 8, 8).bfloat16(), torch.tensor([0, 1, 2, 1]))
    else:
        actual = _loss(name, narrow)
    assert actual.item() == pytest.approx(expected.item(), rel=0.05, abs=0.01)
    actual.backward()
    assert all(parameter.grad.isfinite().all() for parameter in narrow.parameters() if parameter.grad is not None)


def _load(ours, theirs, names):
    """Copy parameters; ``names`` gives for each of ours those of theirs to stack, and whether they are transposed."""
    state = theirs.state_dict()
    for name, (sources, transposed) in names.items():
        parts = [state[source].T if transposed else state[source] for source in sources]
        with torch.no_grad():
            ours.get_parameter(name).copy_(torch.cat(parts).reshape(ours.get_parameter(name).shape))


def _random(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def _layer_names(prefix, source, parts, transposed=False):
    """Names of one encoder layer: weights and biases of the parts that ``parts`` names."""
    names = {}
    for ours, theirs in parts.items():
        for kind in ("weight", "bias"):
            joint = "_" if ours.endswith("in_proj") else "."
            turn = transposed and kind == "weight" and "norm" not in ours
            names[f"{prefix}.{ours}{joint}{kind}"] = ([f"{source}.{one}.{kind}" for one in theirs], turn)
    return names


def test_gpt_is_transformers_gpt2():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=32, activation_function="gelu", resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    theirs, ours = _random(transformers.GPT2LMHeadModel(config)), _model("gpt")
    names = {
        "tokens.weight": (["transformer.wte.weight"], False), "positions.weight": (["transformer.wpe.weight"], False),
        "blocks.norm.weight": (["transformer.ln_f.weight"], False),
        "blocks.norm.bias": (["transformer.ln_f.bias"], False),
    }  # fmt: skip
    parts = {
        "norm1": ["ln_1"], "self_attn.in_proj": ["attn.c_attn"], "self_attn.out_proj": ["attn.c_proj"],
        "norm2": ["ln_2"], "linear1": ["mlp.c_fc"], "linear2": ["mlp.c_proj"],
    }  # fmt: skip
    for index in range(2):
        names |= _layer_names(f"blocks.layers.{index}", f"transformer.h.{index}", parts, transposed=True)
    assert set(names) == {name for name, _ in ours.named_parameters()}
    _load(ours, theirs, names)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)
    expected = theirs(TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(ours.loss(TOKENS[:, :-1], TOKENS[:, 1:]), expected, rtol=1e-4, atol=1e-5)


def test_bert_is_transformers_bert():
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=20,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs, ours = _random(transformers.BertForPreTraining(config)), _model("bert")
    embeddings = "bert.embeddings"
    names = {
        "tokens.weight": ([f"{embeddings}.word_embeddings.weight"], False),
        "positions.weight": ([f"{embeddings}.position_embeddings.weight"], False),
        "segments.weight": ([f"{embeddings}.token_type_embeddings.weight"], False),
        "token_bias": (["cls.predictions.bias"], False),
    }
    for mine, other in {
        "norm": f"{embeddings}.LayerNorm", "pooler": "bert.pooler.dense", "next_sentence": "cls.seq_relationship",
        "transform": "cls.predictions.transform.dense", "transform_norm": "cls.predictions.transform.LayerNorm",
    }.items():  # fmt: skip
        names |= {f"{mine}.{kind}": ([f"{other}.{kind}"], False) for kind in ("weight", "bias")}
    parts = {
        "self_attn.in_proj": [f"attention.self.{kind}" for kind in ("query", "key", "value")],
        "self_attn.out_proj": ["attention.output.dense"], "norm1": ["attention.output.LayerNorm"],
        "linear1": ["intermediate.dense"], "linear2": ["output.dense"], "norm2": ["output.LayerNorm"],
    }  # fmt: skip
    for index in range(2):
        names |= _layer_names(f"encoder.layers.{index}", f"bert.encoder.layer.{index}", parts)
    assert set(names) == {name for name, _ in ours.named_parameters()}
    _load(ours, theirs, names)
    segments = (torch.arange(6) > 2).long().expand(2, 6)
    expected = theirs(TOKENS, attention_mask=(~PADDING).long(), token_type_ids=segments)
    actual = ours(TOKENS, segments, PADDING)
    kept = ~PADDING
    torch.testing.assert_close(actual.token_logits[kept], expected.prediction_logits[kept], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.next_sentence_logits, expected.seq_relationship_logits, rtol=1e-4, atol=1e-4)
    targets, follows = TOKENS.masked_fill(PADDING, -100), torch.tensor([0, 1])
    loss = theirs(TOKENS, attention_mask=(~PADDING).long(), token_type_ids=segments, labels=targets,
                  next_sentence_label=follows).loss  # fmt: skip
    torch.testing.assert_close(ours.loss(TOKENS, targets, follows, segments, PADDING), loss, rtol=1e-4, atol=1e-4)


def test_vit_patches_are_those_of_a_convolution():
    model, images = _random(_model("vit")), normal(3, 1, 8, 8)
    seen = []
    model.patches.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(images)
    weight = model.patches.weight.view(16, 1, 4, 4)
    expected = nn.functional.conv2d(images, weight, model.patches.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    for size in (12, 4):
        with pytest.raises(ArgumentValueError, match=r"images.shape"):
            model(normal(1, 1, size, size))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_relative_positions_are_t5s(bidirectional):
    bias = RelativePositionBias(3, 16, 40, bidirectional)
    places = torch.arange(100)
    distance = places[None] - places[:, None]
    expected = T5Attention._relative_position_bucket(distance, bidirectional, 16, 40)
    assert torch.equal(bias.buckets(distance), expected)
    torch.testing.assert_close(bias(places, places), bias.weight[expected].permute(2, 0, 1))
    with pytest.raises(ArgumentValueError, match="num_buckets and max_distance"):
        RelativePositionBias(3, 16, 4, bidirectional)


def test_gpt_ties_its_weights_and_scales_its_branches():
    model = models.GPT(50, 32, 64, 8, 2)
    assert "tokens.weight" in model.state_dict() and not any("head" in name for name in model.state_dict())
    assert model.tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    layer = model.blocks.layers[3]
    for weight, std in (
        (layer.linear1.weight, 0.02),
        (layer.linear2.weight, 0.005),
        (layer.self_attn.out_proj.weight, 0.005),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert (layer.linear1.bias == 0).all()


def test_without_a_cache_there_is_no_generation():
    for options in ({"lsh": {}}, {"reversible": True}):
        with pytest.raises((ArgumentTypeError, ArgumentValueError), match=r"LSHSelfAttention|reversible is True"):
            generate(models.GPT(20, 32, **SIZES, **options), TOKENS, 2)


def test_prefix_sees_itself_in_both_directions():
    assert prefix_mask(torch.tensor([2, 0]), 3).int().tolist() == [
        [[0, 0, 1], [0, 0, 1], [0, 0, 0]], [[0, 1, 1], [0, 0, 1], [0, 0, 0]],
    ]  # fmt: skip
    model = _random(_model("gpt"))
    causal = model(TOKENS)
    torch.testing.assert_close(model(TOKENS, prefix_lengths=torch.tensor([1, 0])), causal, rtol=1e-4, atol=1e-4)
    changed = model(TOKENS, prefix_lengths=torch.tensor([3, 0]))
    assert not torch.allclose(changed[0, 0], causal[0, 0]) and torch.allclose(changed[1], causal[1], atol=1e-4)
    other = TOKENS.clone()
    other[0, 4] = 1
    assert torch.equal(model(other, prefix_lengths=torch.tensor([3, 0]))[0, :4], changed[0, :4])


def _alone(model, row, name):
    length = int(LENGTHS[row])
    tokens = TOKENS[row : row + 1, :length]
    if name == "encoder-decoder":
        return model(TOKENS[row : row + 1], tokens)
    return model(TOKENS[row : row + 1], tokens) if name == "rnn" else model(tokens)


@pytest.mark.parametrize("name", ["bert", "encoder-decoder", "rnn", "siamese", "tagger"])
def test_padding_changes_nothing(name):
    model = _random(_model(name)).eval()
    together = {
        "bert": lambda: model(TOKENS, key_padding_mask=PADDING).token_logits,
        "encoder-decoder": lambda: model(TOKENS, TOKENS, PADDING),
        "rnn": lambda: model(TOKENS, TOKENS, LENGTHS),
    }.get(name, lambda: model(TOKENS, LENGTHS))()
    alone = _alone(model, 1, name)
    alone = alone.token_logits if name == "bert" else alone
    actual = together[1:2] if name in ("encoder-decoder", "rnn", "siamese") else together[1:2, :4]
    torch.testing.assert_close(actual, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_alignment(kind):
    torch.manual_seed(0)
    attention = _random(Alignment(kind, 6, 9))
    query, memory, padding = normal(2, 3, 6), normal(2, 6, 6, seed=1), PADDING
    keys = memory
    if kind == "additive":
        inner = attention.additive
        scores = (inner.query_proj(query)[:, :, None] + inner.key_proj(keys)[:, None]).tanh() @ inner.score_weight[0]
    elif kind == "location":
        scores = attention.location_proj(query)[..., :6]
    elif kind == "general":
        scores = query @ attention.query_proj.weight.T @ keys.transpose(1, 2)
    else:
        scores = query @ keys.transpose(1, 2) * (6**-0.5 if kind == "scaled_dot" else 1.0)
    expected = scores.masked_fill(padding[:, None], -torch.inf).softmax(-1) @ memory
    torch.testing.assert_close(attention(query, memory, padding), expected, rtol=1e-4, atol=1e-5)


def test_bad_alignments():
    with pytest.raises(ArgumentValueError, match="kind is 'other'"):
        Alignment("other", 6)
    with pytest.raises(ArgumentValueError, match="max_source is None"):
        Alignment("location", 6)
    with pytest.raises(ArgumentValueError, match=r"memory.shape\[1\] is 5"):
        Alignment("location", 6, 4)(normal(1, 1, 6), normal(1, 5, 6))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_generation_is_the_model_without_a_state(kind):
    """Greedy and by beams, several sources and prompts of different lengths at once."""
    if kind is None:
        model = _random(_model("encoder-decoder")).eval()
        encode, given = lambda: model.encode(TOKENS, PADDING, 12), (TOKENS, PADDING)
    else:
        model = _random(_model("rnn", attention=kind)).eval()
        encode, given = lambda: model.encode(TOKENS, LENGTHS), (TOKENS, LENGTHS)
    prompt, lengths = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1])
    with torch.no_grad():
        result = generate(model, prompt, 8, prompt_lengths=lengths, state=encode())
    for row in range(2):
        tokens = prompt[row : row + 1, : lengths[row]]
        for _ in range(8):
            logits = model(tokens, *(tensor[row : row + 1] for tensor in given))
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(tokens[0, lengths[row] :], result.tokens[row])
    with torch.no_grad():
        wide = beam_search(model, prompt, 8, beams=4, prompt_lengths=lengths, state=encode())
    whole = torch.cat([prompt[0], wide.tokens[0]])[None]
    steps = model(whole, *(tensor[:1] for tensor in given))[0, 2:-1].log_softmax(-1)
    expected = steps.gather(-1, wide.tokens[0][:, None]).sum().item()
    assert wide.log_probability[0].item() == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ArgumentValueError, match="state is None"):
        generate(model, prompt, 2)
    with pytest.raises(ArgumentValueError, match="source and state is both or neither given"):
        model(prompt)


@pytest.mark.parametrize("lengths", [torch.tensor([3, 1]), torch.tensor([3, 3])], ids=["different", "alike"])
def test_a_reformer_goes_on(lengths):
    """With one chunk for all positions, where hashing decides nothing."""
    torch.manual_seed(0)
    model = _random(models.Reformer(20, (4, 8), (8, 8), **SIZES, chunk_length=32)).eval()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    state = model.make_state(2, 10)
    result = generate(model, prompt, 8, prompt_lengths=lengths, state=state)
    assert (state.caches is None) == (lengths[0] != lengths[1])
    for row in range(2):
        tokens = prompt[row : row + 1, : lengths[row]]
        for _ in range(8):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
        assert torch.equal(tokens[0, lengths[row] :], result.tokens[row])
    state = model.make_state(2, 2)
    with pytest.raises(ArgumentValueError, match="the text's length is 3"):
        model(prompt, state=state)


def test_a_reformer_s_beams_carry_their_caches():
    torch.manual_seed(0)
    model = _random(models.Reformer(20, (4, 8), (8, 8), **SIZES, chunk_length=32)).eval()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    result = beam_search(model, prompt, 8, beams=3)
    for row in range(2):
        text = torch.cat([prompt[row], result.tokens[row]])[None]
        with torch.no_grad():
            steps = model(text)[0, 2:-1].log_softmax(-1)
        expected = steps.gather(-1, result.tokens[row][:, None]).sum().item()
        assert result.log_probability[row].item() == pytest.approx(expected, rel=1e-3)


def test_hard_negative_triplet_loss():
    first, second = (nn.functional.normalize(normal(5, 4, seed=seed), dim=-1) for seed in (0, 1))
    second[0], second[1] = first[0], first[0]  # one pair that is alike, one that is less alike than another
    total = 0.0
    for i in range(5):
        positive = float(first[i] @ second[i])
        others = [float(first[i] @ second[j]) for j in range(5) if j != i]
        harder = [value for value in others if value < positive]
        total += max(0.0, 0.25 + sum(others) / 4 - positive)
        total += max(0.0, 0.25 + max(harder) - positive) if harder else 0.0
    actual = models.hard_negative_triplet_loss(first, second)
    assert actual.item() == pytest.approx(total / 5, rel=1e-4)
    with pytest.raises(ArgumentValueError, match="B > 1"):
        models.hard_negative_triplet_loss(first[:1], second[:1])
