"""Routing and Sinkhorn attention against plain formulas, one cluster and one block at a time."""

import math

import pytest
import torch
from torch import Tensor

from fusewright.nn import RoutingSelfAttention, SinkhornSelfAttention
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

EMBED, HEADS, T = 12, 3, 24
D = EMBED // HEADS


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def heads_of(module: torch.nn.Module, hidden: Tensor) -> list[Tensor]:
    return [part.unflatten(-1, (HEADS, D)).transpose(1, 2) for part in module.in_proj(hidden).chunk(3, -1)]


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """One head; a row that sees nothing gives zeros."""
    logits = (query @ key.mT / math.sqrt(D)).masked_fill(~visible, -math.inf)
    return torch.where(visible.any(-1, keepdim=True), logits.softmax(-1), 0.0) @ value


def routed(module: RoutingSelfAttention, hidden: Tensor, padding: Tensor) -> Tensor:
    """Every cluster as a mask over all pairs; the outputs of a position's clusters averaged."""
    query, key, value = heads_of(module, hidden)
    size, positions = min(module.cluster_size, T), torch.arange(hidden.shape[1])
    order = positions <= positions[:, None] if module.is_causal else torch.ones(len(positions), len(positions)) > 0
    outputs = torch.zeros_like(value)
    for b in range(len(hidden)):
        for h in range(HEADS):
            total, times = torch.zeros_like(value[b, h]), torch.zeros(hidden.shape[1], 1)
            for mean in module.means[h]:
                taken = []
                for side in (query, key):
                    along = torch.nn.functional.normalize(side[b, h], dim=-1) @ mean
                    chosen = torch.zeros(hidden.shape[1], dtype=torch.bool)
                    chosen[along.masked_fill(padding[b], -math.inf).topk(size).indices] = True
                    taken.append(chosen)
                visible = taken[0][:, None] & (taken[1] & ~padding[b]) & order
                total = total + softmax_attention(query[b, h], key[b, h], value[b, h], visible)
                times = times + visible.any(-1, keepdim=True)
            outputs[b, h] = total / times.clamp(min=1)
    return module.out_proj(outputs.transpose(1, 2).flatten(2))


def sorted_blocks(module: SinkhornSelfAttention, hidden: Tensor, padding: Tensor) -> Tensor:
    """Block by block, with the sorting matrix by Sinkhorn's division of rows and columns by their sums."""
    query, key, value = heads_of(module, hidden)
    blocks, length = module.num_blocks, hidden.shape[1] // module.num_blocks
    shown = ~padding
    rows = []
    for b in range(len(hidden)):
        for h in range(HEADS):
            q, k, v = (part[b, h] for part in (query, key, value))
            q_kept, k_kept = q * shown[b, :, None], k * shown[b, :, None]
            if module.is_causal:
                means = k_kept.cumsum(0) / torch.arange(1, len(k) + 1)[:, None]
                features = torch.cat([means, k_kept], -1)[::length]
                scores = (features @ module.sort_weight[h] / module.temperature).exp().tril(-1)
                matrix = scores / scores.sum(-1, keepdim=True).clamp(min=1e-30)
            else:
                features = torch.cat([part.unflatten(0, (blocks, length)).sum(1) for part in (q_kept, k_kept)], -1)
                matrix = (features @ module.sort_weight[h] / module.temperature).exp()
                for _ in range(module.iterations):
                    matrix = matrix / matrix.sum(-1, keepdim=True)
                    matrix = matrix / matrix.sum(-2, keepdim=True)
            weights, sources = matrix.max(-1)
            for n in range(blocks):
                own = slice(n * length, (n + 1) * length)
                other = slice(int(sources[n]) * length, (int(sources[n]) + 1) * length)
                keys, values = (torch.cat([weights[n] * part[other], part[own]]) for part in (k, v))
                visible = torch.cat([shown[b, other] & (weights[n] > 0), shown[b, own]]).expand(length, -1)
                if module.is_causal:
                    visible = visible & torch.ones(length, 2 * length).tril(length).bool()
                rows.append(softmax_attention(q[own], keys, values, visible))
    outputs = torch.stack(rows).reshape(len(hidden), HEADS, hidden.shape[1], D)
    return module.out_proj(outputs.transpose(1, 2).flatten(2))


