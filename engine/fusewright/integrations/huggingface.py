"""``attn_implementation="fusewright"`` for the models of transformers."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright_kernels.checks import value_error

NAME = "fusewright"
REGISTRY = "transformers.modeling_utils"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: object = None,
    output_attentions: bool = False,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers on :func:`fusewright.functional.scaled_dot_product_attention`.

    Args:
        module: its ``is_causal`` counts where the argument is None.
        query: (B, H, T, D).
        key, value: (B, HK, S, D), not repeated for the query heads.
        attention_mask: broadcasts to (B, H, T, S), True takes part or added to the logits. None is causal from the top
            left if ``is_causal`` and T > 1, else everything takes part: as the mask interface means it.
        s_aux: (H,), sinks.
        position_bias: broadcasts to (B, H, T, S), added to the logits, as T5 does.
        cache: None: the paged cache of transformers' continuous batching is not taken.
        unused: what the mask says already (a sliding window), and what other implementations need.

    Returns:
        (B, T, H, D), and None for the weights.
    """
    if cache is not None:
        raise value_error("cache", f"a {type(cache).__name__}", "None: use attn_implementation='sdpa' for paged caches")
    if output_attentions:
        warnings.warn(f"attn_implementation={NAME!r} returns no attention weights; 'eager' does", stacklevel=2)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    hides_later_keys = bool(causal) and attention_mask is None and query.shape[2] > 1
    if position_bias is not None and attention_mask is not None:
        if attention_mask.dtype is torch.bool:
            attention_mask = position_bias.masked_fill(~attention_mask, -torch.inf)
        else:
            attention_mask = position_bias + attention_mask
    elif position_bias is not None:
        # Before a static cache is full there are keys behind those that the bias was made for.
        keys = min(key.shape[2], position_bias.shape[3])
        key, value, attention_mask = key[:, :, :keys], value[:, :, :keys], position_bias[..., :keys]
    output = functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True, softcap=softcap, sinks=s_aux,
        window=(-1, 0) if hides_later_keys else None,
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output.transpose(1, 2), None


def register() -> None:
    """Make ``attn_implementation="fusewright"`` known to transformers, its attention and its masks.

    The second is as needed as the first: without a mask interface of the same name transformers passes no mask, and
    padding takes part in silence.
    """
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
