"""Recurrent layers as plain PyTorch: oracle in float64, naive baseline, last fallback.

Computed in at least float32 throughout, and rounded once to the input's dtype. Arguments as in the op's schema.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# One step's states before it, its gates after their activation, and its cell state and hidden state after it, the
# latter before its projection.
Step = dict[str, Tensor]


def recurrent(
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output (T, B, H or P), h_n (B, H or P) and the LSTM's c_n (B, H)."""
    tensors = wide(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    outputs, h_n, c_n, _ = _run(*(*tensors, lengths, resets, cell, reverse))
    output = torch.stack(outputs) if outputs else input.new_empty((0, *h0.shape))
    return output.to(input.dtype), h_n.to(input.dtype), None if c_n is None else c_n.to(input.dtype)


def recurrent_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of input, h0, c0, the two weights, the two biases and weight_hr; None for what is absent."""
    differentiable = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    tensors = wide(*differentiable)
    wide_h0, wide_hr = tensors[1], tensors[7]
    steps = _run(*(*tensors, lengths, resets, cell, reverse))[3]
    grads = wide(grad_output, grad_h_n, grad_c_n)
    dh = torch.zeros_like(wide_h0) if grads[1] is None else grads[1]
    dc = None
    if c0 is not None:
        dc = torch.zeros_like(tensors[2]) if grads[2] is None else grads[2]
    zero = wide_h0.new_zeros(())
    d_input: list[Tensor] = []
    d_ih, d_hh = torch.zeros_like(tensors[3]), torch.zeros_like(tensors[4])
    d_hr = None if wide_hr is None else torch.zeros_like(wide_hr)
    d_bias_ih, d_bias_hh = (tensors[3].new_zeros(tensors[3].shape[0]) for _ in range(2))
    for t, step in zip(reversed(order(len(steps), reverse)), reversed(steps), strict=True):
        active, reset = masks(t, lengths, resets)
        dh_out = dh if grads[0] is None else dh + grads[0][t]
        d_now = dh_out if active is None else torch.where(active, dh_out, zero)
        if d_hr is not None:
            d_hr = d_hr + d_now.mT @ step["unprojected"]
            d_now = d_now @ wide_hr
        dc_now = dc if active is None or dc is None else torch.where(active, dc, zero)
        da_ih, da_hh, dh_before, dc_before = _step_backward(cell, step, d_now, dc_now)
        d_input.append(da_ih @ tensors[3])
        d_ih, d_hh = d_ih + da_ih.mT @ step["input"], d_hh + da_hh.mT @ step["hidden"]
        d_bias_ih, d_bias_hh = d_bias_ih + da_ih.sum(0), d_bias_hh + da_hh.sum(0)
        dh_before = dh_before + da_hh @ tensors[4]
        if reset is not None:
            dh_before = torch.where(reset, zero, dh_before)
            dc_before = None if dc_before is None else torch.where(reset, zero, dc_before)
        # A sample that does not take the step hands its gradient on; its output here is a constant.
        dh = dh_before if active is None else torch.where(active, dh_before, dh)
        if dc is not None and dc_before is not None:
            dc = dc_before if active is None else torch.where(active, dc_before, dc)
    if not reverse:
        d_input.reverse()
    grad_input = torch.stack(d_input) if d_input else torch.zeros_like(input)
    results = (
        grad_input, dh, dc, d_ih, d_hh,
        None if bias_ih is None else d_bias_ih, None if bias_hh is None else d_bias_hh, d_hr,
    )  # fmt: skip
    return tuple(None if result is None else result.to(input.dtype) for result in results)


def wide(*tensors: Tensor | None) -> list:
    """Each in at least float32."""
    return [
        None if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors
    ]


def order(steps: int, reverse: bool) -> Sequence[int]:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def masks(t: int, lengths: Tensor | None, resets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Which samples take step ``t`` and which of them start it from zero, (B, 1) or None for all and for none."""
    active = None if lengths is None else (lengths > t).unsqueeze(1)
    reset = None if resets is None else resets[t].unsqueeze(1)
    return active, reset if active is None or reset is None else reset & active


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = input @ weight.mT
    return product if bias is None else product + bias


def _run(
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[list[Tensor], Tensor, Tensor | None, list[Step]]:
    """The outputs by time, the last states, and the steps in the order they were taken."""
    h, c = h0, c0
    zero = input.new_zeros(())
    outputs: list[Tensor] = []
    steps: list[Step] = []
    for t in order(input.shape[0], reverse):
        active, reset = masks(t, lengths, resets)
        # What stands behind a sample's end may be NaN, which no product may meet, not even with a zero.
        x = input[t] if active is None else torch.where(active, input[t], zero)
        hidden = h if reset is None else torch.where(reset, zero, h)
        step = {"input": x, "hidden": hidden}
        if c is not None:
            step["cell_before"] = c if reset is None else torch.where(reset, zero, c)
        after = take_step(cell, _linear(x, weight_ih, bias_ih), _linear(hidden, weight_hh, bias_hh), step)
        if weight_hr is not None:
            step["unprojected"] = after
            after = after @ weight_hr.mT
        outputs.append(after if active is None else torch.where(active, after, zero))
        h = after if active is None else torch.where(active, after, h)
        if c is not None:
            c = step["cell"] if active is None else torch.where(active, step["cell"], c)
        steps.append(step)
    if reverse:
        outputs.reverse()
    return outputs, h, c, steps


def take_step(cell: str, from_input: Tensor, from_hidden: Tensor, step: Step) -> Tensor:
    """The hidden state after a step, before any projection; what the backward needs goes into ``step``."""
    if cell == "lstm":
        i, f, g, o = (from_input + from_hidden).chunk(4, 1)
        step["i"], step["f"], step["g"], step["o"] = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        step["cell"] = step["f"] * step["cell_before"] + step["i"] * step["g"]
        return step["o"] * step["cell"].tanh()
    if cell == "gru":
        (r_in, z_in, n_in), (r_hidden, z_hidden, n_hidden) = from_input.chunk(3, 1), from_hidden.chunk(3, 1)
        step["r"], step["z"], step["n_hidden"] = (r_in + r_hidden).sigmoid(), (z_in + z_hidden).sigmoid(), n_hidden
        step["n"] = (n_in + step["r"] * n_hidden).tanh()
        return step["n"] + step["z"] * (step["hidden"] - step["n"])
    before = from_input + from_hidden
    step["after"] = before.tanh() if cell == "rnn_tanh" else before.relu()
    return step["after"]


def _step_backward(
    cell: str, step: Step, dh: Tensor, dc: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the gates before their activation, as the input and as the hidden state reach them; what reaches
    the hidden state before the step past weight_hh; and that of the cell state before it.
    """
    if cell == "lstm":
        i, f, g, o = step["i"], step["f"], step["g"], step["o"]
        tanh_cell = step["cell"].tanh()
        through = dh * o * (1.0 - tanh_cell * tanh_cell)
        dc = through if dc is None else dc + through
        gates = torch.cat(
            [
                dc * g * i * (1.0 - i),
                dc * step["cell_before"] * f * (1.0 - f),
                dc * i * (1.0 - g * g),
                dh * tanh_cell * o * (1.0 - o),
            ],
            1,
        )
        return gates, gates, torch.zeros_like(step["hidden"]), dc * f
    if cell == "gru":
        r, z, n = step["r"], step["z"], step["n"]
        dn = dh * (1.0 - z) * (1.0 - n * n)
        dr, dz = dn * step["n_hidden"] * r * (1.0 - r), dh * (step["hidden"] - n) * z * (1.0 - z)
        return torch.cat([dr, dz, dn], 1), torch.cat([dr, dz, dn * r], 1), dh * z, None
    after = step["after"]
    gate = dh * (1.0 - after * after) if cell == "rnn_tanh" else torch.where(after > 0.0, dh, torch.zeros_like(dh))
    return gate, gate, torch.zeros_like(step["hidden"]), None
