"""Every module that ``patch`` knows, built and called as in torch's own module tests, before and after patching."""

import sys
import types
import unittest

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

import fusewright

# torch.testing's module samples import it for a class that they do not use.
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
from torch.testing._internal.common_modules import module_db  # noqa: E402

KNOWN = (
    nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
    nn.TransformerEncoder, nn.Transformer, nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell,
    nn.CrossEntropyLoss,
)  # fmt: skip
INFOS = [info for info in module_db if info.module_cls in KNOWN]


def _leaf(value):
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_() if is_floating else value


def _tensors(tree):
    return [value for value in tree_flatten(tree)[0] if isinstance(value, torch.Tensor)]


def _results(module, call):
    """Outputs, the gradients of inputs and parameters, and the outputs where no gradient is wanted."""
    args, kwargs = tree_map(_leaf, (call.args, call.kwargs))
    outputs = _tensors(module(*args, **kwargs))
    loss = sum((output * torch.arange(1, output.numel() + 1).reshape(output.shape).sin()).sum() for output in outputs)
    leaves = [tensor for tensor in _tensors((args, kwargs)) if tensor.requires_grad]
    gradients = torch.autograd.grad(loss, [*leaves, *module.parameters()], allow_unused=True)
    with torch.no_grad():
        inference = _tensors(module(*args, **kwargs))
    return [output.detach() for output in outputs], [0 if one is None else one for one in gradients], inference


def test_all_are_found():
    assert {info.module_cls for info in INFOS} >= set(KNOWN) - {nn.TransformerEncoder}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_patched_is_the_same(info, training):
    torch.manual_seed(1)
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=training)
    compared = 0
    for sample in samples:
        torch.manual_seed(0)
        made = sample.constructor_input
        module = info.module_cls(*made.args, **made.kwargs).train(training)
        if any(part.p > 0.0 for part in module.modules() if isinstance(part, nn.Dropout)) and training:
            continue
        expected = _results(module, sample.forward_input)
        report = fusewright.patch(module)
        assert report.swapped and not report.kept
        actual = _results(module, sample.forward_input)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
        compared += 1
    assert compared > 0
