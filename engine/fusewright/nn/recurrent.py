"""LSTM, GRU and RNN: torch's modules of the same name on fused layers, and their cells."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusewright import functional

State = Any  # a tensor; for an LSTM a pair of them


class _Layers(nn.RNNBase):
    """The forward that the three modules share: layers, directions, packing, dropout between layers."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, State]:
        """As torch.nn's, and:

        Args:
            lengths: (B,) int32 or int64: a sample's steps; see :func:`fusewright.functional.lstm`.
            resets: bool, (T, B), (B, T) if ``batch_first``, or (T,): where true, the states of every layer are set to
                zero before the step, seen from each direction's own start.
        """
        if isinstance(input, PackedSequence):
            if lengths is not None or resets is not None:
                raise ValueError("lengths and resets are given, expected None where input is a PackedSequence")
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            what = " tensor" if self.mode.startswith("RNN") else ""  # as torch words it
            raise ValueError(f"{self._get_name()}: Expected input to be 2D or 3D, got {input.dim()}D{what} instead")
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
            resets = None if resets is None else resets.unsqueeze(batch_dim)
        if hx is None:
            states = self._zeros(input, input.size(batch_dim))
        else:
            states = tuple(hx) if self.mode == "LSTM" else (hx,)
            self._check_rank(states, batched)
            states = states if batched else tuple(state.unsqueeze(1) for state in states)
        given: Any = states if self.mode == "LSTM" else states[0]
        self.check_forward_args(input, given, None)
        if self.batch_first:
            input = input.transpose(0, 1)
            resets = None if resets is None else resets.transpose(0, 1)
        output, states = self._run(input, states, lengths, resets)
        if self.batch_first:
            output = output.transpose(0, 1)
        if not batched:
            output, states = output.squeeze(batch_dim), tuple(state.squeeze(1) for state in states)
        return output, states if self.mode == "LSTM" else states[0]

    def _forward_packed(self, packed: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        batch = int(batch_sizes[0])
        if hx is None:
            states = self._zeros(data, batch)
        else:
            states = tuple(hx) if self.mode == "LSTM" else (hx,)
            # Sequences are packed by length; the states come in the caller's order.
            if sorted_indices is not None:
                states = tuple(state.index_select(1, sorted_indices) for state in states)
        given: Any = states if self.mode == "LSTM" else states[0]
        self.check_forward_args(data, given, batch_sizes)
        padded, lengths = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, -1)
        output, states = self._run(padded, states, lengths, None)
        output, _ = torch._VF._pack_padded_sequence(output, lengths, False)
        if unsorted_indices is not None:
            states = tuple(state.index_select(1, unsorted_indices) for state in states)
        result = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return result, states if self.mode == "LSTM" else states[0]

    def _run(
        self, output: Tensor, states: tuple[Tensor, ...], lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers on (T, B, I): the output and the last states, each stacked over layers and directions."""
        function = getattr(functional, self.mode.lower())
        directions = 2 if self.bidirectional else 1
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0.0:
                output = nn.functional.dropout(output, self.dropout, self.training)
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                weights = [getattr(self, name) for name in self._all_weights[index]]
                keywords = {"weight_hr": weights.pop()} if self.proj_size > 0 else {}
                result, *after = function(
                    output, *(state[index] for state in states), *weights,
                    lengths=lengths, resets=resets, reverse=direction == 1, **keywords,
                )  # fmt: skip
                outputs.append(result)
                last.append(tuple(after))
            output = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        return output, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def _zeros(self, input: Tensor, batch: int) -> tuple[Tensor, ...]:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        h = input.new_zeros((layers, batch, self.proj_size or self.hidden_size))
        return (h, input.new_zeros((layers, batch, self.hidden_size))) if self.mode == "LSTM" else (h,)

    def _check_rank(self, states: tuple[Tensor, ...], batched: bool) -> None:
        expected = 3 if batched else 2
        if any(state.dim() != expected for state in states):
            kind = "batched 3-D" if batched else "unbatched 2-D"
            names, got = "hx", f"{states[0].dim()}-D tensor"
            if self.mode == "LSTM":
                names, got = "hx and cx", f"({states[0].dim()}-D, {states[1].dim()}-D) tensors"
            raise RuntimeError(f"For {kind} input, {names} should also be {expected}-D but got {got}")


# Subclasses of torch.nn.RNNBase and not of its three: torch.compile refuses those and what is derived from them.


class LSTM(_Layers):
    """:class:`torch.nn.LSTM` on fused layers: its constructor, ``state_dict`` and forward, plus keywords."""

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(_Layers):
    """:class:`torch.nn.GRU` on fused layers: its constructor, ``state_dict`` and forward, plus keywords."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        super().__init__("GRU", *args, **kwargs)


class RNN(_Layers):
    """:class:`torch.nn.RNN` on fused layers: its constructor, ``state_dict`` and forward, plus keywords."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        _refuse_projection(kwargs)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, *args, **kwargs)


def _refuse_projection(options: dict[str, Any]) -> None:
    if "proj_size" in options:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def _check_cell(cell: nn.RNNCellBase, input: Tensor, states: tuple[Tensor, ...]) -> None:
    """The errors that torch's cells raise for inputs and states of a wrong rank."""
    name = type(cell).__name__
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    for index, state in enumerate(states):
        if state.dim() not in (1, 2):
            which = f"hx[{index}]" if isinstance(cell, nn.LSTMCell) else "hidden"
            raise ValueError(f"{name}: Expected {which} to be 1D or 2D, got {state.dim()}D instead")


class LSTMCell(nn.LSTMCell):
    """:class:`torch.nn.LSTMCell` on a fused step."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        _check_cell(self, input, tuple(hx or ()))
        return functional.lstm_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class GRUCell(nn.GRUCell):
    """:class:`torch.nn.GRUCell` on a fused step."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        _check_cell(self, input, () if hx is None else (hx,))
        return functional.gru_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class RNNCell(nn.RNNCell):
    """:class:`torch.nn.RNNCell` on a fused step."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        _check_cell(self, input, () if hx is None else (hx,))
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        function = functional.rnn_tanh_cell if self.nonlinearity == "tanh" else functional.rnn_relu_cell
        return function(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
