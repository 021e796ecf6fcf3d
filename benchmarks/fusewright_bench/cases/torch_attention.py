"""torch's ways to exact attention: each backend of its function by itself, and FlexAttention."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fusewright_bench.case import Forward, Inputs, Provider
from fusewright_bench.cases import ours

_BACKENDS = {
    "torch-math": SDPBackend.MATH,
    "torch-flash": SDPBackend.FLASH_ATTENTION,
    "torch-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
}
Arguments = Callable[[Inputs], dict[str, Any]]
TinyInputs = Callable[[torch.dtype, torch.device], Inputs]


def providers(arguments: Arguments, tiny_inputs: TinyInputs) -> Sequence[Provider]:
    """torch's choice by default; the others when asked for. ``arguments`` are those of torch's function."""
    return (
        Provider(
            "torch",
            "torch",
            lambda inputs: ours.forward_of(torch_functional.scaled_dot_product_attention, arguments(inputs)),
        ),
        *(_one_backend(name, backend, arguments, tiny_inputs) for name, backend in _BACKENDS.items()),
        Provider("flex-attention", "inductor", partial(_bind_flex_attention, arguments), by_default=False),
    )


def _one_backend(name: str, backend: SDPBackend, arguments: Arguments, tiny_inputs: TinyInputs) -> Provider:
    def bind(inputs: Inputs) -> Forward:
        keywords = arguments(inputs)

        def forward() -> tuple[Tensor]:
            with sdpa_kernel(backend):
                return (torch_functional.scaled_dot_product_attention(**keywords),)

        return forward

    def absence(device: torch.device, dtype: torch.dtype) -> str | None:
        # torch names no reason that could be asked for; a call that it has no kernel for raises.
        try:
            bind(tiny_inputs(dtype, device))()
        except RuntimeError as refusal:
            return f"torch has no such kernel for this call: {str(refusal).splitlines()[0]}"
        return None

    return Provider(name, "torch", bind, by_default=False, absence=absence)


def _bind_flex_attention(arguments: Arguments, inputs: Inputs) -> Forward:
    """Compiled, as its documentation says to use it; a mask becomes a mask of blocks beforehand."""
    keywords = arguments(inputs)
    query, key, value = (keywords[name] for name in ("query", "key", "value"))
    mask, visible = keywords.get("attn_mask"), None
    if mask is not None:

        def visible(batch: Tensor, head: Tensor, i_query: Tensor, i_key: Tensor) -> Tensor:
            return mask[i_query, i_key]

    elif keywords["is_causal"]:

        def visible(batch: Tensor, head: Tensor, i_query: Tensor, i_key: Tensor) -> Tensor:
            return i_query >= i_key

    sizes = (query.shape[2], key.shape[2])
    blocks = None if visible is None else create_block_mask(visible, None, None, *sizes, device=str(query.device))
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda: (attend(query, key, value, block_mask=blocks, enable_gqa=True),)
