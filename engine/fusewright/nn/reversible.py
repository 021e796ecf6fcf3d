"""Residual layers whose inputs are computed back from their outputs, so that training stores no activations."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusewright_kernels.checks import type_error, value_error


class ReversibleBlock(nn.Module):
    """Two residual streams: ``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``.

    Args:
        f: maps a stream to its own shape; takes the side arguments of the call, such as a padding mask.
        g: likewise, without side arguments.

    Shape: two tensors of one shape to two of the same.

    Source: Gomez, Ren, Urtasun, Grosse, "The reversible residual network", 2017.
    """

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x1: Tensor, x2: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        y1 = x1 + self.f(x2, *args, **kwargs)
        return y1, x2 + self.g(y1)


class ReversibleSequence(nn.Module):
    """Reversible blocks one after the other, at a memory for activations that does not grow with their number.

    In training only the last outputs are kept; the backward computes each block's inputs back from its outputs and runs
    the block once more. Streams are float32 (float64 for float64), whatever the blocks compute in: in bfloat16 the
    inputs would come back too far off. What a block draws (dropout, rotations) is drawn again from a seed that the
    forward takes from torch's default generator. The gradient can be taken once.

    Args:
        blocks: the layers.
        merge: how the two streams become one at the end, ``"mean"`` or ``"concatenate"`` along the last dimension.

    Shape: (B, T, E) to the same, or (B, T, 2E) if concatenated, in the input's dtype. Both streams start as the input.

    Source: Kitaev, Kaiser, Levskaya, "Reformer: the efficient transformer", 2020.
    """

    def __init__(self, blocks: Iterable[ReversibleBlock], merge: str = "mean") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for block in self.blocks:
            if not isinstance(block, ReversibleBlock):
                raise type_error("blocks", f"holding a {type(block).__name__}", "ReversibleBlock instances")
        if merge not in ("mean", "concatenate"):
            raise value_error("merge", repr(merge), "'mean' or 'concatenate'")
        self.merge = merge

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Side arguments go to ``f`` of every block; those that are tensors get their gradients."""
        stream = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if torch.is_grad_enabled():
            y1, y2 = _run_reversibly([*self.blocks], stream, args, kwargs)
        else:
            y1 = y2 = stream
            for block in self.blocks:
                y1, y2 = block(y1, y2, *args, **kwargs)
        return self._merged(y1, y2, hidden.dtype)

    def with_caches(self, hidden: Tensor, caches: Sequence[Any]) -> Tensor:
        """The forward without a gradient in which ``f`` of block i takes ``cache=caches[i]``, as in decoding."""
        y1 = y2 = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        for block, cache in zip(self.blocks, caches, strict=True):
            y1, y2 = block(y1, y2, cache=cache)
        return self._merged(y1, y2, hidden.dtype)

    def _merged(self, y1: Tensor, y2: Tensor, dtype: torch.dtype) -> Tensor:
        merged = (y1 + y2) / 2 if self.merge == "mean" else torch.cat([y1, y2], dim=-1)
        return merged.to(dtype)

    def extra_repr(self) -> str:
        return f"merge={self.merge!r}"


class _Conditions(NamedTuple):
    """What must be alike when a block runs again: the seed of its random numbers, and autocast."""

    seed: int
    device: torch.device
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, device: torch.device) -> "_Conditions":
        kinds = {"cpu", device.type}
        states = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        )
        return cls(int(torch.randint(0, 2**62, ())), device, states)

    @contextmanager
    def of_part(self, part: int) -> Iterator[None]:
        """Inside, random numbers follow from the seed and ``part`` alone; outside none is used up."""
        devices = [self.device] if self.device.type == "cuda" else []
        with ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                # A cached cast of a weight would belong to the graph of another run.
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            stack.enter_context(torch.random.fork_rng(devices))
            # Not torch.manual_seed, which would also seed devices whose state is not restored.
            torch.default_generator.manual_seed(self.seed + part)
            for device in devices:
                torch.cuda.default_generators[device.index].manual_seed(self.seed + part)
            yield


