"""Two processes on one machine give what one gives: data, sharded, tensor and context parallel."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from enable_support import normal
from torch import nn

import fusewright
from fusewright import functional, models

WORLD = 2
TOKENS = torch.randint(20, (4, 12), generator=torch.Generator().manual_seed(0))


def _gpt():
    torch.manual_seed(0)
    model = models.GPT(20, 32, 16, 2, 2, dropout=0.0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def _loss(model, tokens):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())


def _one_process():
    """The parameters after two steps on the whole batch."""
    model = _gpt()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        _loss(model, TOKENS).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _train(model, tokens):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        _loss(model, tokens).backward()
        optimizer.step()


def _assert_trained(named_parameters):
    expected = _one_process()
    for name, parameter in named_parameters:
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def data_parallel(rank):
    model = nn.parallel.DistributedDataParallel(_gpt())
    _train(model, TOKENS.chunk(WORLD)[rank])
    _assert_trained(model.module.named_parameters())


def fully_sharded(rank):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    model = _gpt()
    for layer in model.blocks.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _train(model, TOKENS.chunk(WORLD)[rank])
    _assert_trained((name, parameter.full_tensor().detach()) for name, parameter in model.named_parameters())


def patched_and_sharded(rank):
    """A model of torch.nn, patched before it is sharded."""
    from torch.distributed.fsdp import fully_shard

    def build():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)
        return nn.Sequential(nn.Embedding(20, 16), nn.TransformerEncoder(layer, 2), nn.LayerNorm(16), nn.Linear(16, 20))

    alone, model = build(), build()
    _train(alone, TOKENS)
    fusewright.patch(model)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (WORLD,)))
    _train(model, TOKENS.chunk(WORLD)[rank])
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.full_tensor(), other, rtol=1e-3, atol=1e-4)


def tensor_parallel(rank):
    """The two maps of every feed-forward divided, with the norms and the attention between them on every process."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = _gpt()
    plan = {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()}
    for layer in model.blocks.layers:
        parallelize_module(layer, dist.init_device_mesh("cpu", (WORLD,)), plan)
    _train(model, TOKENS)
    _assert_trained(
        (name, (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach())
        for name, parameter in model.named_parameters()
    )


def divided_ops(rank):
    """Attention divided by sequences and by heads, norms by sequences: forward, and gradients of what is shared."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    query, key, value = normal(4, 4, 6, 8), normal(4, 2, 6, 8, seed=1), normal(4, 2, 6, 8, seed=2)
    sinks, mask = normal(4, seed=3), normal(4, 1, 6, 6, seed=4)
    residual, weight, bias = normal(4, 6, 8, seed=5), normal(8, seed=6), normal(8, seed=7)

    def attend(query, key, value, sinks, mask):
        return functional.scaled_dot_product_attention(
            query, key, value, mask, enable_gqa=True, window=(3, 0), sinks=sinks
        )

    def normalize(x, residual, weight, bias):
        x, residual = functional.add_layer_norm(functional.rms_norm(x, 8, weight), residual, 8, weight, bias)
        return x * residual

    for function, tensors, axes in (
        (attend, (query, key, value, sinks, mask), {"b": (0, 0, 0, None, 0), "h": (1, 1, 1, 0, None)}),
        (normalize, (normal(4, 6, 8, seed=8), residual, weight, bias), {"b": (0, 0, None, None)}),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        expected = function(*leaves)
        gradients = torch.autograd.grad(expected.square().sum(), leaves)
        for dims in axes.values():
            placements = [[Replicate() if dim is None else Shard(dim)] for dim in dims]
            divided = [
                distribute_tensor(tensor, mesh, placement).requires_grad_()
                for tensor, placement in zip(tensors, placements, strict=True)
            ]
            output = function(*divided)
            assert output.placements == (Shard(dims[0]),), output.placements
            torch.testing.assert_close(output.full_tensor(), expected, rtol=1e-4, atol=1e-5)
            actual = torch.autograd.grad(output.square().sum(), divided)
            for one, other, dim in zip(actual, gradients, dims, strict=True):
                assert dim is None or one.placements == (Shard(dim),)
                torch.testing.assert_close(one.full_tensor(), other, rtol=1e-4, atol=1e-4)


def _joined(parts):
    """One softmax over the keys of several, from the output and the log-sum-exp of each."""
    lses = torch.stack([lse for _, lse in parts])
    shares = (lses - lses.logsumexp(0)).exp()
    return sum(share[..., None] * output for share, (output, _) in zip(shares, parts, strict=True))


def ring_attention(rank):
    """Each process holds a part of the sequence; keys and values go round, and every part returns its log-sum-exp."""
    query, key, value, cotangent = (normal(2, 3, 16, 8, seed=seed) for seed in range(4))
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    expected = functional.scaled_dot_product_attention(*leaves, is_causal=True)
    gradients = torch.autograd.grad((expected * cotangent).sum(), leaves)
    own = [tensor.chunk(WORLD, 2)[rank].clone().requires_grad_() for tensor in (query, key, value)]
    parts = []
    for turn in range(WORLD):
        source = (rank - turn) % WORLD
        held = [_Rotate.apply(tensor, turn) for tensor in own[1:]] if turn else own[1:]
        if source <= rank:
            parts.append(
                functional.scaled_dot_product_attention(own[0], *held, is_causal=source == rank, return_lse=True)
            )
        else:
            # What comes from behind is hidden; its gradient must still go round.
            masked = functional.scaled_dot_product_attention(
                own[0], *held, torch.zeros(1, 1, 1, 1, dtype=torch.bool), return_lse=True
            )
            parts.append(masked)
    output = _joined(parts)
    torch.testing.assert_close(output, expected.chunk(WORLD, 2)[rank], rtol=1e-4, atol=1e-5)
    actual = torch.autograd.grad((output * cotangent.chunk(WORLD, 2)[rank]).sum(), own)
    for one, whole in zip(actual, gradients, strict=True):
        torch.testing.assert_close(one, whole.chunk(WORLD, 2)[rank], rtol=1e-4, atol=1e-5)


class _Rotate(torch.autograd.Function):
    """The tensor of the process ``turns`` before this one; its gradient goes the way back."""

    @staticmethod
    def forward(tensor, turns):
        return _shifted(tensor, turns)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.turns = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        return _shifted(gradient, -ctx.turns), None


def _shifted(tensor, turns):
    rank, received = dist.get_rank(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
    requests = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, tensor.contiguous(), (rank + turns) % WORLD),
            dist.P2POp(dist.irecv, received, (rank - turns) % WORLD),
        ]
    )
    for request in requests:
        request.wait()
    return received


CASES = (data_parallel, fully_sharded, patched_and_sharded, tensor_parallel, divided_ops, ring_attention)


def _run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for case in CASES:
        try:
            case(rank)
            outcome = "equal"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        with open(os.path.join(folder, f"{case.__name__}.{rank}"), "w") as file:
            file.write(outcome)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes():
    """What each case came to in each process; all run in one pair of processes, which take seconds to start."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (folder,), WORLD)
        results = {}
        for case in CASES:
            results[case.__name__] = []
            for rank in range(WORLD):
                with open(os.path.join(folder, f"{case.__name__}.{rank}")) as file:
                    results[case.__name__].append(file.read())
        return results


@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_two_processes_are_one(outcomes, case):
    assert outcomes[case.__name__] == ["equal"] * WORLD
