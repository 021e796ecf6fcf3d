"""Linear cross-entropy: checks, dispatch, autograd."""

import torch
from torch import Tensor

from fusewright_kernels import autograd, cpu_kernels, dispatch, library, row_kernels
from fusewright_kernels.checks import floating_tensor, same_device, type_error, value_error
from fusewright_kernels.cross_entropy import backend_triton, checks, linear_chunks, linear_reference, reference
from fusewright_kernels.cross_entropy.linear_function import LinearCrossEntropy
from fusewright_kernels.cross_entropy.reduction import reduce

linear_chunks.attach()
dispatch.register(
    "linear_cross_entropy",
    {"cuda": row_kernels.refuse_cuda, "triton": backend_triton.refuse, "cpu": cpu_kernels.refuse},
)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    backend: str | None,
) -> Tensor:
    """See :func:`fusewright.functional.linear_cross_entropy`."""
    options = checks.options(ignore_index, reduction, label_smoothing, z_loss, softcap)
    _check_operands(input, weight, target, bias)
    checks.class_weight(class_weight, input, weight.shape[0], "class_weight")
    all_count = checks.class_indices(target, weight.shape[0], ignore_index)
    result_dtype = autograd.loss_dtype(input)
    input, weight = (autograd.low_precision_under_autocast(tensor) for tensor in (input, weight))
    bias = None if bias is None else bias.to(input.dtype)
    if class_weight is not None:
        class_weight = class_weight.to(reference.compute_dtype(input))
    rows, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1).long()
    chosen = dispatch.choose("linear_cross_entropy", dispatch.device_type(input), (input.dtype,), 2, backend)
    arguments = (rows, weight, bias, targets, class_weight, *options)
    if chosen == "reference":
        losses = linear_reference.losses(*arguments[:5], options)
    elif autograd.derivative_possible(input, weight, bias):
        wanted = [_may_need_gradient(tensor) for tensor in (input, weight, bias)]
        equal_gradients = reduction != "none" and any(wanted)
        losses, *_ = autograd.apply(LinearCrossEntropy, *arguments, equal_gradients, *wanted, chosen)
    else:
        losses = library.overload("linear_cross_entropy_forward", chosen)(*arguments)
    reduced = reduce(losses.reshape(target.shape), target, class_weight, reduction, ignore_index, all_count)
    return reduced.to(result_dtype)


def _may_need_gradient(tensor: Tensor | None) -> bool:
    """A transform does not say whether it will ask for one."""
    if tensor is None or not torch.is_grad_enabled():
        return False
    return tensor.requires_grad or torch._C._are_functorch_transforms_active()


def _check_operands(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    floating_tensor("input", input)
    floating_tensor("weight", weight)
    if input.ndim == 0:
        raise value_error("input.ndim", 0, "at least 1: (*, E)")
    if weight.ndim != 2 or weight.shape[1] != input.shape[-1]:
        raise value_error("weight.shape", tuple(weight.shape), f"(V, {input.shape[-1]}), a row for each class")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        floating_tensor(name, tensor)
        same_device(name, tensor, "input", input)
        if tensor.dtype is not input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise type_error(f"{name}.dtype", tensor.dtype, f"{input.dtype}, the dtype of input")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise value_error("bias.shape", tuple(bias.shape), f"({weight.shape[0]},), one for each class")
    checks.target_dtype(target, input)
    if target.is_floating_point():
        raise type_error("target.dtype", target.dtype, "int64 or uint8: class probabilities would be the logits' size")
    if target.shape != input.shape[:-1]:
        raise value_error("target.shape", tuple(target.shape), f"{tuple(input.shape[:-1])}, a class for each row")
