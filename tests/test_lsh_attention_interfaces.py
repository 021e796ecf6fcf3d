"""LSH attention under autograd, vmap, compile, export, autocast, the meta device and opcheck; and its errors."""

import pytest
import torch

from fusewright import functional
from fusewright_kernels import library
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

QUERY_KEY, VALUE = (torch.randn(2, 2, 40, 8, generator=torch.Generator().manual_seed(n)) for n in range(2))
BUCKETS = torch.randint(0, 8, (2, 2, 3, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, backend):
    query_key, value = QUERY_KEY.to(dtype), VALUE.transpose(1, 2).contiguous().transpose(1, 2).to(dtype)
    rotations = [torch.randn(2, 8, 3, 2), torch.randn(2, 8, 3, 3)]
    padding = torch.rand(2, 40) < 0.2
    ops = {
        name: library.overload(name, backend)
        for name in ("lsh_hash", "lsh_sort", "lsh_attention_forward", "lsh_attention_backward")
    }
    torch.library.opcheck(ops["lsh_hash"], (query_key, rotations, padding))
    torch.library.opcheck(ops["lsh_sort"], (BUCKETS,))
    order = ops["lsh_sort"](BUCKETS)
    for extras, numbers in (
        ((None, None, None), (8, 1, 0, True, 0.5, True, 0.0)),
        ((BUCKETS, padding, torch.tensor([3])), (7, 1, 1, False, 1.0, False, 0.3)),
    ):
        inputs = (query_key, value, order, *extras, *numbers)
        torch.library.opcheck(ops["lsh_attention_forward"], inputs)
        output, statistics = ops["lsh_attention_forward"](*inputs)
        for grad_lse in (None, torch.randn(2, 2, 40)):
            arguments = (torch.randn_like(output), grad_lse, output, statistics, *inputs)
            torch.library.opcheck(ops["lsh_attention_backward"], arguments)
    torch.library.opcheck(library.overload("lsh_rotations", "reference"), (torch.tensor([5]), 2, 8, 3, 4))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"allow_duplicates": False}], ids=str)
def test_first_and_second_derivatives(options):
    leaves = [tensor[:1, :1, :7, :3].double().detach().requires_grad_() for tensor in (QUERY_KEY, VALUE)]
    buckets = BUCKETS[:1, :1, :2, :7]

    def function(query_key, value):
        return functional.lsh_attention(query_key, value, buckets=buckets, chunk_length=3, return_lse=True, **options)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_vmap_and_per_sample_gradients():
    def loss(query_key, value, buckets):
        return functional.lsh_attention(query_key, value, buckets=buckets, chunk_length=8).square().sum()

    # A batch of one for each sample.
    samples = [tensor[:, None] for tensor in (QUERY_KEY, VALUE, BUCKETS)]
    actual = torch.vmap(torch.func.grad(loss, (0, 1)))(*samples)
    for n in range(2):
        expected = torch.func.grad(loss, (0, 1))(*(sample[n] for sample in samples))
        for result, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(result[n], other)


def test_compiles_without_a_break():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def function(query_key, value):
        return functional.lsh_attention(query_key, value, chunk_length=8, seed=3, is_causal=True, dropout_p=0.1)

    for length in (40, 33):
        leaves = [tensor[:, :, :length].detach().requires_grad_() for tensor in (QUERY_KEY, VALUE)]
        eager = functional.lsh_attention(*leaves, chunk_length=8, seed=3, is_causal=True, dropout_p=0.1)
        compiled = function(*leaves)
        assert torch.equal(compiled, eager)
        for result, other in zip(
            torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True
        ):
            assert torch.equal(result, other)


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, query_key, value):
            return functional.lsh_attention(query_key, value, chunk_length=8, seed=1)

    program = torch.export.export(Module(), (QUERY_KEY, VALUE))
    assert torch.equal(program.module()(QUERY_KEY, VALUE), Module()(QUERY_KEY, VALUE))


def test_autocast_runs_in_the_low_precision_type():
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.lsh_attention(QUERY_KEY, VALUE, chunk_length=8).dtype is torch.bfloat16


