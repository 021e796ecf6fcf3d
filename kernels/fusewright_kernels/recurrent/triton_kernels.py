"""Triton kernels of a single recurrent step: all that follows its two products, over M samples of N units.

Everything is contiguous, so that gate g of unit n of a sample is column g * N + n. Imports only where Triton is
installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_primitives import sigmoid, tanh, to_dtype

_NOT_SPECIALIZED = ["M"]


@triton.jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of this program, and which of them there are."""
    n_column_tiles = tl.cdiv(N, BLOCK_N)
    o_m = (tl.program_id(0) // n_column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) % n_column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return o_m[:, None], o_n[None, :], (o_m < M)[:, None] & (o_n < N)[None, :]


@triton.jit
def load(p_x, o_x, m_tile):
    return tl.load(p_x + o_x, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def store(p_x, o_x, b_x, m_tile):
    tl.store(p_x + o_x, to_dtype(b_x, p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def store_hidden(p_output, p_h_after, o_x, b_h, m_tile):
    store(p_output, o_x, b_h, m_tile)
    store(p_h_after, o_x, b_h, m_tile)


@triton.jit
def before_gate(p_product, p_bias, o_m, o_n, N, m_tile, gate: tl.constexpr, GATES: tl.constexpr):
    """A product's share of a gate before its activation."""
    b_sum = load(p_product, o_m * GATES * N + gate * N + o_n, m_tile)
    if p_bias is not None:
        b_sum += load(p_bias, gate * N + o_n, o_n < N)
    return b_sum


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def lstm_step_forward_kernel(
    p_from_input, p_from_hidden,  # [M, 4 * N]
    p_bias_ih, p_bias_hh,  # [4 * N] or None
    p_c,  # [M, N]
    p_output, p_h_after, p_c_after,  # [M, N]: the hidden state twice, and the cell state
    p_gates,  # [M, 4 * N] or None
    p_cells,  # float32 [M, N] or None
    M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m, o_n, m_tile = tile_of(M, N, BLOCK_M, BLOCK_N)
    b_i = before_gate(p_from_input, p_bias_ih, o_m, o_n, N, m_tile, 0, 4)
    b_f = before_gate(p_from_input, p_bias_ih, o_m, o_n, N, m_tile, 1, 4)
    b_g = before_gate(p_from_input, p_bias_ih, o_m, o_n, N, m_tile, 2, 4)
    b_o = before_gate(p_from_input, p_bias_ih, o_m, o_n, N, m_tile, 3, 4)
    b_i, _ = sigmoid(b_i + before_gate(p_from_hidden, p_bias_hh, o_m, o_n, N, m_tile, 0, 4))
    b_f, _ = sigmoid(b_f + before_gate(p_from_hidden, p_bias_hh, o_m, o_n, N, m_tile, 1, 4))
    b_g = tanh(b_g + before_gate(p_from_hidden, p_bias_hh, o_m, o_n, N, m_tile, 2, 4))
    b_o, _ = sigmoid(b_o + before_gate(p_from_hidden, p_bias_hh, o_m, o_n, N, m_tile, 3, 4))
    b_c = b_f * load(p_c, o_m * N + o_n, m_tile) + b_i * b_g
    store(p_c_after, o_m * N + o_n, b_c, m_tile)
    store_hidden(p_output, p_h_after, o_m * N + o_n, b_o * tanh(b_c), m_tile)
    if p_gates is not None:
        store(p_gates, o_m * 4 * N + o_n, b_i, m_tile)
        store(p_gates, o_m * 4 * N + N + o_n, b_f, m_tile)
        store(p_gates, o_m * 4 * N + 2 * N + o_n, b_g, m_tile)
        store(p_gates, o_m * 4 * N + 3 * N + o_n, b_o, m_tile)
        store(p_cells, o_m * N + o_n, b_c, m_tile)


@triton.jit
def grad_of_hidden(p_grad_output, p_grad_h, o_x, m_tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    b_grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if p_grad_output is not None:
        b_grad += load(p_grad_output, o_x, m_tile)
    if p_grad_h is not None:
        b_grad += load(p_grad_h, o_x, m_tile)
    return b_grad


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def lstm_step_backward_kernel(
    p_grad_output, p_grad_h, p_grad_c,  # [M, N] or None
    p_gates, p_cells, p_c,
    p_grad_gates,  # [M, 4 * N]
    p_grad_c_before,  # [M, N]
    M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m, o_n, m_tile = tile_of(M, N, BLOCK_M, BLOCK_N)
    b_dh = grad_of_hidden(p_grad_output, p_grad_h, o_m * N + o_n, m_tile, BLOCK_M, BLOCK_N)
    b_i = load(p_gates, o_m * 4 * N + o_n, m_tile)
    b_f = load(p_gates, o_m * 4 * N + N + o_n, m_tile)
    b_g = load(p_gates, o_m * 4 * N + 2 * N + o_n, m_tile)
    b_o = load(p_gates, o_m * 4 * N + 3 * N + o_n, m_tile)
    b_tanh = tanh(load(p_cells, o_m * N + o_n, m_tile))
    b_dc = b_dh * b_o * (1.0 - b_tanh * b_tanh)
    if p_grad_c is not None:
        b_dc += load(p_grad_c, o_m * N + o_n, m_tile)
    b_df = b_dc * load(p_c, o_m * N + o_n, m_tile) * b_f * (1.0 - b_f)
    store(p_grad_gates, o_m * 4 * N + o_n, b_dc * b_g * b_i * (1.0 - b_i), m_tile)
    store(p_grad_gates, o_m * 4 * N + N + o_n, b_df, m_tile)
    store(p_grad_gates, o_m * 4 * N + 2 * N + o_n, b_dc * b_i * (1.0 - b_g * b_g), m_tile)
    store(p_grad_gates, o_m * 4 * N + 3 * N + o_n, b_dh * b_tanh * b_o * (1.0 - b_o), m_tile)
    store(p_grad_c_before, o_m * N + o_n, b_dc * b_f, m_tile)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def gru_step_forward_kernel(
    p_from_input, p_from_hidden,  # [M, 3 * N]
    p_bias_ih, p_bias_hh,  # [3 * N] or None
    p_h,  # [M, N]
    p_output, p_h_after,  # [M, N]
    p_gates,  # [M, 4 * N] or None
    M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m, o_n, m_tile = tile_of(M, N, BLOCK_M, BLOCK_N)
    b_r = before_gate(p_from_input, p_bias_ih, o_m, o_n, N, m_tile, 0, 3)
    b_z = before_gate(p_from_input, p_bias_ih, o_m, o_n, N, m_tile, 1, 3)
    b_n = before_gate(p_from_input, p_bias_ih, o_m, o_n, N, m_tile, 2, 3)
    b_n_hidden = before_gate(p_from_hidden, p_bias_hh, o_m, o_n, N, m_tile, 2, 3)
    b_r, _ = sigmoid(b_r + before_gate(p_from_hidden, p_bias_hh, o_m, o_n, N, m_tile, 0, 3))
    b_z, _ = sigmoid(b_z + before_gate(p_from_hidden, p_bias_hh, o_m, o_n, N, m_tile, 1, 3))
    b_n = tanh(b_n + b_r * b_n_hidden)
    b_h = b_n + b_z * (load(p_h, o_m * N + o_n, m_tile) - b_n)
    store_hidden(p_output, p_h_after, o_m * N + o_n, b_h, m_tile)
    if p_gates is not None:
        store(p_gates, o_m * 4 * N + o_n, b_r, m_tile)
        store(p_gates, o_m * 4 * N + N + o_n, b_z, m_tile)
        store(p_gates, o_m * 4 * N + 2 * N + o_n, b_n, m_tile)
        store(p_gates, o_m * 4 * N + 3 * N + o_n, b_n_hidden, m_tile)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def gru_step_backward_kernel(
    p_grad_output, p_grad_h,  # [M, N] or None
    p_gates, p_h,
    p_grad_gates_ih, p_grad_gates_hh,  # [M, 3 * N], as the input and as the hidden state reaches them
    p_grad_h_past,  # [M, N]: of the hidden state before the step, past weight_hh
    M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m, o_n, m_tile = tile_of(M, N, BLOCK_M, BLOCK_N)
    b_dh = grad_of_hidden(p_grad_output, p_grad_h, o_m * N + o_n, m_tile, BLOCK_M, BLOCK_N)
    b_r = load(p_gates, o_m * 4 * N + o_n, m_tile)
    b_z = load(p_gates, o_m * 4 * N + N + o_n, m_tile)
    b_n = load(p_gates, o_m * 4 * N + 2 * N + o_n, m_tile)
    b_n_hidden = load(p_gates, o_m * 4 * N + 3 * N + o_n, m_tile)
    b_dn = b_dh * (1.0 - b_z) * (1.0 - b_n * b_n)
    b_dr = b_dn * b_n_hidden * b_r * (1.0 - b_r)
    b_dz = b_dh * (load(p_h, o_m * N + o_n, m_tile) - b_n) * b_z * (1.0 - b_z)
    store(p_grad_gates_ih, o_m * 3 * N + o_n, b_dr, m_tile)
    store(p_grad_gates_ih, o_m * 3 * N + N + o_n, b_dz, m_tile)
    store(p_grad_gates_ih, o_m * 3 * N + 2 * N + o_n, b_dn, m_tile)
    store(p_grad_gates_hh, o_m * 3 * N + o_n, b_dr, m_tile)
    store(p_grad_gates_hh, o_m * 3 * N + N + o_n, b_dz, m_tile)
    store(p_grad_gates_hh, o_m * 3 * N + 2 * N + o_n, b_dn * b_r, m_tile)
    store(p_grad_h_past, o_m * N + o_n, b_dh * b_z, m_tile)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def rnn_step_forward_kernel(
    p_from_input, p_from_hidden,  # [M, N]
    p_bias_ih, p_bias_hh,  # [N] or None
    p_output, p_h_after,  # [M, N]
    M, N,
    RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m, o_n, m_tile = tile_of(M, N, BLOCK_M, BLOCK_N)
    b_sum = before_gate(p_from_input, p_bias_ih, o_m, o_n, N, m_tile, 0, 1)
    b_sum += before_gate(p_from_hidden, p_bias_hh, o_m, o_n, N, m_tile, 0, 1)
    # NaN stays, as in torch: it is not less than anything.
    b_h = tl.where(b_sum < 0.0, 0.0, b_sum) if RELU else tanh(b_sum)
    store_hidden(p_output, p_h_after, o_m * N + o_n, b_h, m_tile)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def rnn_step_backward_kernel(
    p_grad_output, p_grad_h,  # [M, N] or None
    p_h_after,
    p_grad_gates,  # [M, N]
    M, N,
    RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m, o_n, m_tile = tile_of(M, N, BLOCK_M, BLOCK_N)
    b_dh = grad_of_hidden(p_grad_output, p_grad_h, o_m * N + o_n, m_tile, BLOCK_M, BLOCK_N)
    b_h = load(p_h_after, o_m * N + o_n, m_tile)
    b_grad = tl.where(b_h <= 0.0, 0.0, b_dh) if RELU else b_dh * (1.0 - b_h * b_h)
    store(p_grad_gates, o_m * N + o_n, b_grad, m_tile)
