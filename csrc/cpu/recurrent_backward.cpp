// Backward of a recurrent layer through its steps: what one member of a team does. Gradients of the weights and of the
// input are products over all steps at once and not made here.
//
// Each member owns blocks of units. Of every step, the last first, it forms its units' gradient of the hidden state, a
// product of all gate gradients of the step behind with its columns of weight_hh, then its own gate gradients. Where
// the hidden state is projected, its gradient is shared out in blocks of its own, and one more product leads to the
// units.

#include "fusewright/cpu/activations.h"
#include "fusewright/cpu/recurrent/layer.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

template <class T, RecurrentCell Cell>
class Backward {
  using Shape = CellShape<Cell>;
  static constexpr bool is_lstm = Cell == RecurrentCell::lstm, is_gru = Cell == RecurrentCell::gru;
  static constexpr bool precise = is_float<T>;
  // Columns of gate gradients, in widths of the hidden state.
  static constexpr int64_t parts = gradient_columns(Cell);

 public:
  Backward(const RecurrentBackwardParams& params, Team* team, int64_t member, int64_t members, Arena& arena)
      : params_(params),
        team_(team),
        member_(member),
        own_(blocks_of(params.hidden, member, members)),
        own_states_(blocks_of(params.state, member, members)) {
    const int64_t gate_gradients = Shape::gates * params.hidden;
    weight_hh_ = arena.floats(params.single_step() ? 0 : panel_floats<T>(own_states_.count(), gate_gradients));
    weight_hr_ = arena.floats(params.projected() ? panel_floats<T>(own_.count(), params.state) : 0);
    totals_ = arena.floats(own_.count() * parts * lanes);
    product_ = arena.floats(recurrent_row_block * panel_columns);
  }

  void run() {
    if (params_.hidden_gradients != nullptr) return finish();
    pack();
    memset(totals_, 0, own_.count() * parts * lanes * sizeof(float));
    [[maybe_unused]] const TileSession session;
    for (int64_t step = params_.steps - 1; step >= 0; --step) {
      if (step + 1 < params_.steps) team_->wait(member_);
      if (params_.projected()) {
        add_up_states(step);
        team_->wait(member_);
        for_each_panel(
            own_, params_.active[step], params_.active[step],
            [&](Part part) {
              multiply(part, params_.state, grad_states_row(step, part.row), params_.grad_states_stride, weight_hr_);
            },
            [&](Part part) { take_step(step, part); });
      } else {
        for_each_panel(
            own_, params_.active[step], rows_behind(step), [&](Part part) { multiply_behind(step, part); },
            [&](Part part) { take_step(step, part); });
      }
    }
    if (params_.grad_h0 != nullptr && (!params_.single_step() || params_.steps == 0)) finish();
    for (int64_t b = 0; b < own_.count(); ++b) {
      for (int64_t part = 0; part < parts; ++part) {
        store_units(params_.bias_sums + part * params_.hidden + (own_.begin + b) * lanes,
                    load(totals_ + (b * parts + part) * lanes), elements_of(own_.begin + b, params_.hidden));
      }
    }
  }

 private:
  void pack() {
    if (!params_.single_step()) {
      pack_own(weight_hh_, params_.weight_hh, Shape::gates * params_.hidden, own_states_, params_.state);
    }
    if (params_.projected()) pack_own(weight_hr_, params_.weight_hr, params_.state, own_, params_.hidden);
  }

  // The columns of blocks `own` of a (rows, width) weight.
  static void pack_own(float* packed, const void* weight, int64_t rows, Blocks own, int64_t width) {
    const int64_t first = own.begin * lanes, end = own.end * lanes < width ? own.end * lanes : width;
    pack_columns<T>(packed, rows, first, end - first,
                    [=](int64_t k) { return static_cast<const T*>(weight) + k * width; });
  }

