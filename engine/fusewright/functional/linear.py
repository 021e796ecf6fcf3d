"""A linear layer."""

from torch import Tensor

from fusewright_kernels.linear import op as _linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``input weight^T + bias``, as :func:`torch.nn.functional.linear`, with a kernel for the few rows of decoding.

    Up to 8 rows on a CPU, where no derivative is wanted and nothing is traced, take a kernel that reads the weight
    once, where it lies, at the speed of memory; a row's result is the same however many of them there are. All else
    goes to torch's own product.

    Args:
        input: (*, I), float32, bfloat16, float16 or float64.
        weight: (O, I), of input's dtype.
        bias: (O,), of input's dtype, or None.
        backend: ``"cpu"`` forces the kernel for few rows, for any number of them; it has no derivative.

    Returns:
        (*, O) of input's dtype, contiguous.
    """
    return _linear.linear(input, weight, bias, backend)
