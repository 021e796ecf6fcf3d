"""Cross-entropy of logits with class indices or probabilities: checks, dispatch, autograd."""

from torch import Tensor

from fusewright_kernels import autograd, dispatch, library, row_kernels
from fusewright_kernels.cross_entropy import backend_reference, backend_triton, checks, reference
from fusewright_kernels.cross_entropy.function import CrossEntropy
from fusewright_kernels.cross_entropy.linear_op import linear_cross_entropy as linear_cross_entropy
from fusewright_kernels.cross_entropy.reduction import reduce

backend_reference.attach()
dispatch.register(
    "cross_entropy", {"cuda": row_kernels.refuse_cuda, "triton": backend_triton.refuse, "cpu": row_kernels.refuse_cpu}
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    backend: str | None,
) -> Tensor:
    """See :func:`fusewright.functional.cross_entropy`."""
    options = checks.options(ignore_index, reduction, label_smoothing, z_loss, softcap)
    checks.logits_and_target(input, target)
    checks.class_weight(weight, input, input.shape[min(input.ndim - 1, 1)])
    if input.ndim == 1:
        input, target, single = input.unsqueeze(0), target.unsqueeze(0), True
    else:
        single = False
    all_count = False
    if not target.is_floating_point():
        all_count = checks.class_indices(target, input.shape[1], ignore_index)
        target = target.long()
    if weight is not None:
        weight = weight.to(reference.compute_dtype(input))
    dtypes = (input.dtype, target.dtype) if target.is_floating_point() else (input.dtype,)
    chosen = dispatch.choose("cross_entropy", dispatch.device_type(input), dtypes, input.ndim, backend)
    if chosen == "reference":
        losses = reference.losses(input, target, weight, options)
    elif autograd.derivative_possible(input, target):
        losses, _ = autograd.apply(CrossEntropy, input, target, weight, *options, chosen)
    else:
        losses, _ = library.overload("cross_entropy_forward", chosen)(input, target, weight, *options)
    reduced = reduce(losses, target, weight, reduction, ignore_index, all_count)
    output = reduced.to(autograd.loss_dtype(input))
    return output.squeeze(0) if single and reduction == "none" else output
