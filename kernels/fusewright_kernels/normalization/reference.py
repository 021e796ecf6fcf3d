"""Layer and RMS normalisation as plain PyTorch: oracle in float64, naive baseline, last fallback.

Low precision is computed in float32 and rounded once, as torch's own functions do. Every function is made of
differentiable operations, so derivatives of any order follow from autograd.
"""

import torch
from torch import Tensor


def _compute(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _normalized_dims(normalized_ndim: int) -> tuple[int, ...]:
    return tuple(range(-normalized_ndim, 0))


def _moments(x: Tensor, normalized_ndim: int, eps: float, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Centred x, its mean (0 without ``center``) and sqrt(variance + eps), the last two with kept dimensions.

    Divided by rather than multiplied with its reciprocal, whose derivative holds a cube that underflows for large x.
    """
    dims = _normalized_dims(normalized_ndim)
    mean = x.mean(dims, keepdim=True) if center else x.new_zeros(())
    centered = x - mean if center else x
    return centered, mean, torch.sqrt(centered.square().mean(dims, keepdim=True) + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, weight_offset: float) -> Tensor:
    if weight is not None:
        x = x * (weight.to(x.dtype) + weight_offset)
    return x if bias is None else x + bias.to(x.dtype)


def norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    eps: float,
    center: bool,
    weight_offset: float,
) -> Tensor:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps) * (weight + weight_offset) + bias over the trailing dimensions."""
    centered, _, deviation = _moments(_compute(input), normalized_ndim, eps, center)
    return _affine(centered / deviation, weight, bias, weight_offset).to(input.dtype)


def norm_with_statistics(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    eps: float,
    center: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """:func:`norm` and its statistics: rstd, then mean if ``center``, stacked as (1 or 2, M)."""
    centered, mean, deviation = _moments(_compute(input), normalized_ndim, eps, center)
    output = _affine(centered / deviation, weight, bias, weight_offset).to(input.dtype)
    statistics = [deviation.reciprocal(), mean] if center else [deviation.reciprocal()]
    return output, torch.stack([statistic.reshape(-1) for statistic in statistics])


def norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    eps: float,
    center: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; an absent parameter gets what one of that shape would get."""
    x, grad = _compute(input), _compute(grad_output)
    centered, _, deviation = _moments(x, normalized_ndim, eps, center)
    rstd = deviation.reciprocal()
    return _gradients(grad, centered * rstd, rstd, input.dtype, weight, bias, normalized_ndim, center, weight_offset)


def norm_backward_from_statistics(
    grad_output: Tensor,
    input: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    center: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`norm_backward` from the statistics that the forward saved."""
    x, grad = _compute(input), _compute(grad_output)
    kept = [*input.shape[: input.ndim - normalized_ndim], *[1] * normalized_ndim]
    rstd = statistics[0].reshape(kept)
    centered = x - statistics[1].reshape(kept) if center else x
    return _gradients(grad, centered * rstd, rstd, input.dtype, weight, bias, normalized_ndim, center, weight_offset)


def _gradients(
    grad: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    input_dtype: torch.dtype,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    center: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dims = _normalized_dims(normalized_ndim)
    weighted = _affine(grad, weight, None, weight_offset)
    grad_input = weighted - normalized * (weighted * normalized).mean(dims, keepdim=True)
    if center:
        grad_input = grad_input - weighted.mean(dims, keepdim=True)
    shape = grad.shape[grad.ndim - normalized_ndim :]
    grad_weight = (grad * normalized).reshape(-1, *shape).sum(0)
    grad_bias = grad.reshape(-1, *shape).sum(0)
    return (
        (grad_input * rstd).to(input_dtype),
        grad_weight.to(grad_weight.dtype if weight is None else weight.dtype),
        grad_bias.to(grad_bias.dtype if bias is None else bias.dtype),
    )


def _dropout(x: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    if keep is None:
        return x
    kept = torch.where(keep, x, 0.0)
    return kept / (1.0 - dropout_p) if dropout_p < 1.0 else kept


def add_norm_with_statistics(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
    normalized_ndim: int,
    eps: float,
    center: bool,
    weight_offset: float,
    dropout_p: float,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, new_residual, statistics) of new_residual = dropout(input) + residual and its norm.

    ``keep`` is dropout's keep mask in the shape of input. The norm is that of new_residual as it is stored.
    """
    new_residual = (_dropout(_compute(input), keep, dropout_p) + _compute(residual)).to(residual_dtype)
    output, statistics = norm_with_statistics(
        _compute(new_residual), weight, bias, normalized_ndim, eps, center, weight_offset
    )
    return output.to(input.dtype), new_residual, statistics


def add_norm_backward(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
    normalized_ndim: int,
    eps: float,
    center: bool,
    weight_offset: float,
    dropout_p: float,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, residual, weight and bias."""
    gradients = norm_backward(
        grad_output, _compute(new_residual), weight, bias, normalized_ndim, eps, center, weight_offset
    )
    return _through_the_addition(gradients, grad_new_residual, keep, dropout_p, input_dtype, residual_dtype)


def add_norm_backward_from_statistics(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
    normalized_ndim: int,
    center: bool,
    weight_offset: float,
    dropout_p: float,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`add_norm_backward` from the statistics that the forward saved."""
    gradients = norm_backward_from_statistics(
        grad_output, _compute(new_residual), statistics, weight, bias, normalized_ndim, center, weight_offset
    )
    return _through_the_addition(gradients, grad_new_residual, keep, dropout_p, input_dtype, residual_dtype)


def _through_the_addition(
    gradients: tuple[Tensor, Tensor, Tensor],
    grad_new_residual: Tensor | None,
    keep: Tensor | None,
    dropout_p: float,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_stream, grad_weight, grad_bias = gradients
    if grad_new_residual is not None:
        grad_stream = grad_stream + _compute(grad_new_residual)
    grad_input = _dropout(grad_stream, keep, dropout_p)
    return grad_input.to(input_dtype), grad_stream.to(residual_dtype), grad_weight, grad_bias
