"""Layer and RMS normalisation, with and without a residual addition."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusewright_kernels.normalization import op as _normalization


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    zero_centered_weight: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation over the trailing dimensions: ``(x - mean) / sqrt(variance + eps) * weight + bias``.

    Statistics and sums are float32, by two passes over a row that is read from memory once.

    Args:
        input: (*, *normalized_shape), float32, bfloat16, float16 or float64.
        normalized_shape: the trailing sizes normalised over.
        weight: normalized_shape, of any floating dtype (float64 only with float64), or None for 1.
        bias: normalized_shape, likewise, or None for 0.
        eps: added to the variance, finite and >= 0.
        zero_centered_weight: multiply by ``1 + weight`` (a weight that is trained from 0).
        out: contiguous tensor like ``input`` to write to; not differentiable.

    Returns:
        A contiguous tensor of input's shape and dtype (``out`` if given). Under CUDA autocast float32, as torch.

    Source: Ba, Kiros, Hinton, "Layer normalization", 2016; torch.nn.functional.layer_norm.
    """
    return _normalization.norm(input, normalized_shape, weight, bias, eps, True, zero_centered_weight, out, backend)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    zero_centered_weight: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Root-mean-square normalisation over the trailing dimensions: ``x / sqrt(mean(x^2) + eps) * weight``.

    Args:
        input: (*, *normalized_shape), float32, bfloat16, float16 or float64.
        normalized_shape: the trailing sizes normalised over.
        weight: normalized_shape, of any floating dtype (float64 only with float64), or None for 1.
        eps: added to the mean square; None is the machine epsilon of the type that statistics are computed in
            (float32, for float64 float64), as torch.
        bias: normalized_shape, added last, or None for 0.
        zero_centered_weight: multiply by ``1 + weight``, as Gemma does.
        out: contiguous tensor like ``input`` to write to; not differentiable.

    Returns:
        A contiguous tensor of input's shape and dtype (``out`` if given). Under CUDA autocast float32, as torch.

    Source: Zhang, Sennrich, "Root mean square layer normalization", 2019; torch.nn.functional.rms_norm.
    """
    return _normalization.norm(input, normalized_shape, weight, bias, eps, False, zero_centered_weight, out, backend)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    zero_centered_weight: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``new_residual = dropout(input) + residual`` and its layer normalisation, in one pass over memory.

    The norm is that of ``new_residual`` as it is returned, rounded to ``residual_dtype``.

    Args:
        input: (*, *normalized_shape), a sublayer's output.
        residual: input's shape, input's dtype or float32.
        normalized_shape, weight, bias, eps, zero_centered_weight: as in :func:`layer_norm`.
        dropout_p: probability in [0, 1] that an element of ``input`` is dropped; the others are scaled by 1 / (1 - p).
        seed: seed of the dropout mask, an int or an int64 tensor of one element; the mask is a function of it alone.
            None draws one from torch's default generator.
        residual_dtype: dtype of ``new_residual``, input's or float32; residual's if None.

    Returns:
        ``(normalised, new_residual)``, contiguous, of input's shape; ``normalised`` has input's dtype.
    """
    return _normalization.add_norm(
        input, residual, normalized_shape, weight, bias, eps, True,
        dropout_p, seed, residual_dtype, zero_centered_weight, backend,
    )  # fmt: skip


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    zero_centered_weight: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``new_residual = dropout(input) + residual`` and its RMS normalisation, in one pass over memory.

    Arguments and returns are those of :func:`add_layer_norm`; ``eps`` and ``bias`` as in :func:`rms_norm`.
    """
    return _normalization.add_norm(
        input, residual, normalized_shape, weight, bias, eps, False,
        dropout_p, seed, residual_dtype, zero_centered_weight, backend,
    )  # fmt: skip
