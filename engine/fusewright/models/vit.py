"""A Transformer over patches of an image."""

from typing import Any

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright.nn import LayerNorm, Linear, TransformerEncoder, TransformerEncoderLayer
from fusewright_kernels.checks import value_error


class ViT(nn.Module):
    """The vision Transformer: patches and a class token, learned positions, pre-norm layers with GELU, a linear head.

    Args:
        image_size, patch_size: of a side, in pixels; the second divides the first.
        classes: number of classes.
        channels: of the image.
        width, layers, heads, dim_feedforward, dropout: E and so on; the sizes of ViT-Base by default.

    Shape: images (B, channels, image_size, image_size) to logits (B, classes).

    Source: Dosovitskiy et al., "An image is worth 16x16 words", 2021.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        classes: int,
        channels: int = 3,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        dim_feedforward: int | None = None,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if image_size % patch_size != 0:
            raise value_error("patch_size", patch_size, f"a divisor of image_size, {image_size}")
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.patches = Linear(channels * patch_size**2, width, **placed)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width, **placed))
        self.positions = nn.Parameter(torch.empty(1, (image_size // patch_size) ** 2 + 1, width, **placed))
        self.dropout = nn.Dropout(dropout)
        layer = TransformerEncoderLayer(
            width, heads, dim_feedforward or 4 * width, dropout, "gelu", 1e-6, batch_first=True, norm_first=True,
            **placed,
        )  # fmt: skip
        self.encoder = TransformerEncoder(layer, layers, LayerNorm(width, eps=1e-6, **placed))
        self.head = Linear(width, classes, **placed)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        size = self.patch_size
        # (B, channels, rows, size, columns, size) to (B, rows * columns, channels * size * size).
        grid = images.unflatten(2, (-1, size)).unflatten(4, (-1, size))
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        embedded = torch.cat([self.class_token.expand(images.shape[0], -1, -1), self.patches(patches)], 1)
        if embedded.shape[1] != self.positions.shape[1]:
            raise value_error("images.shape", tuple(images.shape), "the image_size that the model was made for")
        return self.head(self.encoder(self.dropout(embedded + self.positions))[:, 0])

    def loss(self, images: Tensor, classes: Tensor) -> Tensor:
        """Mean cross-entropy of ``classes`` (B,) int64."""
        return functional.cross_entropy(self(images), classes)
