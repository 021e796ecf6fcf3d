"""How our ops run on tensors divided among processes: by sequences, and attention by heads as well.

Rows of a norm and pairs of sequence and head do not meet, so that each process computes its own. What has one value for
all of them (a norm's weight, sinks, a mask that broadcasts) is on every process, and its gradient is the sum over them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

REGISTRY = "torch.distributed.tensor"

# Which dimensions of a tensor count sequences (b) and heads (h), in their order; others are left out or a dot.
_INPUTS = {
    "query": "bh",
    "key": "bh",
    "value": "bh",
    "mask": "bh",
    "block_mask": "h",
    "alibi_slopes": "bh",
    "sinks": "h",
}
_ATTENTION_GRADIENTS = {f"grad_{name}": _INPUTS[name] for name in ("query", "key", "value", "mask", "sinks")}
_NORM_GRADIENTS = {"grad_input": "b", "grad_residual": "b", "grad_weight": "", "grad_bias": ""}
_ROWS = {"input": "b", "residual": "b", "new_residual": "b", "grad_output": "b", "grad_new_residual": "b"}

# op: (inputs, outputs).
_DIMENSIONS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "attention_forward": (_INPUTS, {"output": "bh", "statistics": ".bh"}),
    "attention_backward": (
        _INPUTS | {"grad_output": "bh", "grad_lse": "bh", "output": "bh", "statistics": ".bh"}, _ATTENTION_GRADIENTS,
    ),
    "norm_forward": (_ROWS, {"output": "b", "statistics": ".b"}),
    "norm_backward": (_ROWS | {"statistics": ".b"}, _NORM_GRADIENTS),
    "add_norm_forward": (_ROWS, {"output": "b", "new_residual": "b", "statistics": ".b"}),
    "add_norm_backward": (_ROWS | {"statistics": ".b"}, _NORM_GRADIENTS),
}  # fmt: skip


def register() -> None:
    """Tell torch.distributed.tensor the sharding rules of our ops, for every backend of each."""
    from torch.distributed.tensor.experimental import register_sharding

    for name, (inputs, outputs) in _DIMENSIONS.items():
        packet = getattr(torch.ops.fusewright, name)
        for overload_name in packet.overloads():
            overload = getattr(packet, overload_name)
            register_sharding(overload)(_rule(overload, inputs, outputs))


def _rule(overload: Any, inputs: dict[str, str], outputs: dict[str, str]) -> Callable[..., list[Any]]:
    names = [argument.name for argument in overload._schema.arguments]
    returned = [result.name for result in overload._schema.returns]

    def rule(*args: Any) -> list[tuple[Sequence[Any], Sequence[Any]]]:
        """The pairs of placements of outputs and inputs under which every process computes its own part."""
        from torch.distributed.tensor._dtensor_spec import DTensorSpec

        given = dict(zip(names, args, strict=False))
        tensors = {name: value for name, value in given.items() if isinstance(value, DTensorSpec)}
        return [
            (
                [_of_output(name, outputs[name], given, tensors, axis) for name in returned],
                [_placement(tensors.get(name), inputs.get(name, ""), axis) for name in names[: len(args)]],
            )
            for axis in ("", *_axes(given, tensors))
        ]

    return rule


def _axes(given: dict[str, Any], tensors: dict[str, Any]) -> list[str]:
    """The axes that may be divided. A seed counts the rows of the whole, packed sequences are no rows of their own."""
    if any(name in tensors for name in ("seed", "cu_seqlens_q", "cu_seqlens_k")):
        return []
    if "query" in tensors:
        query, key = tensors["query"], tensors["key"]
        parts = query.mesh.size()
        sizes = {"b": (query.shape[0],), "h": (query.shape[1], key.shape[1])}
        return [axis for axis, counts in sizes.items() if all(count % parts == 0 for count in counts)]
    rows = tensors.get("input", tensors.get("new_residual"))
    assert rows is not None
    divisible = rows.ndim > given["normalized_ndim"] and rows.shape[0] % rows.mesh.size() == 0
    return ["b"] if divisible else []


def _placement(tensor: Any, letters: str, axis: str) -> Any:
    """Of an input: None if there is none, on every process if it has no such dimension."""
    from torch.distributed.tensor import Replicate, Shard

    if tensor is None:
        return None
    dim = letters.find(axis) if axis else -1
    return Shard(dim) if dim >= 0 and tensor.shape[dim] > 1 else Replicate()


def _of_output(name: str, letters: str, given: dict[str, Any], tensors: dict[str, Any], axis: str) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    subject = name.removeprefix("grad_")
    is_wanted = given.get(f"need_{subject}", True) and (name != "statistics" or given.get("save_statistics", True))
    if not axis or not is_wanted:
        return Replicate()
    if name.startswith("grad_") and subject in tensors:
        # The gradient of what every process holds is the sum of what each of them finds.
        placement = _placement(tensors[subject], letters, axis)
        return placement if isinstance(placement, Shard) else Partial()
    dim = letters.find(axis)
    return Shard(dim) if dim >= 0 else Replicate()
