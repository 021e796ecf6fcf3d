"""torch's own attention function on our kernels: same results, and everything given back."""

import gc

import pytest
import torch
import torch.nn.functional as F
from enable_support import TORCHS, assert_same, everything_is_given_back, gradients, normal, qkv, served_by_ours
from torch.nn.attention import SDPBackend, bias, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported_before

import fusewright
from fusewright_kernels import dispatch
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

pytestmark = pytest.mark.usefixtures(everything_is_given_back.__name__)


def boolean_mask(*size):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(7)) < 0.6
    mask[..., 0] = True
    return mask


def empty_row():
    mask = boolean_mask(8, 9)
    mask[3] = False
    return mask


CALLS = {
    "plain": (qkv(), {}),
    "odd": (qkv(queries=7), {}),
    "causal": (qkv(), {"is_causal": True}),
    "scale": (qkv(), {"scale": 0.7}),
    "grouped": (qkv(key_heads=2), {"enable_gqa": True}),
    "bool mask": (qkv(), {"attn_mask": boolean_mask(8, 9)}),
    "padding mask": (qkv(), {"attn_mask": boolean_mask(2, 1, 1, 9)}),
    "float mask": (qkv(), {"attn_mask": normal(2, 4, 8, 9)}),
    "row without a key": (qkv(), {"attn_mask": empty_row()}),
    "3-D": (qkv(4, heads=3, key_heads=3)[0:3], {}),
    "2-D": ([tensor[0, 0] for tensor in qkv()], {}),
    "5-D": (qkv(2, 3), {"attn_mask": normal(3, 1, 8, 9)}),
    "value width": (qkv(value_width=12), {}),
    "transposed": ([tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in qkv()], {"is_causal": True}),
    "strided": ([tensor.repeat_interleave(2, -1)[..., ::2] for tensor in qkv()], {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_function(name, dtype):
    tensors, options = CALLS[name]
    tensors = [tensor.to(dtype) for tensor in tensors]
    options = {key: value.to(dtype) if getattr(value, "is_floating_point", bool)() else value
               for key, value in options.items()}  # fmt: skip
    expected = gradients(F.scaled_dot_product_attention, tensors, **options)
    tolerance = {} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    with fusewright.enabled():
        assert served_by_ours(F.scaled_dot_product_attention, *tensors, **options)
        assert_same(gradients(F.scaled_dot_product_attention, tensors, **options), expected, **tolerance)
        assert_same(gradients(imported_before, tensors, **options), expected, **tolerance)


def test_a_mask_besides_is_causal_means_what_torch_makes_of_it():
    options = {"attn_mask": boolean_mask(8, 9), "is_causal": True}
    expected = gradients(F.scaled_dot_product_attention, qkv(), **options)
    with fusewright.enabled():
        assert_same(gradients(F.scaled_dot_product_attention, qkv(), **options), expected, rtol=0, atol=0)


SLOT = ("plain", "causal", "scale", "grouped", "bool mask", "padding mask", "float mask", "row without a key")


@pytest.mark.parametrize("name", SLOT)
def test_old_references_reach_the_slot(name):
    tensors, options = CALLS[name]
    with fusewright.enabled():
        assert served_by_ours(imported_before, *tensors, **options)
        backward = fusewright.explain(gradients, imported_before, tensors, **options)
    assert [row.backend for row in backward if row.serves] == ["cpu", "cpu"]


def test_mask_gets_its_gradient():
    tensors = [*qkv(), normal(1, 4, 1, 9)]
    expected = gradients(F.scaled_dot_product_attention, tensors)
    with fusewright.enabled():
        assert_same(gradients(F.scaled_dot_product_attention, tensors), expected)
        assert_same(gradients(imported_before, tensors), expected)


def test_dropout_is_reproducible_and_keeps_the_mean():
    query, key, _ = qkv()
    value = torch.ones(2, 4, 9, 8)
    with fusewright.enabled():
        assert served_by_ours(F.scaled_dot_product_attention, query, key, value, dropout_p=0.3)
        torch.manual_seed(0)
        draws = [F.scaled_dot_product_attention(query, key, value, dropout_p=0.3) for _ in range(200)]
        torch.manual_seed(0)
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, dropout_p=0.3), draws[0])
    assert abs(torch.stack(draws).mean() - 1.0) < 0.01


def test_selected_backends_are_ours_too():
    with fusewright.enabled(), sdpa_kernel(SDPBackend.MATH):
        assert served_by_ours(F.scaled_dot_product_attention)


def test_autocast():
    tensors = qkv()
    with fusewright.enabled(), torch.autocast("cpu", torch.bfloat16):
        actual = F.scaled_dot_product_attention(*tensors)
    assert actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual.float(), F.scaled_dot_product_attention(*tensors), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("reference", [imported_before, None], ids=["old reference", "attribute"])
def test_float64_is_torchs(reference):
    tensors = [tensor.double() for tensor in qkv()]
    expected = gradients(F.scaled_dot_product_attention, tensors)
    with fusewright.enabled():
        function = reference or F.scaled_dot_product_attention
        assert_same(gradients(function, tensors), expected, rtol=0, atol=0)
        rows = fusewright.explain(function, *tensors)
    assert [row.backend for row in rows if row.serves] == ["torch"]


def test_a_kernel_that_is_not_there_is_torchs(monkeypatch):
    monkeypatch.setattr("fusewright_kernels.native.cpu_unavailable_reason", lambda: "no compiler")
    dispatch.forget()
    expected = gradients(F.scaled_dot_product_attention, qkv())
    with fusewright.enabled():
        for function in (F.scaled_dot_product_attention, imported_before):
            assert not served_by_ours(function)
            assert_same(gradients(function, qkv()), expected, rtol=0, atol=0)
    monkeypatch.undo()
    dispatch.forget()


def test_unusual_tensors_are_torchs():
    query, key, value = qkv(queries=9)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    causal = bias.causal_lower_right(9, 9)
    nested = torch.nested.nested_tensor([normal(5, 2, 8), normal(3, 2, 8)], layout=torch.jagged).transpose(1, 2)
    nested_output = F.scaled_dot_product_attention(nested, nested, nested)

    class Subclass(torch.Tensor):
        pass

    def tangent():
        with torch.autograd.forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
            return torch.autograd.forward_ad.unpack_dual(F.scaled_dot_product_attention(dual, key, value)).tangent

    expected_tangent = tangent()
    with fusewright.enabled():
        torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value, causal), expected)
        wrapped = F.scaled_dot_product_attention(query.as_subclass(Subclass), key, value, is_causal=True)
        assert type(wrapped) is Subclass
        torch.testing.assert_close(wrapped.as_subclass(torch.Tensor), expected)
        torch.testing.assert_close(F.scaled_dot_product_attention(nested, nested, nested), nested_output)
        torch.testing.assert_close(tangent(), expected_tangent)
        assert F.scaled_dot_product_attention(*qkv(keys=0)).shape == (2, 4, 8, 8)
        meta = [tensor.to("meta") for tensor in qkv()]
        assert F.scaled_dot_product_attention(*meta).is_meta
        with torch.device("cpu"):
            torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value, is_causal=True), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"key": qkv()[1][..., :7]},
        {"query": qkv()[0].int()},
        {"key": qkv()[1].bfloat16()},
        {"attn_mask": torch.ones(6, 9)},
        {"attn_mask": torch.ones(8, 9).int()},
        {"dropout_p": 1.5},
        {"query": qkv()[0][0, 0, 0]},
    ],
    ids=lambda changes: " ".join(f"{name} {getattr(value, 'shape', value)}" for name, value in changes.items()),
)
def test_errors_are_torchs(changes):
    arguments = dict(zip(("query", "key", "value"), qkv(), strict=True)) | changes
    with pytest.raises(Exception) as expected:
        F.scaled_dot_product_attention(**arguments)
    with fusewright.enabled(), pytest.raises(type(expected.value)) as actual:
        F.scaled_dot_product_attention(**arguments)
    assert str(actual.value) == str(expected.value)