  // The gradients of the states before the first step.
  void finish() {
    if (params_.steps > 0) team_->wait(member_);
    const auto write_hidden = [&](Part part) {
      for_each_block(part, [&](int64_t position, int64_t b, const float* product) {
        write_first(params_.grad_h0, params_.state, position, own_states_.begin + b,
                    hidden_behind(-1, position, own_states_.begin + b, product));
      });
    };
    for_each_panel(
        own_states_, params_.batch, rows_behind(-1), [&](Part part) { multiply_behind(-1, part); }, write_hidden);
    if constexpr (is_lstm) {
      for (int64_t position = 0; position < params_.batch; ++position) {
        for (int64_t block = own_.begin; block < own_.end; ++block) {
          write_first(params_.grad_c0, params_.hidden, position, block, cell_behind(-1, position, block));
        }
      }
    }
  }

  void write_first(void* gradient, int64_t width, int64_t position, int64_t block, Float value) const {
    store_units(static_cast<T*>(gradient) + params_.samples[position] * width + block * lanes, value,
                elements_of(block, width));
  }

  // Gate gradients of a step and a position.
  Stored<T>* grad_row(int64_t step, int64_t position) const {
    return static_cast<Stored<T>*>(params_.grad_gates) +
           (params_.first_row[step] + position) * params_.grad_gates_stride;
  }

  Stored<T>* grad_states_row(int64_t step, int64_t position) const {
    return static_cast<Stored<T>*>(params_.grad_states) +
           (params_.first_row[step] + position) * params_.grad_states_stride;
  }

  // Rows of a step, positions from `row` on, by blocks of those that a member owns, from the `block`th on.
  struct Part {
    int64_t row, rows, block, blocks;
  };

  // Calls visit(part) for all positions below `count` and every block, after multiply(part) for those of its rows that
  // lie below `product_count`; a product lies in product_, by rows of panel_columns.
  template <class Multiply, class Visit>
  void for_each_panel(Blocks own, int64_t count, int64_t product_count, Multiply multiply, Visit visit) {
    // Blocks outside, so that their weights, which may come from far, serve all rows.
    for (int64_t b = 0; b < own.count(); b += panel_vectors) {
      const int64_t left = own.count() - b, blocks = left < panel_vectors ? left : panel_vectors;
      for (int64_t first = 0; first < count; first += recurrent_row_block) {
        const int64_t rest = count - first, rows = rest < recurrent_row_block ? rest : recurrent_row_block;
        const int64_t product_rows = product_count - first < rows ? product_count - first : rows;
        if (product_rows > 0) multiply(Part{first, product_rows, b, blocks});
        visit(Part{first, rows, b, blocks});
      }
    }
  }

  // Calls visit(position, block, product) for all of a part.
  template <class Visit>
  void for_each_block(Part part, Visit visit) const {
    for (int64_t r = 0; r < part.rows; ++r) {
      for (int64_t i = 0; i < part.blocks; ++i) {
        visit(part.row + r, part.block + i, product_ + r * panel_columns + i * lanes);
      }
    }
  }

  void multiply(Part part, int64_t elements, const Stored<T>* left, int64_t stride, float* packed) {
    const LeftOperand rows{left, stride * static_cast<int64_t>(sizeof(Stored<T>)), 4};
    panel_product<T>(part.rows, elements, rows, packed, part.block, part.blocks, {product_, panel_columns});
  }

  // Positions whose hidden state behind a step goes on into the next one.
  int64_t rows_behind(int64_t step) const { return step + 1 < params_.steps ? params_.active[step + 1] : 0; }

  // The gradient of the hidden state behind a step by way of the next one.
  void multiply_behind(int64_t step, Part part) {
    if (params_.hidden_gradients != nullptr) return read_hidden_gradients(part);
    multiply(part, Shape::gates * params_.hidden, grad_row(step + 1, part.row), params_.grad_gates_stride, weight_hh_);
  }

  void read_hidden_gradients(Part part) {
    const Stored<T>* source = static_cast<const Stored<T>*>(params_.hidden_gradients);
    for (int64_t r = 0; r < part.rows; ++r) {
      for (int64_t i = 0; i < part.blocks; ++i) {
        const int64_t block = own_states_.begin + part.block + i;
        store(product_ + r * panel_columns + i * lanes,
              load_units(source + (part.row + r) * params_.state + block * lanes, elements_of(block, params_.state)));
      }
    }
  }

