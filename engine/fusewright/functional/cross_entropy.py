"""Cross-entropy of logits, and of the linear layer before them without the matrix of logits."""

from torch import Tensor

from fusewright_kernels.cross_entropy import op as _cross_entropy


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """``log(sum(exp(input))) - input[target]`` for every row, reduced.

    One pass over the logits forward and one backward; statistics and losses are float32 (float64 for float64).

    Args:
        input: logits (C) or (N, C, d1, ...), float32, bfloat16, float16 or float64.
        target: class indices () or (N, d1, ...), int64 or uint8; or probabilities of input's shape, floating, which get
            a gradient.
        weight: (C), a factor for each class; gets no gradient.
        ignore_index: rows of this class index have loss and gradient 0, whatever their logits, and do not count in a
            mean. Has no meaning for probabilities.
        reduction: ``"mean"`` over the weights of the classes that count (over the rows of probabilities), ``"sum"`` or
            ``"none"``.
        label_smoothing: share of a target that is spread evenly over the classes, in [0, 1].
        z_loss: adds ``z_loss * log(sum(exp(input)))^2`` to the loss of every row that counts, which keeps logits from
            drifting.
        softcap: logits are ``softcap * tanh(input / softcap)`` if given.

    Returns:
        A scalar, or (N, d1, ...) without a reduction, in input's dtype; float32 under autocast. The mean of no row
        is NaN, as in torch.

    Raises:
        IndexError: on a CPU, a class index is out of range. On a GPU, which is not waited for, its loss is NaN.

    Source: torch.nn.functional.cross_entropy; Szegedy et al., "Rethinking the inception architecture for computer
    vision", 2015 (smoothing); Chowdhery et al., "PaLM", 2022 (z-loss); Gemma Team, "Gemma 2", 2024 (softcap).
    """
    return _cross_entropy.cross_entropy(
        input, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, backend
    )


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """``cross_entropy(input @ weight.T + bias, target)`` without ever holding the logits of all rows.

    A chunk of rows at a time; under a mean or a sum the forward computes the gradients as well, so that no product is
    computed twice. Without a reduction the backward computes the logits again.

    Args:
        input: (*, E), float32, bfloat16, float16 or float64; low precision under autocast, as ``torch.nn.Linear``.
        weight: (V, E), a row for each class, in input's dtype.
        target: class indices (*), int64 or uint8.
        bias: (V,) or None.
        class_weight: (V,), a factor for each class; gets no gradient.
        ignore_index, reduction, label_smoothing, z_loss, softcap: as in :func:`cross_entropy`.

    Returns:
        A scalar, or (*) without a reduction, in input's dtype; float32 under autocast.

    Source: Hsu et al., "Liger kernel: efficient Triton kernels for LLM training", 2024.
    """
    return _cross_entropy.linear_cross_entropy(
        input, weight, target, bias, class_weight, ignore_index, reduction, label_smoothing, z_loss, softcap, backend
    )
