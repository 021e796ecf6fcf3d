"""One compilation of a Triton kernel ahead of time."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Compilation(NamedTuple):
    """A kernel for one architecture; ``description`` is for the report."""

    kernel_name: str
    description: str
    source: Any
    architecture: int
    options: dict[str, Any]
    shared_limit: int | None = None  # bytes
    wants_warp_groups: bool = False


def source_of(
    kernel: Any, constants: dict[str, Any], type_of: Callable[[str], str], is_aligned: Callable[[str], bool]
) -> Any:
    """``kernel`` with its arguments typed and specialised as a launch would.

    Args:
        kernel: the function.
        constants: values of the arguments that are known when compiled; None leaves an operand out.
        type_of: Triton's name for the type of each other argument.
        is_aligned: whether an argument is a multiple of 16, which vector loads need; pointers always are.
    """
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    divisible_by_16 = {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[name] = "constexpr", constants[name]
            continue
        signature[name] = type_of(name)
        if signature[name].startswith("*") or is_aligned(name):
            divisible_by_16[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, divisible_by_16)
