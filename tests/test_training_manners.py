"""A GPT of ours under what training does to models: checkpointing, export, compilation, autocast, torch.func."""

import copy

import pytest
import torch
from enable_support import assert_same
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fusewright import models

TOKENS = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
OPTIONS = {"learned": {}, "rotary": {"rotary": True, "num_kv_heads": 1, "window": 5}}


def _gpt(dropout=0.0, **options):
    torch.manual_seed(0)
    model = models.GPT(20, 32, 16, 2, 2, dropout=dropout, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def _gradients(model, run=None):
    run = model if run is None else run
    loss = nn.functional.cross_entropy(run(TOKENS).flatten(0, 1), TOKENS.roll(-1, 1).flatten())
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


class Checkpointed(nn.Module):
    """A layer whose activations are not kept."""

    def __init__(self, layer, **options):
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, hidden, **options):
        return checkpoint(self.layer, hidden, use_reentrant=False, **self.options, **options)


def _policy(context, op, *args, **kwargs):
    saved = (torch.ops.fusewright.attention_forward.default, torch.ops.fusewright.add_norm_forward.default)
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("selective", [False, True], ids=["plain", "selective"])
def test_activation_checkpointing(selective, dropout):
    model = _gpt(dropout)
    torch.manual_seed(1)
    expected = _gradients(model)
    options = {"context_fn": lambda: create_selective_checkpoint_contexts(_policy)} if selective else {}
    layers = model.blocks.layers
    model.blocks.layers = nn.ModuleList(Checkpointed(layer, **options) for layer in layers)
    torch.manual_seed(1)
    assert_same(_gradients(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_export(options):
    model = _gpt(**OPTIONS[options]).eval()
    batch, length = torch.export.Dim("batch", min=2, max=16), torch.export.Dim("length", min=2, max=32)
    program = torch.export.export(model, (TOKENS,), dynamic_shapes={"tokens": {0: batch, 1: length}})
    for tokens in (TOKENS, TOKENS.repeat(2, 2)[:3]):
        torch.testing.assert_close(program.module()(tokens), model(tokens))


@pytest.mark.parametrize("options", OPTIONS)
def test_compiles_whole(options):
    model = _gpt(**OPTIONS[options])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(_gradients(model, compiled), _gradients(model))


def test_autocast_and_gradient_scaling():
    """Two steps in mixed precision, one of them skipped for an infinite gradient, as the same steps in float32."""
    model, reference = _gpt(), _gpt()
    optimizers = [torch.optim.SGD(module.parameters(), 0.01) for module in (model, reference)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())
        scaler.scale(loss).backward()
        if step == 1:
            model.tokens.weight.grad[0, 0] = torch.inf
        before = copy.deepcopy(model.state_dict())
        scaler.step(optimizers[0])
        scaler.update()
        assert (step == 1) == all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        optimizers[0].zero_grad()
        if step != 1:
            exact = nn.functional.cross_entropy(reference(TOKENS).flatten(0, 1), TOKENS.flatten())
            assert loss.item() == pytest.approx(exact.item(), rel=0.02)
            exact.backward()
            optimizers[1].step()
            optimizers[1].zero_grad()
    assert scaler.get_scale() == 2.0**9
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()


def test_gradients_of_single_samples_by_torch_func():
    model = _gpt(rotary=True)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, tokens):
        logits = torch.func.functional_call(model, parameters, (tokens[None],))
        return nn.functional.cross_entropy(logits[0], tokens.roll(-1))

    single = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, TOKENS)
    mean = torch.autograd.grad(
        nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.roll(-1, 1).flatten()),
        list(model.parameters()),
    )
    assert_same([gradient.mean(0) for gradient in single.values()], mean, rtol=1e-3, atol=1e-4)


def test_state_of_training_is_saved_and_loaded(tmp_path):
    """Two steps at once, or one, a file and one more."""
    finals = []
    for interrupted in (False, True):
        model = _gpt()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for step in range(2):
            if interrupted and step == 1:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
                state = torch.load(tmp_path / "state")
                model = models.GPT(20, 32, 16, 2, 2, dropout=0.0)
                model.load_state_dict(state["model"])
                optimizer = torch.optim.AdamW(model.parameters(), 0.01)
                optimizer.load_state_dict(state["optimizer"])
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
            optimizer.step()
        finals.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*finals, strict=True))