def test_transforms():
    query, key, value = qkv(queries=9)

    def loss(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).square().sum()

    def old(query, key, value):
        return imported_before(query, key, value, is_causal=True)

    expected = torch.vmap(torch.func.grad(loss))(query, key, value)
    expected_output = torch.vmap(old)(query, key, value)
    with fusewright.enabled():
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(query, key, value), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.vmap(old)(query, key, value), expected_output)


def test_compiled_functions_follow():
    def function(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True) * 2

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    tensors = qkv()
    expected = gradients(function, tensors)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for enable in (False, True, False):
        if enable:
            fusewright.enable()
        else:
            fusewright.disable()
        graphs.clear()
        assert_same(gradients(compiled, tensors), expected)
        assert len(graphs) == 1 and ("fusewright" in graphs[0] or "autograd_function_apply" in graphs[0]) is enable


def test_a_graph_compiled_before_reaches_the_slot():
    graph = torch.compile(imported_before, backend="aot_eager", fullgraph=True)
    tensors = qkv()
    expected = gradients(graph, tensors)
    with fusewright.enabled():
        assert_same(gradients(graph, tensors), expected)
        assert served_by_ours(graph)
    assert_same(gradients(graph, tensors), expected)


def test_exports_and_scripts():
    class Module(torch.nn.Module):
        def forward(self, query, key, value):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    tensors = tuple(qkv())
    expected = Module()(*tensors)
    attention = torch.nn.MultiheadAttention(16, 4).eval()
    sequence = normal(5, 2, 16)
    with fusewright.enabled():
        for strict in (False, True):
            program = torch.export.export(Module(), tensors, strict=strict)
            torch.testing.assert_close(program.module()(*tensors), expected)
        torch.testing.assert_close(torch.jit.script(Module())(*tensors), expected)
        scripted = torch.jit.script(attention)(sequence, sequence, sequence)
        torch.testing.assert_close(scripted, attention(sequence, sequence, sequence))
        torch.testing.assert_close(torch.fx.symbolic_trace(Module())(*tensors), expected)


