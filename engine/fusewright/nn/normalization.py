"""Layer and RMS normalisation modules, plain and fused with the residual addition before them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusewright import functional


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` on fused kernels.

    Args:
        zero_centered_weight: the scale is ``1 + weight`` and ``weight`` starts at 0.
        Others: as torch.nn.LayerNorm.

    Shape: (*, *normalized_shape) to the same.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        zero_centered_weight: bool = False,
    ) -> None:
        self.zero_centered_weight = zero_centered_weight
        super().__init__(_shape(normalized_shape), eps, elementwise_affine, bias, device, dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _zero_center(self)

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps,
            zero_centered_weight=self.zero_centered_weight,
        )  # fmt: skip


class RMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` on fused kernels.

    Args:
        zero_centered_weight: the scale is ``1 + weight`` and ``weight`` starts at 0, as in Gemma.
        Others: as torch.nn.RMSNorm.

    Shape: (*, *normalized_shape) to the same.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        zero_centered_weight: bool = False,
    ) -> None:
        self.zero_centered_weight = zero_centered_weight
        super().__init__(_shape(normalized_shape), eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _zero_center(self)

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(
            x, self.normalized_shape, self.weight, self.eps, zero_centered_weight=self.zero_centered_weight
        )


class AddLayerNorm(LayerNorm):
    """Residual addition and layer normalisation in one pass: see :func:`fusewright.functional.add_layer_norm`.

    Args:
        dropout_p: dropout on ``input`` while training.
        residual_dtype: dtype of the residual stream, ``input``'s or float32; that of ``residual`` if None.
        Others: as :class:`LayerNorm`; the ``state_dict`` is that of torch.nn.LayerNorm.

    Shape: input and residual (*, *normalized_shape); returns (normalised, new_residual) of the same shape.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        dropout_p: float = 0.0,
        residual_dtype: torch.dtype | None = None,
        zero_centered_weight: bool = False,
    ) -> None:
        super().__init__(
            normalized_shape, eps, elementwise_affine, bias, device, dtype, zero_centered_weight=zero_centered_weight
        )
        self.dropout_p = dropout_p
        self.residual_dtype = residual_dtype

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return functional.add_layer_norm(
            input, residual, self.normalized_shape, self.weight, self.bias, self.eps,
            dropout_p=self.dropout_p if self.training else 0.0, residual_dtype=self.residual_dtype,
            zero_centered_weight=self.zero_centered_weight,
        )  # fmt: skip


class AddRMSNorm(RMSNorm):
    """Residual addition and RMS normalisation in one pass; arguments as :class:`AddLayerNorm`, without a bias."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        dropout_p: float = 0.0,
        residual_dtype: torch.dtype | None = None,
        zero_centered_weight: bool = False,
    ) -> None:
        super().__init__(
            normalized_shape, eps, elementwise_affine, device, dtype, zero_centered_weight=zero_centered_weight
        )
        self.dropout_p = dropout_p
        self.residual_dtype = residual_dtype

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return functional.add_rms_norm(
            input, residual, self.normalized_shape, self.weight, self.eps,
            dropout_p=self.dropout_p if self.training else 0.0, residual_dtype=self.residual_dtype,
            zero_centered_weight=self.zero_centered_weight,
        )  # fmt: skip


def _shape(normalized_shape: int | Sequence[int]) -> list[int]:
    return [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)


def _zero_center(module: LayerNorm | RMSNorm) -> None:
    if module.zero_centered_weight and module.elementwise_affine:
        nn.init.zeros_(module.weight)
