"""A linear layer whose decoding steps run at the speed of memory."""

from torch import Tensor, nn

from fusewright import functional


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` by :func:`fusewright.functional.linear`, with its kernel for few rows.

    Shape: (*, I) to (*, O).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)
