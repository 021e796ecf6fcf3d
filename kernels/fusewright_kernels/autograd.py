"""How an op meets autograd, functorch and autocast."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def derivative_possible(*tensors: Tensor | None) -> bool:
    """Whether a call on ``tensors`` must go through an ``autograd.Function``.

    ``Function.apply`` costs about 3 microseconds, as much as a small kernel, so inference goes straight to the op.
    A trace always takes the Function: whether its inputs will want gradients is not known to it.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` for a Function with ``setup_context``, every argument given.

    torch's own ``apply`` binds the arguments to the signature of ``forward`` to fill in defaults, which costs about 30
    microseconds; outside transforms and traces that is all it does before the call made here.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def second_derivative_possible(*tensors: Tensor | None) -> bool:
    """The same question inside a backward; a compiled graph is differentiated once."""
    return not torch.compiler.is_compiling() and derivative_possible(*tensors)


def batch_first(tensor: Tensor, batch_dim: int | None, batch_size: int) -> Tensor:
    """``tensor`` with its vmap dimension first, expanded to one where it had none."""
    if batch_dim is None:
        return tensor.expand(batch_size, *tensor.shape)
    return tensor.movedim(batch_dim, 0)


def only_wanted(gradients: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients with None in place of the 0-element tensors an op returns for those not asked for."""
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


def float32_under_autocast(tensor: Tensor) -> Tensor:
    """Mirror of torch's float32 autocast list, which holds normalisation and softmax.

    That list exists for CUDA; on the CPU torch leaves both in their input's type under autocast, and so do we.
    """
    if tensor.is_cuda and torch.is_autocast_enabled("cuda") and tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor.float()
    return tensor


def loss_dtype(input: Tensor) -> torch.dtype:
    """The dtype of a loss of ``input``: its own, but float32 under autocast, as torch's losses."""
    device_type = input.device.type
    if input.dtype in (torch.bfloat16, torch.float16) and torch.amp.is_autocast_available(device_type):
        return torch.float32 if torch.is_autocast_enabled(device_type) else input.dtype
    return input.dtype


def low_precision_under_autocast(tensor: Tensor) -> Tensor:
    """Mirror of torch's autocast, which runs attention in the low-precision type on every device."""
    device_type = tensor.device.type
    if tensor.dtype is not torch.float32 or not torch.amp.is_autocast_available(device_type):
        return tensor
    if not torch.is_autocast_enabled(device_type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def pullback(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Vector-Jacobian product of a plain PyTorch formula, one gradient per input.

    None among ``inputs`` is passed through and gets None; None among ``grad_outputs`` counts as zero.
    """
    present = [index for index, tensor in enumerate(inputs) if tensor is not None]

    def of_present(*tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = list(inputs)
        for index, tensor in zip(present, tensors, strict=True):
            arguments[index] = tensor
        return tuple(function(*arguments))

    outputs, vjp = torch.func.vjp(of_present, *[inputs[index] for index in present])[:2]
    cotangents = [
        torch.zeros_like(output) if gradient is None else gradient
        for output, gradient in zip(outputs, grad_outputs, strict=True)
    ]
    gradients: list[Tensor | None] = [None] * len(inputs)
    for index, gradient in zip(present, vjp(tuple(cotangents)), strict=True):
        gradients[index] = gradient
    return gradients
