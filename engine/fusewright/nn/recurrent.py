"""LSTM, GRU and RNN: torch's modules of the same name on fused layers, and their cells."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusewright import functional
from fusewright.nn.recurrent_layers import Layer, fused_layer, one_by_one, run_layers
from fusewright_kernels.recurrent.op import Variation, Weights, varied_recurrent

State = Any  # a tensor; for an LSTM a pair of them


def _probability(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}, expected a probability, 0 to 1")
    return value


class _Layers(nn.RNNBase):
    """The forward that the three modules share: layers, directions, packing, dropout between layers; and their options
    beyond torch's.

    Args:
        weight_dropout: probability with which each element of weight_hh is dropped in a training forward, the same for
            all its steps (Merity et al., "Regularizing and optimizing LSTM language models", 2018). By the fused
            layers.
        zoneout: probability with which an element of a state keeps its value over a step, in evaluation the mean
            (Krueger et al., "Zoneout", 2017); a pair for an LSTM's hidden and cell state. By the plain formula.
        layer_norm: normalise the two products before the gates, and an LSTM's cell state before its tanh, with gains
            ``gain_ih``, ``gain_hh`` and ``gain_cell`` and a ``bias_cell``, each with the layer's suffix (Ba et al.,
            "Layer normalization", 2016). By the plain formula.
    """

    def __init__(
        self,
        mode: str,
        *args: Any,
        weight_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        layer_norm: bool = False,
        peephole: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(mode, *args, **kwargs)
        self.weight_dropout = _probability("weight_dropout", weight_dropout)
        pair = zoneout if isinstance(zoneout, tuple) else (zoneout,) * (2 if mode == "LSTM" else 1)
        if len(pair) != (2 if mode == "LSTM" else 1):
            raise ValueError(f"zoneout is {zoneout}, expected a probability, or for an LSTM a pair of them")
        self.zoneout = tuple(_probability("zoneout", value) for value in pair)
        self.layer_norm, self.peephole = layer_norm, peephole
        sizes: dict[str, tuple[int, ...]] = {}
        weight = self._parameters["weight_hh_l0"]
        assert weight is not None
        rows = weight.shape[0]
        if layer_norm:
            sizes |= {"gain_ih": (rows,), "gain_hh": (rows,)}
            if mode == "LSTM":
                sizes |= {"gain_cell": (self.hidden_size,), "bias_cell": (self.hidden_size,)}
        if peephole:
            sizes["peephole"] = (3, self.hidden_size)
        self._extras = tuple(sizes)
        for suffix in self._suffixes():
            for name, size in sizes.items():
                self.register_parameter(f"{name}{suffix}", nn.Parameter(weight.new_empty(size)))
        self._reset_options()

    def _suffixes(self) -> list[str]:
        return [names[0].removeprefix("weight_ih") for names in self._all_weights]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_options()

    def _reset_options(self) -> None:
        for name, parameter in self.named_parameters():
            if name.startswith("gain_"):
                nn.init.ones_(parameter)
            elif name.startswith("bias_cell"):
                nn.init.zeros_(parameter)
            elif name.startswith("peephole"):
                nn.init.uniform_(parameter, -(self.hidden_size**-0.5), self.hidden_size**-0.5)

    @property
    def _varied(self) -> bool:
        return self.layer_norm or self.peephole or any(self.zoneout)

    def _weights(self) -> list[list[Tensor]]:
        weights = [[getattr(self, name) for name in names] for names in self._all_weights]
        if self.weight_dropout > 0.0:
            for own in weights:
                own[1] = nn.functional.dropout(own[1], self.weight_dropout, self.training)
        return weights

    def _varied_layer(self, lengths: Tensor | None, resets: Tensor | None) -> Layer:
        weights, suffixes = self._weights(), self._suffixes()

        def direction(index: int, input: Tensor, states: tuple[Tensor, ...], reverse: bool) -> tuple[Tensor, ...]:
            extras: dict[str, Any] = {name: getattr(self, name + suffixes[index]) for name in self._extras}
            variation = Variation(**extras, zoneout_hidden=self.zoneout[0], zoneout_cell=self.zoneout[-1])
            return varied_recurrent(
                self.mode.lower(), variation, self.training, input, states[0], states[1] if len(states) > 1 else None,
                Weights.listed(weights[index], self.proj_size > 0), lengths, resets, reverse,
            )  # fmt: skip

        return one_by_one(direction)

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
            states = self._states(hx)
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
            states = self._states(hx)
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
        self, input: Tensor, states: tuple[Tensor, ...], lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers on (T, B, I): the output and the last states, each stacked over layers and directions."""
        if self._varied:
            layer = self._varied_layer(lengths, resets)
        else:
            layer = fused_layer(self.mode.lower(), self._weights(), self.proj_size > 0, lengths, resets)
        return run_layers(layer, input, states, self.num_layers, self.bidirectional, self.dropout, self.training)

    def _zeros(self, input: Tensor, batch: int) -> tuple[Tensor, ...]:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        h = input.new_zeros((layers, batch, self.proj_size or self.hidden_size))
        return (h, input.new_zeros((layers, batch, self.hidden_size))) if self.mode == "LSTM" else (h,)

    def _states(self, hx: State) -> tuple[Tensor, ...]:
        if self.mode != "LSTM":
            return (hx,)
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")  # as torch words it
        return tuple(hx)

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
    """:class:`torch.nn.LSTM` on fused layers: its constructor, ``state_dict`` and forward, plus keywords.

    Args:
        weight_dropout, zoneout, layer_norm: see :class:`_Layers`.
        peephole: let the input and forget gates see the cell state before a step and the output gate the one after it,
            each element its own, by ``peephole`` (3, H) with the layer's suffix (Gers and Schmidhuber, "Recurrent nets
            that time and count", 2000). By the plain formula.
    """

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(_Layers):
    """:class:`torch.nn.GRU` on fused layers: its constructor, ``state_dict`` and forward, plus keywords.

    Args:
        weight_dropout, zoneout, layer_norm: see :class:`_Layers`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_lstm_options(kwargs)
        super().__init__("GRU", *args, **kwargs)


class RNN(_Layers):
    """:class:`torch.nn.RNN` on fused layers: its constructor, ``state_dict`` and forward, plus keywords.

    Args:
        weight_dropout, zoneout, layer_norm: see :class:`_Layers`.
        identity_init: begin with weight_hh the identity, biases 0 and weight_ih normal of deviation 0.001, for
            nonlinearity ``"relu"`` (Le et al., "A simple way to initialize recurrent networks of rectified linear
            units", 2015).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        *args: Any,
        identity_init: bool = False,
        **kwargs: Any,
    ) -> None:
        _refuse_lstm_options(kwargs)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        if identity_init and nonlinearity != "relu":
            raise ValueError(f"identity_init is True, expected False with nonlinearity '{nonlinearity}'")
        self.nonlinearity, self.identity_init = nonlinearity, identity_init
        super().__init__(f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, *args, **kwargs)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if not self.identity_init:
            return
        for name, parameter in self.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.eye_(parameter)
            elif name.startswith("weight_ih"):
                nn.init.normal_(parameter, 0.0, 0.001)
            elif name.startswith(("bias_ih", "bias_hh")):
                nn.init.zeros_(parameter)


def _refuse_lstm_options(options: dict[str, Any]) -> None:
    if "proj_size" in options:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    if "peephole" in options:
        raise ValueError("peephole is given, expected for an LSTM only")


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
        _check_cell(self, input, () if hx is None else tuple(hx))
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
