"""Recurrent layers with layer-normalised gates, peepholes or zoneout, as plain PyTorch: no kernel serves these.

Computed in at least float32 throughout, and rounded once to the input's dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusewright_kernels.recurrent import reference
from fusewright_kernels.recurrent.layer import Weights

_EPS = 1e-5


_TENSORS = ("gain_ih", "gain_hh", "gain_cell", "bias_cell", "peephole")


class Variation(NamedTuple):
    """What a layer has beside its weights; None or 0 for what it does not have."""

    gain_ih: Tensor | None = None  # (G * H,), of the normalised product with the input
    gain_hh: Tensor | None = None  # (G * H,), of that with the hidden state
    gain_cell: Tensor | None = None  # (H,), of an LSTM's cell state on its way to the hidden state
    bias_cell: Tensor | None = None  # (H,)
    peephole: Tensor | None = None  # (3, H): from the cell state to an LSTM's input, forget and output gates
    zoneout_hidden: float = 0.0
    zoneout_cell: float = 0.0


def run(
    variation: Variation,
    training: bool,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output (T, B, H or P), h_n and an LSTM's c_n; arguments as in the op's schema."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    variation = variation._replace(**{name: reference.wide(getattr(variation, name))[0] for name in _TENSORS})
    h, c, w_ih, w_hh, b_ih, b_hh, w_hr = reference.wide(h0, c0, *weights)
    zero = h.new_zeros(())
    outputs: list[Tensor] = []
    for t in reference.order(input.shape[0], reverse):
        active, reset = reference.masks(t, lengths, resets)
        # What stands behind a sample's end may be NaN, which no product may meet, not even with a zero.
        x = input[t].to(dtype) if active is None else torch.where(active, input[t].to(dtype), zero)
        hidden = h if reset is None else torch.where(reset, zero, h)
        before = c if reset is None or c is None else torch.where(reset, zero, c)
        from_input = _linear(x, w_ih, variation.gain_ih, b_ih)
        from_hidden = _linear(hidden, w_hh, variation.gain_hh, b_hh)
        cell_after: Tensor | None = None
        if before is None:
            after = reference.take_step(cell, from_input, from_hidden, {"hidden": hidden})
        else:
            after, cell_after = _lstm_step(variation, from_input + from_hidden, before, training)
        if w_hr is not None:
            after = after @ w_hr.mT
        after = _zoneout(after, hidden, variation.zoneout_hidden, training)
        outputs.append(after if active is None else torch.where(active, after, zero))
        h = after if active is None else torch.where(active, after, h)
        if c is not None and cell_after is not None:
            c = cell_after if active is None else torch.where(active, cell_after, c)
    if reverse:
        outputs.reverse()
    output = torch.stack(outputs) if outputs else input.new_empty((0, *h0.shape))
    return output.to(input.dtype), h.to(input.dtype), None if c is None else c.to(input.dtype)


def _linear(input: Tensor, weight: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    product = input @ weight.mT
    if gain is not None:
        product = torch.nn.functional.layer_norm(product, product.shape[-1:], gain, None, _EPS)
    return product if bias is None else product + bias


def _lstm_step(variation: Variation, gates: Tensor, before: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """The hidden state, before any projection, and the cell state after a step."""
    i, f, g, o = gates.chunk(4, 1)
    if variation.peephole is not None:
        i, f = i + variation.peephole[0] * before, f + variation.peephole[1] * before
    after = f.sigmoid() * before + i.sigmoid() * g.tanh()
    after = _zoneout(after, before, variation.zoneout_cell, training)
    if variation.peephole is not None:
        o = o + variation.peephole[2] * after
    shown = after
    if variation.gain_cell is not None:
        shown = torch.nn.functional.layer_norm(after, after.shape[-1:], variation.gain_cell, variation.bias_cell, _EPS)
    return o.sigmoid() * shown.tanh(), after


def _zoneout(after: Tensor, before: Tensor, probability: float, training: bool) -> Tensor:
    """``before`` with that probability, each element for itself; in evaluation the mean of both."""
    if probability == 0.0:
        return after
    if not training:
        return after + probability * (before - after)
    return torch.where(torch.rand_like(after) < probability, before, after)