  // What reaches the hidden state behind a step, from the next one or as the gradient of the last state.
  Float hidden_behind(int64_t step, int64_t position, int64_t block, const float* from_next) const {
    if (step + 1 == params_.lengths[position]) return of_last(params_.grad_h_n, params_.state, position, block);
    if (params_.reset_before(step + 1, position)) return Float{};
    if constexpr (is_gru) return load(from_next) + load(carry(position, block));
    return load(from_next);
  }

  Float cell_behind(int64_t step, int64_t position, int64_t block) const {
    if (step + 1 == params_.lengths[position]) return of_last(params_.grad_c_n, params_.hidden, position, block);
    return params_.reset_before(step + 1, position) ? Float{} : load(carry(position, block));
  }

  Float of_last(const void* gradient, int64_t width, int64_t position, int64_t block) const {
    if (gradient == nullptr) return Float{};
    return load_units(static_cast<const T*>(gradient) + params_.samples[position] * width + block * lanes,
                      elements_of(block, width));
  }

  // The whole gradient of a block of the hidden state behind a step.
  Float grad_hidden(int64_t step, int64_t position, int64_t block, const float* from_next) const {
    const Float gradient = hidden_behind(step, position, block, from_next);
    if (params_.grad_output == nullptr) return gradient;
    const int64_t at = params_.tensor_row(step, position) * params_.output_stride + block * lanes;
    return gradient + load_units(static_cast<const T*>(params_.grad_output) + at, elements_of(block, params_.state));
  }

  // The gradients of a projection's results, of the member's blocks.
  void add_up_states(int64_t step) {
    const auto add_up = [&](Part part) {
      for_each_block(part, [&](int64_t position, int64_t b, const float* from_next) {
        const int64_t block = own_states_.begin + b;
        Stored<T>* const target = grad_states_row(step, position);
        store_units(target + block * lanes, grad_hidden(step, position, block, from_next),
                    elements_of(block, params_.state));
        // Products read whole words or tiles.
        if (block + 1 == unit_blocks(params_.state)) {
          memset(target + params_.state, 0, (params_.grad_states_stride - params_.state) * sizeof(Stored<T>));
        }
      });
    };
    for_each_panel(
        own_states_, params_.active[step], rows_behind(step), [&](Part part) { multiply_behind(step, part); }, add_up);
  }

  float* carry(int64_t position, int64_t block) const {
    return params_.carry + position * params_.carry_stride + block * lanes;
  }

  // The sums of parts by lanes are those of a block over the part's positions, added up afterwards.
  void take_step(int64_t step, Part part) {
    float sums[panel_vectors][parts * lanes] = {};
    for_each_block(part, [&](int64_t position, int64_t b, const float* product) {
      const int64_t block = own_.begin + b;
      const Float dh = params_.projected() ? load(product) : grad_hidden(step, position, block, product);
      take_step(step, position, block, dh, sums[b - part.block]);
    });
    for (int64_t i = 0; i < part.blocks; ++i) {
      float* total = totals_ + (part.block + i) * parts * lanes;
      for (int64_t k = 0; k < parts * lanes; k += lanes) store(total + k, load(total + k) + load(sums[i] + k));
    }
  }

