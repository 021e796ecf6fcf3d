"""Argument checks that modules of self-attention share."""

import torch
from torch import Tensor

from fusewright_kernels.checks import type_error, value_error


def self_attention_inputs(hidden: Tensor, embed_dim: int, **masks: Tensor | None) -> None:
    """``hidden`` is (B, T, E); each mask that is given is a bool (B, T)."""
    if hidden.ndim != 3 or hidden.shape[-1] != embed_dim:
        raise value_error("hidden.shape", tuple(hidden.shape), f"(B, T, {embed_dim})")
    for name, mask in masks.items():
        if mask is not None and mask.dtype is not torch.bool:
            raise type_error(f"{name}.dtype", mask.dtype, "torch.bool")
        if mask is not None and mask.shape != hidden.shape[:2]:
            raise value_error(f"{name}.shape", tuple(mask.shape), f"{tuple(hidden.shape[:2])}, (B, T)")
