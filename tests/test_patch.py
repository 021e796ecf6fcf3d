"""``patch`` and ``unpatch``: same objects, parameters, hooks and results, on our kernels."""

import copy
import io
import warnings

import pytest
import torch
from enable_support import assert_same, normal, served_by_ours
from torch import nn

import fusewright
from fusewright import nn as fused
from fusewright_kernels.checks import ArgumentTypeError


class Everything(nn.Module):
    """One of each kind that is swapped, two names for one module and one parameter in two places."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16))
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 24, 0.0, batch_first=True), 1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True)
        self.norm = self.same_norm = nn.RMSNorm(16)
        self.lstm, self.gru, self.rnn = nn.LSTM(16, 8, 2, bidirectional=True), nn.GRU(16, 16), nn.RNN(16, 16)
        self.cells = nn.ModuleList([nn.LSTMCell(16, 16), nn.GRUCell(16, 16), nn.RNNCell(16, 16)])
        self.head = nn.Linear(16, 11)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        padding = torch.arange(tokens.shape[1]) >= torch.tensor([tokens.shape[1], tokens.shape[1] - 2])[:, None]
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        memory = self.encoder(x, src_key_padding_mask=padding)
        x = self.decoder(x, memory, tgt_mask=causal, memory_key_padding_mask=padding)
        x = self.norm(x + self.attention(x, x, x)[0])
        x = self.rnn(self.gru(self.lstm(x)[0])[0])[0]
        h, _ = self.cells[0](x[:, 0])
        return self.head(x + self.cells[2](self.cells[1](h))[:, None])


SWAPPED = {
    "encoder", "encoder.layers.0", "encoder.layers.1", "encoder.norm", "decoder.layers.0", "attention", "norm", "lstm",
    "gru", "rnn", "cells.0", "cells.1", "cells.2",
} | {f"encoder.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn", "norm1", "norm2")} | {
    f"decoder.layers.0.{name}" for name in ("self_attn", "multihead_attn", "norm1", "norm2", "norm3")
}  # fmt: skip
TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])


def _model():
    torch.manual_seed(0)
    model = Everything()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def _results(model, *inputs, **options):
    output = model(*inputs, **options)
    output = output if isinstance(output, torch.Tensor) else output[0]
    loss = (output.float() * normal(*output.shape, seed=8)).sum()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output.detach(), *torch.autograd.grad(loss, parameters)]


def test_same_results_and_gradients():
    model = _model()
    expected = _results(model, TOKENS)
    report = fusewright.patch(model)
    assert {entry.name for entry in report.swapped} == SWAPPED and report.kept == []
    assert served_by_ours(model, TOKENS)
    assert_same(_results(model, TOKENS), expected, rtol=1e-3, atol=1e-4)


def test_same_results_in_inference():
    """Where torch's encoder takes its fast path, with nested tensors."""
    model = _model().eval()
    with torch.no_grad():
        expected = (
            model(TOKENS),
            model.encoder(
                model.embedding(TOKENS),
                src_key_padding_mask=torch.tensor([[False] * 5, [False, False, True, True, True]]),
            ),
        )
        fusewright.patch(model)
        actual = (
            model(TOKENS),
            model.encoder(
                model.embedding(TOKENS),
                src_key_padding_mask=torch.tensor([[False] * 5, [False, False, True, True, True]]),
            ),
        )
    assert_same(actual, expected, rtol=1e-3, atol=1e-4)


def test_nothing_but_the_class_changes():
    model = _model().eval()
    model.norm.train()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    states, classes = model.state_dict(), {name: type(module) for name, module in modules.items()}
    attributes = {name: set(module.__dict__) for name, module in modules.items()}
    seen = []
    model.norm.register_forward_hook(lambda *arguments: seen.append("norm"))
    model.lstm.register_forward_pre_hook(lambda *arguments: seen.append("lstm"))
    fusewright.patch(model)
    for name, module in model.named_modules():
        assert module is modules[name]
        assert isinstance(module, nn.RNNBase if name in ("lstm", "gru", "rnn") else classes[name])
        assert (type(module) is classes[name]) == (name not in SWAPPED)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.head.weight is model.embedding.weight and model.same_norm is model.norm
    assert model.norm.training and not model.lstm.training
    assert list(model.state_dict()) == list(states)
    model(TOKENS)
    assert seen == ["norm", "lstm"]
    assert set(fusewright.unpatch(model)) == SWAPPED
    for name, module in model.named_modules():
        assert module is modules[name] and type(module) is classes[name] and set(module.__dict__) == attributes[name]
    assert fusewright.unpatch(model) == []


def test_what_happens_in_between_stays():
    model = _model()
    fusewright.patch(model)
    model.bfloat16().eval()
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
    fusewright.unpatch(model)
    assert model.norm.weight.dtype is torch.bfloat16 and (model.norm.weight == 2.0).all()
    assert not any(module.training for module in model.modules())


def test_twice_is_once():
    model = _model()
    fusewright.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fusewright.patch(model).swapped == []
    fusewright.unpatch(model)
    assert type(model.norm) is nn.RMSNorm


def test_copies_and_saved_models_are_patched():
    model = _model()
    expected = model(TOKENS)
    fusewright.patch(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other.norm) is fused.RMSNorm and other.norm.weight is not model.norm.weight
        torch.testing.assert_close(other(TOKENS), expected, rtol=1e-3, atol=1e-4)
        fusewright.unpatch(other)
        assert type(other.lstm) is nn.LSTM and type(model.lstm) is fused.LSTM
        torch.testing.assert_close(other(TOKENS), expected)


def test_a_model_that_is_itself_swapped():
    norm = nn.LayerNorm(8, elementwise_affine=False)
    assert [entry.name for entry in fusewright.patch(norm).swapped] == [""]
    assert type(norm) is fused.LayerNorm