  void take_step(int64_t step, int64_t position, int64_t block, Float dh, float* sums) {
    const int64_t hidden = params_.hidden, unit = block * lanes, n = elements_of(block, hidden);
    const int64_t tensor_row = params_.tensor_row(step, position), at = tensor_row * hidden + unit;
    Stored<T>* const target = grad_row(step, position);
    const auto write = [&](int64_t part, Float gradient) {
      store_units(target + part * hidden + unit, gradient, n);
      store(sums + part * lanes, load(sums + part * lanes) + gradient);
    };
    const auto saved = [&](int64_t index) {
      return load_units(static_cast<const T*>(params_.gates) + (tensor_row * Shape::saved + index) * hidden + unit, n);
    };
    if constexpr (is_lstm) {
      const Float i = saved(0), f = saved(1), g = saved(2), o = saved(3);
      const Float tanh_cell = tanh<precise>(load_units(params_.cells + at, n));
      const Float dc = cell_behind(step, position, block) + dh * o * (1.0f - tanh_cell * tanh_cell);
      write(0, dc * g * i * (1.0f - i));
      write(1, dc * state_before(params_.cells, hidden, params_.c0, step, position, block) * f * (1.0f - f));
      write(2, dc * i * (1.0f - g * g));
      write(3, dh * tanh_cell * o * (1.0f - o));
      store(carry(position, block), dc * f);
      if (params_.unprojected != nullptr) {
        Stored<T>* const rows = static_cast<Stored<T>*>(params_.unprojected);
        store_units(rows + (params_.first_row[step] + position) * hidden + unit, o * tanh_cell, n);
      }
    } else if constexpr (is_gru) {
      const Float r = saved(0), z = saved(1), new_gate = saved(2), n_hidden = saved(3);
      const Float before =
          state_before(static_cast<const T*>(params_.output), params_.output_stride, params_.h0, step, position, block);
      const Float dn = dh * (1.0f - z) * (1.0f - new_gate * new_gate);
      const Float dr = dn * n_hidden * r * (1.0f - r), dz = dh * (before - new_gate) * z * (1.0f - z);
      for (int64_t side = 0; side < 2; ++side) {
        write(3 * side, dr);
        write(3 * side + 1, dz);
        write(3 * side + 2, side == 0 ? dn * r : dn);
      }
      store(carry(position, block), dh * z);
    } else {
      const T* const output = static_cast<const T*>(params_.output);
      const Float after = load_units(output + tensor_row * params_.output_stride + unit, n);
      if constexpr (Cell == RecurrentCell::rnn_tanh) {
        write(0, dh * (1.0f - after * after));
      } else {
        write(0, select(after <= 0.0f, Float{}, dh));
      }
    }
    // Products read whole words or tiles.
    if (block + 1 == unit_blocks(hidden)) {
      memset(target + parts * hidden, 0, (params_.grad_gates_stride - parts * hidden) * sizeof(Stored<T>));
    }
  }

  // A block of units before the step: of (T, B, H) after the step before, rows `stride` apart, or the first one.
  template <class After>
  Float state_before(const After* after, int64_t stride, const void* first, int64_t step, int64_t position,
                     int64_t block) const {
    const int64_t unit = block * lanes, n = elements_of(block, params_.hidden);
    if (params_.reset_before(step, position)) return Float{};
    if (step == 0) {
      return load_units(static_cast<const T*>(first) + params_.samples[position] * params_.hidden + unit, n);
    }
    return load_units(after + params_.tensor_row(step - 1, position) * stride + unit, n);
  }

  const RecurrentBackwardParams& params_;
  Team* const team_;
  const int64_t member_;
  const Blocks own_, own_states_;  // of units, of the projected hidden state
  float *weight_hh_, *weight_hr_;  // the member's columns, packed
  float* totals_;                  // blocks by parts by lanes: sums of the gate gradients
  float* product_;                 // rows of a row block by a panel's columns
};

}  // namespace

int64_t recurrent_gradient_stride(DataType dtype, int64_t columns) {
  int64_t stride = 0;
  with_type(dtype, [&](auto element) { stride = state_stride<decltype(element)>(columns); });
  return stride;
}

DataType recurrent_gradient_type(DataType dtype) {
  DataType type = DataType::float32;
  with_type(dtype, [&](auto element) {
    if (in_pairs<decltype(element)>) type = dtype;
  });
  return type;
}

int64_t recurrent_backward_scratch(const RecurrentBackwardParams& params, int64_t member, int64_t members) {
  Arena arena(nullptr);
  with_type(params.dtype, [&](auto element) {
    with_cell(params.cell, [&](auto cell) {
      Backward<decltype(element), decltype(cell)::value>(params, nullptr, member, members, arena);
    });
  });
  return arena.used();
}

void recurrent_backward(const RecurrentBackwardParams& params, Team& team, int64_t member, void* scratch) {
  Arena arena(scratch);
  with_type(params.dtype, [&](auto element) {
    with_cell(params.cell, [&](auto cell) {
      Backward<decltype(element), decltype(cell)::value>(params, &team, member, team.size(), arena).run();
    });
  });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