def test_meta_tensors_give_shapes():
    output, lse = functional.lsh_attention(
        QUERY_KEY.to("meta"), VALUE.to("meta"), chunk_length=8, n_buckets=(4, 4), return_lse=True, seed=0
    )
    assert output.is_meta and output.shape == VALUE.shape and lse.shape == (2, 2, 40)


ERRORS = [
    pytest.param({"query_key": QUERY_KEY[0]}, ArgumentValueError, "query_key.ndim is 3", id="rank"),
    pytest.param({"query_key": QUERY_KEY.int()}, ArgumentTypeError, "query_key.dtype is torch.int32", id="dtype"),
    pytest.param({"value": VALUE.bfloat16()}, ArgumentTypeError, "value.dtype is torch.bfloat16", id="mixed dtypes"),
    pytest.param({"value": VALUE[:, :, :9]}, ArgumentValueError, "value.shape is (2, 2, 9, 8)", id="lengths"),
    pytest.param({"value": VALUE.to("meta")}, ArgumentValueError, "value.device is meta", id="device"),
    pytest.param({"n_hashes": 0}, ArgumentValueError, "n_hashes is 0, expected an int >= 1", id="rounds"),
    pytest.param({"chunk_length": 0}, ArgumentValueError, "chunk_length is 0", id="chunk"),
    pytest.param({"chunk_length": 4.0}, ArgumentTypeError, "chunk_length is a float", id="chunk type"),
    pytest.param({"chunks_before": -1}, ArgumentValueError, "chunks_before is -1", id="window"),
    pytest.param({"n_buckets": 7}, ArgumentValueError, "n_buckets is 7, expected even", id="odd"),
    pytest.param({"n_buckets": (4, 3)}, ArgumentValueError, "n_buckets is (4, 3)", id="odd factor"),
    pytest.param({"n_buckets": ()}, ArgumentValueError, "n_buckets is ()", id="no factors"),
    pytest.param({"n_buckets": 0}, ArgumentValueError, "n_buckets is 0", id="no buckets"),
    pytest.param({"buckets": BUCKETS - 1}, ArgumentValueError, "buckets is from -1 to 6", id="negative bucket"),
    pytest.param({"buckets": BUCKETS, "n_buckets": 6}, ArgumentValueError, "expected from 0 to 6", id="bucket range"),
    pytest.param({"buckets": BUCKETS.int()}, ArgumentTypeError, "buckets.dtype is torch.int32", id="bucket dtype"),
    pytest.param({"buckets": BUCKETS[:, :, :, :9]}, ArgumentValueError, "buckets.shape", id="bucket shape"),
    pytest.param(
        {"buckets": BUCKETS, "rotations": torch.randn(2, 8, 4, 3)}, ArgumentValueError, "rotations is given", id="both"
    ),
    pytest.param({"rotations": torch.randn(2, 8, 3, 3)}, ArgumentValueError, "rotations.shape", id="rotation rounds"),
    pytest.param({"rotations": torch.randn(2, 7, 4, 3)}, ArgumentValueError, "rotations.shape", id="rotation width"),
    pytest.param({"rotations": []}, ArgumentValueError, "rotations is empty", id="no rotations"),
    pytest.param(
        {"key_padding_mask": torch.zeros(2, 40)}, ArgumentTypeError, "key_padding_mask.dtype", id="padding dtype"
    ),
    pytest.param(
        {"key_padding_mask": torch.zeros(2, 39, dtype=torch.bool)}, ArgumentValueError, "(2, 40), (B, T)",
        id="padding shape",
    ),
    pytest.param({"dropout_p": 1.1}, ArgumentValueError, "dropout_p is 1.1", id="dropout"),
    pytest.param({"scale": float("inf")}, ArgumentValueError, "scale is inf", id="scale"),
    pytest.param({"seed": 0.5}, ArgumentTypeError, "seed is a float", id="seed"),
    pytest.param({"backend": "cuda"}, ArgumentValueError, "backend is 'cuda'", id="backend"),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, message", ERRORS)
def test_bad_arguments(changes, error, message):
    arguments = {"query_key": QUERY_KEY, "value": VALUE, "chunk_length": 8} | changes
    with pytest.raises(error) as caught:
        functional.lsh_attention(**arguments)
    assert message in str(caught.value)