def check(module: torch.nn.Module, formula, padded: bool) -> None:
    hidden = torch.randn(2, T, EMBED, requires_grad=True)
    padding = torch.zeros(2, T, dtype=torch.bool)
    if padded:
        padding[1, 17:] = True
    actual = module(hidden, padding if padded else None)
    expected = formula(module, hidden, padding)
    torch.testing.assert_close(actual[~padding], expected[~padding])
    leaves = [hidden, *module.parameters()]
    grad = torch.randn_like(actual) * ~padding[..., None]
    for gradient, other in zip(
        torch.autograd.grad(actual, leaves, grad, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, leaves, grad, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [5, 100])
def test_routing(size, causal, padded):
    check(RoutingSelfAttention(EMBED, HEADS, 4, size, is_causal=causal).eval(), routed, padded)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", [1, 4])
def test_sinkhorn(blocks, causal, padded):
    check(SinkhornSelfAttention(EMBED, HEADS, blocks, is_causal=causal).eval(), sorted_blocks, padded)


def test_one_cluster_of_everything_is_full_attention():
    module = RoutingSelfAttention(EMBED, HEADS, 1, T).eval()
    hidden = torch.randn(2, T, EMBED)
    full = torch.nn.functional.scaled_dot_product_attention(*heads_of(module, hidden))
    torch.testing.assert_close(module(hidden), module.out_proj(full.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("causal", [False, True])
def test_sinkhorn_rows_and_columns_share_out_one(causal):
    module = SinkhornSelfAttention(EMBED, HEADS, 4, is_causal=causal, iterations=50).eval()
    blocks = torch.randn(2, 2, HEADS, 4, 6, D)
    shares = module._sorted(blocks[0], blocks[1], None)
    if causal:
        assert shares.triu().eq(0).all()
        torch.testing.assert_close(shares[:, :, 1:].sum(-1), torch.ones(2, HEADS, 3))
    else:
        for dim in (-1, -2):
            torch.testing.assert_close(shares.sum(dim), torch.ones(2, HEADS, 4), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["routing", "sinkhorn"])
def test_nothing_comes_from_behind(kind):
    """Routing's choice of cluster members looks at all positions, so its means are made to take everything."""
    if kind == "routing":
        module = RoutingSelfAttention(EMBED, HEADS, 2, T, is_causal=True).eval()
    else:
        module = SinkhornSelfAttention(EMBED, HEADS, 4, is_causal=True).eval()
    hidden = torch.randn(1, T, EMBED)
    changed = hidden.clone()
    changed[:, 14:] += 1.0
    torch.testing.assert_close(module(hidden)[:, :14], module(changed)[:, :14])
    assert not torch.allclose(module(hidden)[:, 14:], module(changed)[:, 14:])


def test_means_move_once_per_gradient_towards_their_members():
    module = RoutingSelfAttention(EMBED, HEADS, 3, 8, decay=0.0)
    hidden = torch.randn(2, T, EMBED)
    before = module.means.clone()
    output = module(hidden)
    assert torch.equal(module.means, before)
    units = [torch.nn.functional.normalize(part, dim=-1) for part in heads_of(module, hidden)[:2]]
    output.sum().backward()
    for h in range(HEADS):
        members = torch.cat([unit[:, h].flatten(0, 1) for unit in units])
        nearest = (members @ before[h].mT).argmax(-1)
        for n in range(3):
            own = members[nearest == n]
            expected = torch.nn.functional.normalize(own.sum(0), dim=-1) if len(own) else before[h, n]
            torch.testing.assert_close(module.means[h, n], expected)
    after = module.means.clone()
    with torch.no_grad():
        module(hidden)
    module.eval()(hidden).sum().backward()
    assert torch.equal(module.means, after)


def test_recomputation_has_the_clusters_of_the_first_forward():
    module, hidden = RoutingSelfAttention(EMBED, HEADS, 3, 8, decay=0.0), torch.randn(2, T, EMBED)
    plain = RoutingSelfAttention(EMBED, HEADS, 3, 8, decay=0.0)
    plain.load_state_dict(module.state_dict())
    torch.utils.checkpoint.checkpoint(module, hidden, use_reentrant=False).square().sum().backward()
    plain(hidden).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, dict(plain.named_parameters())[name].grad)
    torch.testing.assert_close(module.means, plain.means)


def test_sinkhorn_noise_comes_in_training_only():
    module, hidden = SinkhornSelfAttention(EMBED, HEADS, 4, temperature=5.0), torch.randn(1, T, EMBED)
    assert not torch.equal(module(hidden), module(hidden))
    assert torch.equal(module.eval()(hidden), module(hidden))


@pytest.mark.parametrize("causal", [False, True])
def test_low_precision_and_autocast(causal):
    hidden = torch.randn(1, T, EMBED)
    for module in (
        RoutingSelfAttention(EMBED, HEADS, 4, 8, is_causal=causal),
        SinkhornSelfAttention(EMBED, HEADS, 4, is_causal=causal),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            output = module(hidden)
            assert output.dtype is torch.bfloat16
        output.sum().backward()
        low = module.to(torch.bfloat16)
        assert low(hidden.bfloat16()).isfinite().all()


ERRORS = [
    (lambda: RoutingSelfAttention(EMBED, 5, 4, 8), "num_heads is 5"),
    (lambda: RoutingSelfAttention(EMBED, HEADS, 0, 8), "num_clusters is 0"),
    (lambda: RoutingSelfAttention(EMBED, HEADS, 4, 0), "cluster_size is 0"),
    (lambda: RoutingSelfAttention(EMBED, HEADS, 4, 8, decay=1.5), "decay is 1.5"),
    (lambda: SinkhornSelfAttention(EMBED, HEADS, 0), "num_blocks is 0"),
    (lambda: SinkhornSelfAttention(EMBED, HEADS, 4, temperature=0.0), "temperature is 0.0"),
    (lambda: SinkhornSelfAttention(EMBED, HEADS, 5)(torch.zeros(1, T, EMBED)), "hidden.shape[1] is 24"),
    (lambda: SinkhornSelfAttention(EMBED, HEADS, 4)(torch.zeros(T, EMBED)), "hidden.shape is (24, 12)"),
    (lambda: RoutingSelfAttention(EMBED, HEADS, 4, 8)(torch.zeros(1, T, EMBED), torch.zeros(1, T)), "key_padding_mask"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_bad_arguments(call, message):
    with pytest.raises((ArgumentValueError, ArgumentTypeError)) as caught:
        call()
    assert message in str(caught.value)
