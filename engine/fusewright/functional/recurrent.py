"""The recurrent layers and cells of :mod:`fusewright.functional`, one documented function per op."""

from collections.abc import Sequence

from torch import Tensor

from fusewright_kernels.recurrent import op as _recurrent
from fusewright_kernels.recurrent.op import Weights as _Weights


def lstm(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    weight_hr: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer and one direction of a long short-term memory over whole sequences.

    The projection of the input, the recurrence and the gates are one op; the cell state is float32 throughout. Under
    autocast everything is taken in the low-precision type, as torch does.

    Args:
        input: (T, B, I), float32, bfloat16, float16 or float64 (float64, and on a GPU float32, by the plain formula).
        h0: (B, H), or (B, P) with ``weight_hr``; zeros if None. It gets a gradient, as has every floating argument.
        c0: (B, H); zeros if None.
        weight_ih: (4 H, I), gates in torch's order: input, forget, cell, output.
        weight_hh: (4 H, H), or (4 H, P) with ``weight_hr``.
        bias_ih, bias_hh: (4 H,), both or neither.
        weight_hr: (P, H): the hidden state is ``weight_hr (o tanh(c))``; on a GPU by the plain formula.
        lengths: (B,) int32 or int64 in [0, T]: from its end on a sample keeps its states and has output 0, whatever its
            input holds there.
        resets: (T, B) bool: where true, a sample's states are set to zero before that step.
        reverse: run from each sample's last step to its first.

    Returns:
        output (T, B, H or P), h_n (B, H or P) and c_n (B, H), in input's dtype; without steps h0 and c0.

    Source: Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget", 2000.
    """
    return _recurrent.recurrent(
        "lstm",
        input,
        h0,
        c0,
        _Weights(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr),
        lengths,
        resets,
        reverse,
        backend,
    )


def gru(
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer and one direction of gated recurrent units, the reset gate behind the product as in torch.

    Args:
        weight_ih, weight_hh: (3 H, I) and (3 H, H), gates in torch's order: reset, update, new.
        bias_ih, bias_hh: (3 H,), both or neither.

    The other arguments are those of :func:`lstm`.

    Returns:
        output (T, B, H) and h_n (B, H).

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014.
    """
    return _recurrent.recurrent(
        "gru", input, h0, None, _Weights(weight_ih, weight_hh, bias_ih, bias_hh), lengths, resets, reverse, backend
    )[:2]


def rnn_tanh(
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``h = tanh(weight_ih x + bias_ih + weight_hh h + bias_hh)``: one layer and one direction.

    Args:
        weight_ih, weight_hh: (H, I) and (H, H).
        bias_ih, bias_hh: (H,), both or neither.

    The other arguments are those of :func:`lstm`.

    Returns:
        output (T, B, H) and h_n (B, H).

    Source: Elman, "Finding structure in time", 1990.
    """
    return _recurrent.recurrent(
        "rnn_tanh", input, h0, None, _Weights(weight_ih, weight_hh, bias_ih, bias_hh), lengths, resets, reverse, backend
    )[:2]


def rnn_relu(
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`rnn_tanh` with max(x, 0) in place of tanh.

    Source: Le et al., "A simple way to initialize recurrent networks of rectified linear units", 2015.
    """
    return _recurrent.recurrent(
        "rnn_relu", input, h0, None, _Weights(weight_ih, weight_hh, bias_ih, bias_hh), lengths, resets, reverse, backend
    )[:2]


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`lstm`; a call of ``torch.lstm_cell`` works unchanged.

    Args:
        input: (B, I) or (I,).
        hx: h and c, each (B, H) or (H,); zeros if None.

    Returns:
        h and c after the step.
    """
    h, c = _recurrent.pair_of_states(hx)
    return _recurrent.recurrent_cell("lstm", input, h, c, _Weights(weight_ih, weight_hh, bias_ih, bias_hh), backend)


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of :func:`gru` on (B, I) or (I,), as :func:`lstm_cell`: h after it."""
    return _recurrent.recurrent_cell("gru", input, hx, None, _Weights(weight_ih, weight_hh, bias_ih, bias_hh), backend)[
        0
    ]


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of :func:`rnn_tanh` on (B, I) or (I,), as :func:`lstm_cell`: h after it."""
    return _recurrent.recurrent_cell(
        "rnn_tanh", input, hx, None, _Weights(weight_ih, weight_hh, bias_ih, bias_hh), backend
    )[0]


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of :func:`rnn_relu` on (B, I) or (I,), as :func:`lstm_cell`: h after it."""
    return _recurrent.recurrent_cell(
        "rnn_relu", input, hx, None, _Weights(weight_ih, weight_hh, bias_ih, bias_hh), backend
    )[0]
