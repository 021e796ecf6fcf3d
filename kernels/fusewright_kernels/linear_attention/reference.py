"""Linear attention as plain PyTorch: oracle in float64, naive baseline, last fallback.

Low precision is computed in float32 and rounded once; every function is made of differentiable operations. Letters: B
batch, H heads, T queries, S keys, D and DV head dimensions. Katharopoulos et al., "Transformers are RNNs", 2020.
"""

import torch
from torch import Tensor

ELU, IDENTITY = 0, 1


def _compute(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def features(x: Tensor, feature_map: int) -> Tensor:
    """f(x) in the computed type."""
    x = _compute(x)
    return torch.nn.functional.elu(x) + 1.0 if feature_map == ELU else x


def _slopes(x: Tensor, feature_map: int) -> Tensor:
    x = _compute(x)
    return torch.where(x > 0.0, 1.0, features(x, feature_map)) if feature_map == ELU else torch.ones_like(x)


def _keys_and_values(
    key: Tensor, value: Tensor, key_padding_mask: Tensor | None, feature_map: int
) -> tuple[Tensor, Tensor]:
    """f(key) and [value, 1], zero where a key takes no part, whatever it holds."""
    mapped, values = features(key, feature_map), _compute(value)
    values = torch.nn.functional.pad(values, (0, 1), value=1.0)
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        mapped, values = torch.where(hidden, 0.0, mapped), torch.where(hidden, 0.0, values)
    return mapped, values


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    initial_state: Tensor | None,
    is_causal: bool,
    eps: float,
    feature_map: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, normalizer and final state of the op ``linear_attention_forward``, by the (T, S) matrix if causal."""
    mapped_query = features(query, feature_map)
    mapped_key, values = _keys_and_values(key, value, key_padding_mask, feature_map)
    state = mapped_key.mT @ values
    if initial_state is not None:
        state = state + initial_state
    if is_causal:
        sums = (mapped_query @ mapped_key.mT).tril() @ values
        if initial_state is not None:
            sums = sums + mapped_query @ initial_state
    else:
        sums = mapped_query @ state
    normalizer = sums[..., -1] + eps
    return (sums[..., :-1] / normalizer[..., None]).to(query.dtype), normalizer, state


def attention_backward(
    grad_output: Tensor,
    grad_final_state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    initial_state: Tensor | None,
    is_causal: bool,
    eps: float,
    feature_map: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and the initial state."""
    mapped_query = features(query, feature_map)
    mapped_key, values = _keys_and_values(key, value, key_padding_mask, feature_map)
    state = mapped_key.mT @ values if initial_state is None else mapped_key.mT @ values + initial_state
    seen = torch.zeros_like(state) if initial_state is None else initial_state.expand_as(state)
    matrix = mapped_query @ mapped_key.mT
    sums = matrix.tril() @ values + mapped_query @ seen if is_causal else mapped_query @ state
    normalizer = (sums[..., -1] + eps)[..., None]
    grad = _compute(grad_output)
    grad_sums = torch.cat([grad, -(grad * sums[..., :-1]).sum(-1, keepdim=True) / normalizer], -1) / normalizer
    carried = torch.zeros_like(state) if grad_final_state is None else grad_final_state
    if is_causal:
        grad_matrix = (grad_sums @ values.mT).tril()
        grad_mapped_query = grad_matrix @ mapped_key + grad_sums @ seen.mT
        grad_mapped_key = grad_matrix.mT @ mapped_query + values @ carried.mT
        grad_values = matrix.tril().mT @ grad_sums + mapped_key @ carried
        grad_state = mapped_query.mT @ grad_sums + carried
    else:
        grad_state = mapped_query.mT @ grad_sums + carried
        grad_mapped_query = grad_sums @ state.mT
        grad_mapped_key, grad_values = values @ grad_state.mT, mapped_key @ grad_state
    grad_key, grad_value = grad_mapped_key * _slopes(key, feature_map), grad_values[..., :-1]
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        grad_key, grad_value = torch.where(hidden, 0.0, grad_key), torch.where(hidden, 0.0, grad_value)
    grad_query = grad_mapped_query * _slopes(query, feature_map)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), grad_state