def test_compiled_by_inductor():
    tensors = qkv()

    def function(query, key, value):
        return F.scaled_dot_product_attention(query, key, value) + imported_before(query, key, value)

    expected = function(*tensors)
    with fusewright.enabled():
        torch.testing.assert_close(torch.compile(function)(*tensors), expected)


# The switch


def test_nesting_and_repeating():
    fusewright.disable()
    fusewright.enable()
    fusewright.enable()
    assert F.scaled_dot_product_attention is not TORCHS["scaled_dot_product_attention"]
    with fusewright.enabled(["scaled_dot_product_attention"]):
        pass
    assert F.multi_head_attention_forward is not TORCHS["multi_head_attention_forward"]
    fusewright.disable()
    with fusewright.enabled(["multi_head_attention_forward"]):
        assert F.scaled_dot_product_attention is TORCHS["scaled_dot_product_attention"]
        assert not served_by_ours(imported_before)
        with fusewright.enabled():
            assert served_by_ours(imported_before)
        assert not served_by_ours(imported_before)
        fusewright.disable()
    assert F.multi_head_attention_forward is TORCHS["multi_head_attention_forward"]


def test_an_exception_gives_everything_back():
    with pytest.raises(KeyError), fusewright.enabled():
        raise KeyError
    assert F.scaled_dot_product_attention is imported_before


def test_unknown_names():
    with pytest.raises(ArgumentValueError, match="ops is 'softmax', expected names among"):
        fusewright.enable(["scaled_dot_product_attention", "softmax"])
    with pytest.raises(ArgumentTypeError, match="ops is"):
        fusewright.enable("softmax")
    assert F.scaled_dot_product_attention is imported_before


@pytest.mark.parametrize("before", [True, False])
def test_the_users_fast_path_setting(before):
    set_by_default = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(before)
    with fusewright.enabled():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() is before
    torch.backends.mha.set_fastpath_enabled(set_by_default)


class _OtherImplementation:
    """Stands in for another library in torch's registry."""

    removed = 0

    def remove(self):
        type(self).removed += 1


def test_another_implementation_in_the_registry():
    registry = torch.nn.attention
    registry.register_flash_attention_impl("other", register_fn=_OtherImplementation)
    registry.activate_flash_attention_impl("other")
    with fusewright.enabled():
        assert registry.current_flash_attention_impl() == "fusewright"
    assert registry.current_flash_attention_impl() == "other"
    with fusewright.enabled():
        registry.activate_flash_attention_impl("other")
        assert not served_by_ours(imported_before)
    assert registry.current_flash_attention_impl() == "other"
    registry.restore_flash_attention_impl()


def test_without_a_registry_the_slots_are_ours_all_the_same(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "restore_flash_attention_impl")
    with fusewright.enabled():
        assert served_by_ours(imported_before)
    gc.collect()
    assert not served_by_ours(imported_before)
    monkeypatch.undo()


def test_somebody_elses_replacement_stays():
    def theirs(*arguments, **options):
        return ours(*arguments, **options)

    fusewright.enable()
    ours = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = theirs
    fusewright.disable()
    assert F.scaled_dot_product_attention is theirs
    torch.testing.assert_close(theirs(*qkv()), imported_before(*qkv()))
    F.scaled_dot_product_attention = imported_before


def test_explain_tells_the_kernel():
    with fusewright.enabled():
        rows = fusewright.explain(F.scaled_dot_product_attention, *qkv())
        assert rows[-1].op == "attention" and rows[-1].backend == "cpu" and rows[-1].serves
        rows = fusewright.explain(F.scaled_dot_product_attention, *(tensor.double() for tensor in qkv()))
        assert "torch's own kernel" in str(rows) and "torch.float64 has no compiled kernel" in str(rows)
