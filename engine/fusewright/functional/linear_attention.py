"""Linear attention."""

from torch import Tensor

from fusewright_kernels.linear_attention import op as _linear_attention


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    feature_map: str = "elu",
    eps: float = 1e-6,
    state: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by a product of features: ``f(query) sum f(key) value / (f(query) sum f(key) + eps)``.

    Time and memory grow with the length. What was seen is a state of D by DV + 1 a head: passed on, it decodes token by
    token, or carries a sequence from call to call.

    Args:
        query: (B, H, T, D), float32, bfloat16, float16 or float64.
        key: (B, H, S, D), likewise; as many as queries if causal.
        value: (B, H, S, DV), likewise.
        is_causal: position i sees keys 0 to i, and the state.
        key_padding_mask: (B, S), bool: True takes no part, whatever it holds.
        feature_map: f: ``"elu"``, elu(x) + 1, or ``"identity"`` for features of one's own, which should be positive.
        eps: added to the denominator.
        state: (B, H, D, DV + 1), sums of f(key) [value, 1] over earlier positions; differentiable.
        return_state: also return the state with these keys added, float32 (float64 for float64), differentiable.

    Returns:
        (B, H, T, DV), of query's dtype; with ``return_state`` the state beside it. Sums are float32.

    Source: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs: fast autoregressive transformers with linear
    attention", 2020.
    """
    return _linear_attention.linear_attention(
        query, key, value, is_causal, key_padding_mask, feature_map, eps, state, return_state, backend
    )
