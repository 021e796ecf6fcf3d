// Forward of a recurrent layer: what one member of a team does.
//
// Each member owns blocks of units with all their gates, and of every step computes those: products of the input and of
// the hidden state with its share of the packed weights, then the gates, while the sums are in cache. The share stays
// in the caches of its core from step to step. A step begins when every member has written its part of the hidden
// state. A projection of the hidden state is a second such product in every step, its rows shared out alike. All of it
// is computed alike for every row, whatever the batch and the team.

#include "fusewright/cpu/activations.h"
#include "fusewright/cpu/dot_rows.h"
#include "fusewright/cpu/recurrent/layer.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

// Rows of input that are multiplied together: enough to pay for reading the weights.
constexpr int64_t input_rows = 96;

// Hidden and cell states between steps. The hidden state of a step is read while that of the next one is written.
template <class T>
struct States {
  States(const RecurrentParams& params, Arena& arena)
      : rows(whole_tiles(params.batch)),
        stride(state_stride<T>(params.state)),
        unit_stride(state_stride<T>(params.hidden)) {
    for (auto& buffer : hidden) buffer = static_cast<Stored<T>*>(arena.bytes(rows * stride * sizeof(Stored<T>)));
    cells = arena.floats(params.cell == RecurrentCell::lstm ? rows * unit_stride : 0);
    unprojected = static_cast<Stored<T>*>(arena.bytes(params.projected() ? rows * unit_stride * sizeof(Stored<T>) : 0));
  }

  int64_t rows, stride, unit_stride;
  Stored<T>* hidden[2];
  float* cells;            // rows by unit_stride, as
  Stored<T>* unprojected;  // the hidden state of the step at hand before its projection
};

template <class T, RecurrentCell Cell>
class Forward {
  using Shape = CellShape<Cell>;
  static constexpr int64_t gates = Shape::gates;
  static constexpr int64_t group_columns = Shape::group * gates * lanes;  // whole panels
  static constexpr bool precise = is_float<T>;

 public:
  Forward(const RecurrentForwardParams& params, Team* team, int64_t member, int64_t members, Arena& arena)
      : params_(params),
        team_(team),
        member_(member),
        own_(blocks_of(params.hidden, member, members)),
        own_states_(blocks_of(params.state, member, members)),
        input_stride_(state_stride<T>(params.inputs)),
        columns_(own_.count() * gates * lanes) {
    const int64_t packed_vectors = params.single_step() ? 0 : own_.count() * gates;
    weight_ih_ = arena.floats(panel_floats<T>(packed_vectors, params.inputs));
    weight_hh_ = arena.floats(panel_floats<T>(packed_vectors, params.state));
    const int64_t projected_vectors = params.projected() && !params.single_step() ? own_states_.count() : 0;
    weight_hr_ = arena.floats(panel_floats<T>(projected_vectors, params.hidden));
    biases_ = arena.floats(own_.count() * Shape::biases * lanes);
    const int64_t most_rows = whole_tiles(params.batch > input_rows ? params.batch : input_rows);
    inputs_ = static_cast<Stored<T>*>(arena.bytes(most_rows * input_stride_ * sizeof(Stored<T>)));
    from_input_ = arena.floats(most_rows * columns_);
    from_hidden_ = arena.floats(recurrent_row_block * group_columns);
  }

  void run() {
    Arena shared(params_.shared);
    States<T> states(params_, shared);
    pack();
    begin(states);
    int64_t multiplied = 0;  // steps whose input has been multiplied
    [[maybe_unused]] const TileSession session;
    for (int64_t step = 0; step < params_.steps; ++step) {
      if (step == multiplied) {
        multiplied = multiply_input(step);
        from_input_row_ = 0;
      }
      team_->wait(member_);
      take_step(step, states);
      if (params_.projected()) {
        team_->wait(member_);
        project(step, states);
      }
      from_input_row_ += params_.active[step];
    }
  }

 private:
  const T* weight_rows(const void* weight, int64_t gate, int64_t block, int64_t width) const {
    return static_cast<const T*>(weight) + (gate * params_.hidden + block * lanes) * width;
  }

  // Units of a block, of the layer.
  int64_t units(int64_t block) const { return elements_of(block, params_.hidden); }