def test_nothing_to_swap_is_said():
    with pytest.warns(UserWarning, match=r"patch\(Linear\): nothing to swap"):
        report = fusewright.patch(nn.Linear(3, 3))
    assert str(report) == "nothing to swap" and not report.swapped and not report.kept


def test_what_ours_cannot_take_is_kept_and_named():
    class Own(nn.LayerNorm):
        def forward(self, input):
            return super().forward(input) + 1.0

    replaced = nn.RMSNorm(8)
    replaced.forward = lambda x: x
    odd = nn.TransformerEncoderLayer(8, 2, 8)
    odd.self_attn = Own(8)
    model = nn.ModuleDict(
        {
            "own": Own(8), "wide": nn.GRU(4, 4).double(),
            "replaced": replaced, "odd": odd, "scripted": torch.jit.script(nn.LayerNorm(8)), "fine": nn.LayerNorm(8),
        }
    )  # fmt: skip
    report = fusewright.patch(model)
    reasons = {entry.name: entry.outcome for entry in report.kept}
    assert reasons == {
        "own": "a subclass of LayerNorm, whose forward may differ",
        "wide": "float64, for which there is no fused kernel",
        "replaced": "its forward is replaced on the instance",
        "odd": "its self_attn is a Own",
        "odd.self_attn": "a subclass of LayerNorm, whose forward may differ",
        "scripted": "compiled by TorchScript",
    }
    assert {entry.name for entry in report.swapped} == {"fine", "odd.norm1", "odd.norm2"}
    assert "fine" in str(report) and "kept: float64" in str(report)


def test_a_module_in_two_models_is_one():
    norm = nn.LayerNorm(8)
    first, second = nn.Sequential(norm), nn.Sequential(norm)
    fusewright.patch(first)
    assert type(second[0]) is fused.LayerNorm
    fusewright.unpatch(second)
    assert type(first[0]) is nn.LayerNorm


def test_compiled_models_follow():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = normal(4, 8)
    expected = compiled(x)
    fusewright.patch(compiled)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    assert served_by_ours(torch.compile(model, backend="eager"), x)


def test_training_under_patch_is_training():
    """Three steps of an optimizer that was made before the model was patched."""
    losses = []
    for patched in (False, True):
        model = _model()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        if patched:
            fusewright.patch(model)
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-3)


class LlamaRMSNorm(nn.Module):
    """As transformers writes it."""

    def __init__(self, width, eps=1e-5, offset=0.0, power=2):
        super().__init__()
        self.weight = nn.Parameter(normal(width, seed=4))
        self.variance_epsilon, self.offset, self.power = eps, offset, power

    def forward(self, hidden_states):
        variance = hidden_states.float().pow(self.power).mean(-1, keepdim=True)
        normalized = hidden_states.float() * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight + self.offset) * normalized.to(hidden_states.dtype)


class RaisingRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        raise NotImplementedError("on a GPU only")


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate):
        return super().forward(hidden_states) * gate


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_llama_style_norms(offset):
    model = nn.Sequential(LlamaRMSNorm(24, offset=offset))
    x = normal(5, 24) * torch.tensor([[1.0], [1e-3], [1e3], [0.0], [1.0]])
    expected, narrow = _results(model, x), model(x.bfloat16())
    report = fusewright.patch(model)
    assert report.swapped[0].outcome == "fusewright.integrations.swaps.LlamaStyleRMSNorm"
    assert served_by_ours(model, x)
    assert_same(_results(model, x), expected)
    # Another dtype than the weight's is the original's affair.
    assert torch.equal(model(x.bfloat16()), narrow)
    fusewright.unpatch(model)
    assert type(model[0]) is LlamaRMSNorm


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (LlamaRMSNorm(24, offset=0.5), "another function"),
        (LlamaRMSNorm(24, power=4), "another function"),
        (GatedRMSNorm(24), "more than the tensor"),
        (LlamaRMSNorm(24, eps=1), "one weight and one epsilon"),
        (LlamaRMSNorm(24).double(), "float64"),
        (RaisingRMSNorm(24), "raises NotImplementedError for float32 rows on the CPU: on a GPU only"),
    ],
)
def test_other_norms_are_kept(norm, reason):
    with pytest.warns(UserWarning, match="nothing swapped, 1 kept"):
        report = fusewright.patch(nn.Sequential(norm))
    assert reason in report.kept[0].outcome


def test_norms_on_the_meta_device():
    model = nn.Sequential(LlamaRMSNorm(24).to("meta"))
    with torch.device("meta"):
        assert len(fusewright.patch(model).swapped) == 1
    assert model[0].weight.is_meta


def test_bad_model():
    with pytest.raises(ArgumentTypeError, match="model is a dict"):
        fusewright.patch({})


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses(reduction):
    options = {"weight": normal(7, seed=2).abs(), "ignore_index": 3, "label_smoothing": 0.1, "reduction": reduction}
    theirs, ours = nn.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    assert fusewright.patch(ours).swapped[0].outcome == "fusewright.nn.loss.CrossEntropyLoss"
    for logits, target in (
        (normal(5, 7), torch.tensor([0, 3, 6, 1, 3])),
        (normal(2, 7, 4), torch.tensor([[0, 3, 6, 1], [2, 2, 3, 5]])),
        (normal(5, 7), normal(5, 7, seed=1).softmax(-1)),
    ):
        if target.is_floating_point():
            theirs.ignore_index = ours.ignore_index = -100
        results = []
        for loss in (ours, theirs):
            leaf = logits.clone().requires_grad_()
            value = loss(leaf, target)
            results.append([value.detach(), *torch.autograd.grad(value.sum(), leaf)])
        assert_same(*results)
