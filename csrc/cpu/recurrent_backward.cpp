// Backward of a recurrent layer through its steps: what one member of a team does. Gradients of the weights and of the
// input are products over all steps at once and not made here.
//
// Each member owns blocks of units. Of every step, the last first, it forms its units' gradient of the hidden state, a
// product of all gate gradients of the step behind with its columns of weight_hh, then its own gate gradients.

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
      : params_(params), team_(team), member_(member), own_(blocks_of(params.hidden, member, members)) {
    weight_ = arena.floats(params.single_step() ? 0 : panel_floats<T>(own_.count(), Shape::gates * params.hidden));
    totals_ = arena.floats(own_.count() * parts * lanes);
    from_next_ = arena.floats(recurrent_row_block * panel_columns);
  }

  void run() {
    if (params_.hidden_gradients != nullptr) return finish();
    if (!params_.single_step()) pack();
    memset(totals_, 0, own_.count() * parts * lanes * sizeof(float));
    [[maybe_unused]] const TileSession session;
    for (int64_t step = params_.steps - 1; step >= 0; --step) {
      for_each_unit(step, params_.active[step], [&](int64_t p, int64_t b, const float* from_next, float* sums) {
        take_step(step, p, b, from_next, sums);
      });
    }
    if (params_.grad_h0 != nullptr && (!params_.single_step() || params_.steps == 0)) finish();
    for (int64_t b = 0; b < own_.count(); ++b) {
      for (int64_t part = 0; part < parts; ++part) {
        store_units(params_.bias_sums + part * params_.hidden + (own_.begin + b) * lanes,
                    load(totals_ + (b * parts + part) * lanes), units(b));
      }
    }
  }

 private:
  void pack() {
    const T* weight = static_cast<const T*>(params_.weight_hh);
    const int64_t hidden = params_.hidden, first = own_.begin * lanes;
    const int64_t end = own_.end * lanes < hidden ? own_.end * lanes : hidden;
    pack_columns<T>(weight_, Shape::gates * hidden, first, end - first, [=](int64_t k) { return weight + k * hidden; });
  }

  void finish() {
    for_each_unit(-1, params_.batch,
                  [&](int64_t p, int64_t b, const float* from_next, float*) { write_first_states(p, b, from_next); });
  }

  // Units of block `b` of this member.
  int64_t units(int64_t b) const {
    const int64_t rest = params_.hidden - (own_.begin + b) * lanes;
    return rest < lanes ? rest : lanes;
  }

  // Gate gradients of a step and a position.
  Stored<T>* grad_row(int64_t step, int64_t position) const {
    return static_cast<Stored<T>*>(params_.grad_gates) +
           (params_.first_row[step] + position) * params_.grad_gates_stride;
  }

  // Calls visit(position, block, gradient of the hidden state by way of the step behind, sums) for positions below
  // `count` and every block. The sums of parts by lanes are those of a block over some positions, added up afterwards.
  template <class Visit>
  void for_each_unit(int64_t step, int64_t count, Visit visit) {
    const bool has_next = step + 1 < params_.steps;
    if (has_next) team_->wait(member_);
    const int64_t with_next = has_next ? params_.active[step + 1] : 0;
    // Blocks of units outside, so that their weights, which may come from far, serve all rows.
    for (int64_t b = 0; b < own_.count(); b += panel_vectors) {
      const int64_t left = own_.count() - b, blocks = left < panel_vectors ? left : panel_vectors;
      for (int64_t first = 0; first < count; first += recurrent_row_block) {
        const int64_t rest = count - first, rows = rest < recurrent_row_block ? rest : recurrent_row_block;
        const int64_t product_rows = with_next - first < rows ? with_next - first : rows;
        if (product_rows > 0 && params_.hidden_gradients != nullptr) {
          read_hidden_gradients(first, product_rows, b, blocks);
        } else if (product_rows > 0) {
          const LeftOperand gradients{grad_row(step + 1, first),
                                      params_.grad_gates_stride * static_cast<int64_t>(sizeof(Stored<T>)), 4};
          panel_product<T>(product_rows, Shape::gates * params_.hidden, gradients, weight_, b, blocks,
                           {from_next_, panel_columns});
        }
        float sums[panel_vectors][parts * lanes] = {};
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < blocks; ++i) {
            visit(first + r, b + i, from_next_ + r * panel_columns + i * lanes, sums[i]);
          }
        }
        for (int64_t i = 0; i < blocks; ++i) {
          float* total = totals_ + (b + i) * parts * lanes;
          for (int64_t k = 0; k < parts * lanes; k += lanes) store(total + k, load(total + k) + load(sums[i] + k));
        }
      }
    }
  }

  void read_hidden_gradients(int64_t first, int64_t rows, int64_t b, int64_t blocks) {
    const Stored<T>* source = static_cast<const Stored<T>*>(params_.hidden_gradients);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = b; i < b + blocks; ++i) {
        const Stored<T>* units_of_row = source + (first + r) * params_.hidden + (own_.begin + i) * lanes;
        store(from_next_ + r * panel_columns + (i - b) * lanes, load_units(units_of_row, units(i)));
      }
    }
  }

  // What reaches the states behind a step from the steps behind it, or from the last states.
  struct StateGradients {
    Float hidden, cell;
  };

  StateGradients behind(int64_t step, int64_t position, int64_t b, const float* from_next) const {
    const int64_t n = units(b);
    if (step + 1 == params_.lengths[position]) {
      const int64_t at = params_.samples[position] * params_.hidden + (own_.begin + b) * lanes;
      const auto given = [&](const void* gradient) {
        return gradient == nullptr ? Float{} : load_units(static_cast<const T*>(gradient) + at, n);
      };
      return {given(params_.grad_h_n), is_lstm ? given(params_.grad_c_n) : Float{}};
    }
    if (params_.reset_before(step + 1, position)) return {Float{}, Float{}};
    StateGradients gradients{load(from_next), Float{}};
    if constexpr (is_lstm) gradients.cell = load(carry(position, b));
    if constexpr (is_gru) gradients.hidden += load(carry(position, b));
    return gradients;
  }

  float* carry(int64_t position, int64_t b) const {
    return params_.carry + position * params_.carry_stride + (own_.begin + b) * lanes;
  }

  void take_step(int64_t step, int64_t position, int64_t b, const float* from_next, float* sums) {
    const int64_t n = units(b), hidden = params_.hidden, unit = (own_.begin + b) * lanes;
    const int64_t tensor_row = params_.tensor_row(step, position), at = tensor_row * hidden + unit;
    StateGradients grad = behind(step, position, b, from_next);
    if (params_.grad_output != nullptr) grad.hidden += load_units(static_cast<const T*>(params_.grad_output) + at, n);
    Stored<T>* const target = grad_row(step, position);
    const auto write = [&](int64_t part, Float gradient) {
      store_units(target + part * hidden + unit, gradient, n);
      store(sums + part * lanes, load(sums + part * lanes) + gradient);
    };
    const auto saved = [&](int64_t index) {
      return load_units(static_cast<const T*>(params_.gates) + (tensor_row * Shape::saved + index) * hidden + unit, n);
    };
    const Float dh = grad.hidden;
    if constexpr (is_lstm) {
      const Float i = saved(0), f = saved(1), g = saved(2), o = saved(3);
      const Float tanh_cell = tanh<precise>(load_units(params_.cells + at, n));
      const Float dc = grad.cell + dh * o * (1.0f - tanh_cell * tanh_cell);
      write(0, dc * g * i * (1.0f - i));
      write(1, dc * state_before(params_.cells, static_cast<const T*>(params_.c0), step, position, b) * f * (1.0f - f));
      write(2, dc * i * (1.0f - g * g));
      write(3, dh * tanh_cell * o * (1.0f - o));
      store(carry(position, b), dc * f);
    } else if constexpr (is_gru) {
      const Float r = saved(0), z = saved(1), new_gate = saved(2), n_hidden = saved(3);
      const Float before =
          state_before(static_cast<const T*>(params_.output), static_cast<const T*>(params_.h0), step, position, b);
      const Float dn = dh * (1.0f - z) * (1.0f - new_gate * new_gate);
      const Float dr = dn * n_hidden * r * (1.0f - r), dz = dh * (before - new_gate) * z * (1.0f - z);
      for (int64_t side = 0; side < 2; ++side) {
        write(3 * side, dr);
        write(3 * side + 1, dz);
        write(3 * side + 2, side == 0 ? dn * r : dn);
      }
      store(carry(position, b), dh * z);
    } else {
      const Float after = load_units(static_cast<const T*>(params_.output) + at, n);
      if constexpr (Cell == RecurrentCell::rnn_tanh) {
        write(0, dh * (1.0f - after * after));
      } else {
        write(0, select(after <= 0.0f, Float{}, dh));
      }
    }
    // Products read whole words or tiles.
    if (own_.begin + b + 1 == unit_blocks(hidden)) {
      memset(target + parts * hidden, 0, (params_.grad_gates_stride - parts * hidden) * sizeof(Stored<T>));
    }
  }

  // A state before the step: of (T, B, H) after the step before, or the first one.
  template <class After, class First>
  Float state_before(const After* after, const First* first, int64_t step, int64_t position, int64_t b) const {
    const int64_t unit = (own_.begin + b) * lanes;
    if (params_.reset_before(step, position)) return Float{};
    if (step == 0) return load_units(first + params_.samples[position] * params_.hidden + unit, units(b));
    return load_units(after + params_.tensor_row(step - 1, position) * params_.hidden + unit, units(b));
  }

  void write_first_states(int64_t position, int64_t b, const float* from_next) const {
    const StateGradients grad = behind(-1, position, b, from_next);
    const int64_t at = params_.samples[position] * params_.hidden + (own_.begin + b) * lanes;
    store_units(static_cast<T*>(params_.grad_h0) + at, grad.hidden, units(b));
    if constexpr (is_lstm) store_units(static_cast<T*>(params_.grad_c0) + at, grad.cell, units(b));
  }

  const RecurrentBackwardParams& params_;
  Team* const team_;
  const int64_t member_;
  const Blocks own_;
  float* weight_;     // the member's columns of weight_hh, packed
  float* totals_;     // blocks by parts by lanes: sums of the gate gradients
  float* from_next_;  // rows of a row block by units of a panel
};

}  // namespace

int64_t recurrent_gradient_stride(const RecurrentBackwardParams& params) {
  int64_t stride = 0;
  with_type(params.dtype, [&](auto element) {
    stride = state_stride<decltype(element)>(gradient_columns(params.cell) * params.hidden);
  });
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