  void pack() {
    if (params_.projected() && !params_.single_step()) {
      for (int64_t b = 0; b < own_states_.count(); ++b) {
        const int64_t block = own_states_.begin + b;
        pack_rows(weight_hr_, b, params_.hidden, projection_rows(block), params_.hidden,
                  elements_of(block, params_.state));
      }
    }
    for (int64_t b = 0; b < own_.count(); ++b) {
      const int64_t block = own_.begin + b;
      for (int64_t gate = 0; gate < gates && !params_.single_step(); ++gate) {
        pack_rows(weight_ih_, b * gates + gate, params_.inputs,
                  weight_rows(params_.weight_ih, gate, block, params_.inputs), params_.inputs, units(block));
        pack_rows(weight_hh_, b * gates + gate, params_.state,
                  weight_rows(params_.weight_hh, gate, block, params_.state), params_.state, units(block));
      }
      for (int64_t gate = 0; gate < Shape::biases; ++gate) {
        store(biases_ + (b * Shape::biases + gate) * lanes, bias(gate, block));
      }
    }
  }

  Float bias(int64_t gate, int64_t block) const {
    if (params_.bias_ih == nullptr) return Float{};
    const auto part = [&](const void* bias, int64_t source) {
      return load_units(static_cast<const T*>(bias) + source * params_.hidden + block * lanes, units(block));
    };
    if constexpr (Cell == RecurrentCell::gru) {
      if (gate == 2) return part(params_.bias_ih, 2);
      if (gate == 3) return part(params_.bias_hh, 2);
    }
    return part(params_.bias_ih, gate) + part(params_.bias_hh, gate);
  }

  // The states before the first step, of every position that takes one, and the last states of the others.
  void begin(States<T>& states) {
    for (int64_t p = 0; p < params_.batch; ++p) {
      for (int64_t block = own_states_.begin; block < own_states_.end; ++block) {
        const Float h = first_state(p, block, params_.state, params_.h0, params_.h_n);
        store(states.hidden[0] + p * states.stride + block * lanes, h);
      }
      if constexpr (Cell == RecurrentCell::lstm) {
        for (int64_t block = own_.begin; block < own_.end; ++block) {
          const Float c = first_state(p, block, params_.hidden, params_.c0, params_.c_n);
          store(states.cells + p * states.unit_stride + block * lanes, c);
        }
      }
    }
    if (own_states_.end == unit_blocks(params_.state)) {
      for (auto* buffer : states.hidden) clear_behind(states.rows, own_states_.end * lanes, buffer, states.stride);
    }
    if (params_.projected() && own_.end == unit_blocks(params_.hidden)) {
      clear_behind(states.rows, params_.hidden, states.unprojected, states.unit_stride);
    }
  }

  // A block of a (B, width) state before the first step, which is also the last state where there is no step.
  Float first_state(int64_t position, int64_t block, int64_t width, const void* first, void* last) const {
    const int64_t at = params_.samples[position] * width + block * lanes, n = elements_of(block, width);
    const Float state = load_units(static_cast<const T*>(first) + at, n);
    if (params_.lengths[position] == 0) {
      store_units(static_cast<T*>(last) + at, state, n);
    } else if (params_.reset_before(0, position)) {
      return Float{};
    }
    return state;
  }