class _SideArguments:
    """Positional and keyword arguments as a flat list of tensors and what to put between them."""

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self._values = [*args, *kwargs.values()]
        self._names, self._positional = list(kwargs), len(args)
        self._places = [i for i, value in enumerate(self._values) if isinstance(value, Tensor)]
        self.tensors = [self._values[i] for i in self._places]
        self._values = [None if isinstance(value, Tensor) else value for value in self._values]

    def filled(self, tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        values = list(self._values)
        for place, tensor in zip(self._places, tensors, strict=True):
            values[place] = tensor
        return values[: self._positional], dict(zip(self._names, values[self._positional :], strict=True))


def _run_reversibly(
    blocks: list[Any], stream: Tensor, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    side = _SideArguments(args, kwargs)
    # Parameters are inputs too: so their gradients reach hooks, data-parallel wrappers and torch.autograd.grad.
    parameters = [parameter for block in blocks for parameter in block.parameters() if parameter.requires_grad]
    unique = list(dict.fromkeys(parameters))
    conditions = _Conditions.now(stream.device)
    return _Reversible.apply(blocks, conditions, side, len(side.tensors), stream, *side.tensors, *unique)


class _Reversible(torch.autograd.Function):
    """(blocks, conditions, side arguments, number of side tensors, stream, side tensors..., parameters...)."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: list[ReversibleBlock],
        conditions: _Conditions,
        side: _SideArguments,
        side_count: int,
        stream: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        args, kwargs = side.filled(tensors[:side_count])
        y1 = y2 = stream
        for index, block in enumerate(blocks):
            with conditions.of_part(2 * index):
                y1 = y1 + block.f(y2, *args, **kwargs)
            with conditions.of_part(2 * index + 1):
                y2 = y2 + block.g(y1)
        ctx.blocks, ctx.conditions, ctx.side, ctx.side_count = blocks, conditions, side, side_count
        if not blocks:
            y1, y2 = stream.clone(), stream.clone()
        ctx.save_for_backward(y1, y2, *tensors)
        return y1, y2

    @staticmethod
    def backward(ctx: Any, grad1: Tensor, grad2: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph is True, expected False: ReversibleSequence can be differentiated once")
        y1, y2, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:]
        with torch.enable_grad():
            # Side tensors as leaves, so that a block's graph ends in them.
            sides = [
                tensor.detach().requires_grad_(need)
                for tensor, need in zip(tensors[: ctx.side_count], needed, strict=False)
            ]
        args, kwargs = ctx.side.filled(sides)
        leaves = [*sides, *tensors[ctx.side_count :]]
        sums: list[Tensor | None] = [None] * len(leaves)
        wanted = [index for index, need in enumerate(needed) if need]

        def pull_back(part: int, module: nn.Module, x: Tensor, cotangent: Tensor, *given: Any, **named: Any) -> Any:
            """``module(x)`` again, and what ``cotangent`` gives for x; what it gives for the leaves is added up."""
            x = x.detach().requires_grad_()
            with torch.enable_grad(), ctx.conditions.of_part(part):
                output = module(x, *given, **named)
            inputs = [x, *(leaves[index] for index in wanted)]
            gradients = torch.autograd.grad(output, inputs, cotangent.to(output.dtype), allow_unused=True)
            for index, gradient in zip(wanted, gradients[1:], strict=True):
                if gradient is not None:
                    total = sums[index]
                    sums[index] = gradient if total is None else total + gradient
            return output.detach(), gradients[0]

        for index in reversed(range(len(ctx.blocks))):
            block = ctx.blocks[index]
            output, gradient = pull_back(2 * index + 1, block.g, y1, grad2)
            y2 = y2 - output
            grad1 = grad1 if gradient is None else grad1 + gradient
            output, gradient = pull_back(2 * index, block.f, y2, grad1, *args, **kwargs)
            y1 = y1 - output
            grad2 = grad2 if gradient is None else grad2 + gradient
        return None, None, None, None, grad1 + grad2, *sums
