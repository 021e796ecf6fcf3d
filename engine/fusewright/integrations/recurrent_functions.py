"""The functions that stand in for torch's recurrent ones, which torch.nn's modules call, while ours are enabled.

As everywhere here, a call that ours do not take, a wrong one included, goes to the function that was replaced.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from fusewright import functional
from fusewright.integrations.torch_functions import plain, torch_functions
from fusewright.nn.recurrent_layers import fused_layer, run_layers
from fusewright_kernels import dispatch

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _of_one_kind(tensors: Sequence[Any], family: str = "recurrent") -> bool:
    """Whether all are dense tensors of one device and one dtype that a kernel of ``family`` takes."""
    first = tensors[0]
    return (
        all(isinstance(tensor, Tensor) for tensor in tensors)
        and not has_torch_function(tensors)
        and plain(*tensors)
        and all(tensor.dtype is first.dtype and tensor.device == first.device for tensor in tensors)
        and dispatch.serves(family, dispatch.device_type(first), (first.dtype,), 3)
    )


def _layers_fit(
    cell: str,
    width: int,
    batch: int,
    states: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor]],
    directions: int = 1,
    projected: bool = False,
) -> bool:
    """Whether the shapes are those of whole layers."""
    rows, state = weights[0][1].shape
    hidden = rows // _GATES[cell]
    if rows == 0 or not (0 < state < hidden if projected else state == hidden):
        return False
    widths = (state, hidden)[: len(states)]
    if any(tensor.shape != (len(weights), batch, width) for tensor, width in zip(states, widths, strict=True)):
        return False
    for index, (weight_ih, weight_hh, *others) in enumerate(weights):
        inputs = width if index < directions else directions * state
        if weight_ih.shape != (rows, inputs) or weight_hh.shape != (rows, state):
            return False
        if projected and others.pop().shape != (state, hidden):
            return False
        if any(bias.shape != (rows,) for bias in others):
            return False
    return True


def _projected(states: Sequence[Tensor]) -> bool:
    """Whether an LSTM's states are those of a projection, by which torch tells it."""
    return len(states) == 2 and all(state.ndim > 0 for state in states) and states[0].shape[-1] != states[1].shape[-1]


def _packing_fits(data: Tensor, batch_sizes: Tensor) -> bool:
    if batch_sizes.dtype is not torch.int64 or batch_sizes.device.type != "cpu" or batch_sizes.ndim != 1:
        return False
    sizes = batch_sizes.tolist()
    return bool(sizes) and min(sizes) > 0 and sizes == sorted(sizes, reverse=True) and sum(sizes) == len(data)


def _layer_function(cell: str) -> Callable[..., Any]:
    """The stand-in of ``torch.lstm``, ``torch.gru``, ...: of padded and of packed sequences, as theirs."""
    states_of_cell = 2 if cell == "lstm" else 1

    def run(
        data: Tensor,
        batch_sizes: Tensor | None,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...] | None:
        """None: the call is torch's."""
        states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        directions = 2 if bidirectional else 1
        if len(states) != states_of_cell or not all(isinstance(state, Tensor) for state in states):
            return None
        projected = _projected(states)
        count = (4 if has_biases else 2) + projected
        if len(params) != num_layers * directions * count or num_layers < 1:
            return None
        family = "projected_recurrent" if projected else "recurrent"
        if not _of_one_kind((data, *states, *params), family) or data.numel() == 0 or not 0.0 <= dropout <= 1.0:
            return None
        weights = [params[at : at + count] for at in range(0, len(params), count)]
        packed = batch_sizes is not None
        if data.ndim != (2 if packed else 3) or any(weight.ndim != 2 for layer in weights for weight in layer[:2]):
            return None
        if batch_sizes is not None and not _packing_fits(data, batch_sizes):
            return None
        batch = int(batch_sizes[0]) if batch_sizes is not None else data.shape[0 if batch_first else 1]
        if not _layers_fit(cell, data.shape[-1], batch, states, weights, directions, projected):
            return None
        lengths: Tensor | None = None
        if batch_sizes is not None:
            data, lengths = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, -1)
        elif batch_first:
            data = data.transpose(0, 1)
        layer = fused_layer(cell, weights, projected, lengths)
        output, last = run_layers(layer, data, states, num_layers, bidirectional, dropout, train)
        if lengths is not None:
            output = torch._VF._pack_padded_sequence(output, lengths, False)[0]
        elif batch_first:
            output = output.transpose(0, 1)
        return output, *last

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        result = None
        if len(args) == 9 and not kwargs:
            # The packed call has batch sizes, a tensor, before the states, and no batch_first.
            if isinstance(args[3], (list, tuple)):
                result = run(*(*args, False)) if isinstance(args[1], Tensor) else None
            elif isinstance(args[2], (list, tuple)):
                result = run(args[0], None, *args[1:])
        return torch_functions[cell](*args, **kwargs) if result is None else result

    stand_in.__name__ = cell
    stand_in.__doc__ = f"As torch.{cell}."
    return stand_in


def _cell_function(cell: str) -> Callable[..., Any]:
    """The stand-in of ``torch.lstm_cell``, ``torch.gru_cell``, ..."""
    name = f"{cell}_cell"
    ours = getattr(functional, name)

    def fits(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> bool:
        states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        biases = (b_ih, b_hh) if b_ih is not None or b_hh is not None else ()
        if len(states) != (2 if cell == "lstm" else 1) or not _of_one_kind(
            (input, *states, w_ih, w_hh, *biases), "recurrent_cell"
        ):
            return False
        if any(tensor.ndim != 2 for tensor in (input, *states, w_ih, w_hh)) or input.numel() == 0:
            return False
        stacked = [state.unsqueeze(0) for state in states]
        return _layers_fit(cell, input.shape[1], len(input), stacked, [(w_ih, w_hh, *biases)])

    def stand_in(
        input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Any:
        function = ours if fits(input, hx, w_ih, w_hh, b_ih, b_hh) else torch_functions[name]
        return function(input, hx, w_ih, w_hh, b_ih, b_hh)

    stand_in.__name__ = name
    stand_in.__doc__ = f"As torch.{name}."
    return stand_in


STAND_INS: dict[str, Callable[..., Any]] = {
    **{cell: _layer_function(cell) for cell in _GATES},
    **{f"{cell}_cell": _cell_function(cell) for cell in _GATES},
}


def script_as_torchs() -> None:
    """Let TorchScript compile a call of a stand-in as the operator that it stands for."""
    for name, function in STAND_INS.items():
        torch.jit._builtins._register_builtin(function, f"aten::{name}")