  // What products read behind the last element of rows.
  static void clear_behind(int64_t rows, int64_t from, Stored<T>* buffer, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) memset(buffer + r * stride + from, 0, (stride - from) * sizeof(Stored<T>));
  }

  // Multiplies the input of steps from `step` on; returns the step behind the last of them.
  int64_t multiply_input(int64_t step) {
    int64_t rows = 0;
    for (; step < params_.steps && (rows == 0 || rows + params_.active[step] <= input_rows); ++step) {
      for (int64_t p = 0; p < params_.active[step]; ++p) read_input(step, p, inputs_ + (rows + p) * input_stride_);
      rows += params_.active[step];
    }
    for (int64_t b = 0; b < own_.count(); b += Shape::group) {
      const int64_t left = own_.count() - b, blocks = left < Shape::group ? left : Shape::group;
      multiply(rows, params_.inputs, inputs_, input_stride_, params_.weight_ih, weight_ih_, b, blocks,
               {from_input_ + b * gates * lanes, columns_});
    }
    return step;
  }

  // c = rows of `inputs` times the weights of the gates of blocks [b, b + blocks), which begin a panel.
  void multiply(int64_t rows, int64_t elements, const Stored<T>* inputs, int64_t stride, const void* weight,
                float* packed, int64_t b, int64_t blocks, Lanes c) const {
    if (!params_.single_step()) {
      const LeftOperand left{inputs, stride * static_cast<int64_t>(sizeof(Stored<T>)), 4};
      return panel_product<T>(rows, elements, left, packed, b * gates, blocks * gates, c);
    }
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t block = own_.begin + b + i;
      for (int64_t gate = 0; gate < gates; ++gate) {
        dot_rows<T>(rows, elements, inputs, stride, weight_rows(weight, gate, block, elements), elements, units(block),
                    {c.data + (i * gates + gate) * lanes, c.stride});
      }
    }
  }

  void read_input(int64_t step, int64_t position, Stored<T>* target) const {
    const T* source = static_cast<const T*>(params_.input) +
                      params_.time_of(step, position) * params_.input_time_stride +
                      params_.samples[position] * params_.input_sample_stride;
    if constexpr (in_pairs<T>) {
      memcpy(target, source, params_.inputs * sizeof(T));
    } else {
      to_floats(target, source, params_.inputs);
    }
    memset(target + params_.inputs, 0, (input_stride_ - params_.inputs) * sizeof(Stored<T>));
  }

  void take_step(int64_t step, States<T>& states) {
    const Stored<T>* hidden = states.hidden[step % 2];
    // Blocks of units outside, so that their weights, which may come from far, serve all rows.
    for (int64_t b = 0; b < own_.count(); b += Shape::group) {
      const int64_t left = own_.count() - b, blocks = left < Shape::group ? left : Shape::group;
      for (int64_t first = 0; first < params_.active[step]; first += recurrent_row_block) {
        const int64_t rest = params_.active[step] - first;
        const int64_t rows = rest < recurrent_row_block ? rest : recurrent_row_block;
        multiply(rows, params_.state, hidden + first * states.stride, states.stride, params_.weight_hh, weight_hh_, b,
                 blocks, {from_hidden_, group_columns});
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < blocks; ++i) {
            apply_gates(step, first + r, b + i, from_hidden_ + r * group_columns + i * gates * lanes, states);
          }
        }
      }
    }
  }

  // The member's part of the hidden state from what every member has left in states.unprojected.
  void project(int64_t step, States<T>& states) {
    for (int64_t b = 0; b < own_states_.count(); b += panel_vectors) {
      const int64_t left = own_states_.count() - b, blocks = left < panel_vectors ? left : panel_vectors;
      for (int64_t first = 0; first < params_.active[step]; first += recurrent_row_block) {
        const int64_t rest = params_.active[step] - first;
        const int64_t rows = rest < recurrent_row_block ? rest : recurrent_row_block;
        multiply_projection(rows, states.unprojected + first * states.unit_stride, states.unit_stride, b, blocks);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < blocks; ++i) {
            put_out(step, first + r, own_states_.begin + b + i, load(from_hidden_ + r * group_columns + i * lanes),
                    states);
          }
        }
      }
    }
  }

  void multiply_projection(int64_t rows, const Stored<T>* unprojected, int64_t stride, int64_t b, int64_t blocks) {
    if (!params_.single_step()) {
      const LeftOperand left{unprojected, stride * static_cast<int64_t>(sizeof(Stored<T>)), 4};
      return panel_product<T>(rows, params_.hidden, left, weight_hr_, b, blocks, {from_hidden_, group_columns});
    }
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t block = own_states_.begin + b + i;
      dot_rows<T>(rows, params_.hidden, unprojected, stride, projection_rows(block), params_.hidden,
                  elements_of(block, params_.state), {from_hidden_ + i * lanes, group_columns});
    }
  }

  const T* projection_rows(int64_t block) const {
    return static_cast<const T*>(params_.weight_hr) + block * lanes * params_.hidden;
  }

  void apply_gates(int64_t step, int64_t position, int64_t b, const float* from_hidden, States<T>& states) {
    const int64_t block = own_.begin + b, n = units(block), hidden = params_.hidden;
    const float* from_input = from_input_ + (from_input_row_ + position) * columns_ + b * gates * lanes;
    const float* bias = biases_ + b * Shape::biases * lanes;
    const int64_t tensor_row = params_.tensor_row(step, position);
    const auto sum = [&](int64_t gate) {
      return load(from_input + gate * lanes) + load(bias + gate * lanes) + load(from_hidden + gate * lanes);
    };
    const auto save = [&](int64_t index, Float value) {
      if (params_.gates == nullptr) return;
      T* target = static_cast<T*>(params_.gates) + (tensor_row * Shape::saved + index) * hidden + block * lanes;
      store_units(target, value, n);
    };
    Float h;
    if constexpr (Cell == RecurrentCell::lstm) {
      float* const cell = states.cells + position * states.unit_stride + block * lanes;
      const Float i = sigmoid<precise>(sum(0)), f = sigmoid<precise>(sum(1));
      const Float g = tanh<precise>(sum(2)), o = sigmoid<precise>(sum(3));
      const Float c = f * load(cell) + i * g;
      h = o * tanh<precise>(c);
      save(0, i);
      save(1, f);
      save(2, g);
      save(3, o);
      if (params_.cells != nullptr) store_units(params_.cells + tensor_row * hidden + block * lanes, c, n);
      store(cell, carried(step, position, block, hidden, c, params_.c_n));
      if (params_.projected()) {
        store_units(states.unprojected + position * states.unit_stride + block * lanes, h, n);
        return;
      }
    } else if constexpr (Cell == RecurrentCell::gru) {
      const Float r = sigmoid<precise>(sum(0)), z = sigmoid<precise>(sum(1));
      const Float n_hidden = load(from_hidden + 2 * lanes) + load(bias + 3 * lanes);
      const Float new_gate = tanh<precise>(load(from_input + 2 * lanes) + load(bias + 2 * lanes) + r * n_hidden);
      h = new_gate + z * (load(states.hidden[step % 2] + position * states.stride + block * lanes) - new_gate);
      save(0, r);
      save(1, z);
      save(2, new_gate);
      save(3, n_hidden);
    } else if constexpr (Cell == RecurrentCell::rnn_tanh) {
      h = tanh<precise>(sum(0));
    } else {
      // NaN stays, as in torch: it is not greater than anything.
      h = maximum(Float{}, sum(0));
    }
    put_out(step, position, block, h, states);
  }

  // A block of the hidden state after a step.
  void put_out(int64_t step, int64_t position, int64_t block, Float value, States<T>& states) const {
    const Float h = rounded<T>(value);
    const int64_t at = params_.tensor_row(step, position) * params_.output_stride + block * lanes;
    store_units(static_cast<T*>(params_.output) + at, h, elements_of(block, params_.state));
    store(states.hidden[(step + 1) % 2] + position * states.stride + block * lanes,
          carried(step, position, block, params_.state, h, params_.h_n));
  }

  // What the next step begins with of a block of a (B, width) state; the last step's is the result.
  Float carried(int64_t step, int64_t position, int64_t block, int64_t width, Float state, void* last) const {
    if (step + 1 == params_.lengths[position]) {
      const int64_t at = params_.samples[position] * width + block * lanes;
      store_units(static_cast<T*>(last) + at, state, elements_of(block, width));
      return state;
    }
    return params_.reset_before(step + 1, position) ? Float{} : state;
  }

  const RecurrentForwardParams& params_;
  Team* const team_;
  const int64_t member_;
  const Blocks own_, own_states_;  // of units, of the projected hidden state
  const int64_t input_stride_, columns_;
  float *weight_ih_, *weight_hh_;  // packed: a block's gates lie side by side
  float* weight_hr_;               // packed
  float* biases_;                  // blocks by biases by lanes
  Stored<T>* inputs_;              // rows of the steps at hand
  float* from_input_;              // rows by columns
  float* from_hidden_;             // rows of a row block by the columns of a group of blocks
  int64_t from_input_row_ = 0;     // where the step at hand begins in it
};

}  // namespace

int64_t recurrent_forward_shared(const RecurrentForwardParams& params) {
  Arena arena(nullptr);
  with_type(params.dtype, [&](auto element) { States<decltype(element)>(params, arena); });
  return arena.used();
}

int64_t recurrent_forward_scratch(const RecurrentForwardParams& params, int64_t member, int64_t members) {
  Arena arena(nullptr);
  with_type(params.dtype, [&](auto element) {
    with_cell(params.cell, [&](auto cell) {
      Forward<decltype(element), decltype(cell)::value>(params, nullptr, member, members, arena);
    });
  });
  return arena.used();
}

void recurrent_forward(const RecurrentForwardParams& params, Team& team, int64_t member, void* scratch) {
  Arena arena(scratch);
  with_type(params.dtype, [&](auto element) {
    with_cell(params.cell, [&](auto cell) {
      Forward<decltype(element), decltype(cell)::value>(params, &team, member, team.size(), arena).run();
    });
  });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
