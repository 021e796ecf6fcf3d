"""The activations of feed-forward layers."""

from torch import Tensor

from fusewright_kernels.activation import op as _activation


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``gate * sigmoid(gate) * up``, in one pass.

    Args:
        gate: (*, F), float32, bfloat16, float16 or float64, any strides; without ``up`` (*, 2F): gate and up one behind
            the other, as one projection for both returns them.
        up: of gate's shape and dtype.

    Returns:
        A contiguous tensor (*, F) in gate's dtype. Computed in float32 (float64 for float64) and rounded once.

    Source: Shazeer, "GLU variants improve Transformer", 2020.
    """
    return _activation.swiglu(gate, up, backend)


def bias_gelu(
    input: Tensor, bias: Tensor | None = None, approximate: str = "none", *, backend: str | None = None
) -> Tensor:
    """``z * P(Z < z)`` for ``z = input + bias`` and a normally distributed Z, in one pass.

    Args:
        input: (*, F), float32, bfloat16, float16 or float64, any strides.
        bias: (F,) in any floating dtype (float64 only with float64), or None for 0.
        approximate: ``"none"`` for the error function, ``"tanh"`` for Hendrycks and Gimpel's approximation.

    Returns:
        A contiguous tensor of input's shape and dtype. Computed in float32 (float64 for float64) and rounded once.

    Source: Hendrycks, Gimpel, "Gaussian error linear units", 2016; torch.nn.functional.gelu.
    """
    return _activation.bias_gelu(input, bias, approximate, backend)
