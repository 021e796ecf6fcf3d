"""Losses."""

from torch import Tensor, nn

from fusewright import functional


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` in one pass over the logits: see :func:`fusewright.functional.cross_entropy`.

    Shape: input (C) or (N, C, d1, ...), target () or (N, d1, ...), to a scalar, or (N, d1, ...) without a reduction.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing
        )
