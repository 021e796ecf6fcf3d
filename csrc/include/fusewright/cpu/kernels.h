// The table of CPU kernels: one per instruction set, chosen once at run time.
// Kernels work on a range of rows or chunks and never start a thread; the caller spreads the ranges.
#pragma once

#include <cstdint>

#include "fusewright/activation.h"
#include "fusewright/attention.h"
#include "fusewright/cross_entropy.h"
#include "fusewright/embedding.h"
#include "fusewright/few_rows_linear.h"
#include "fusewright/linear_attention.h"
#include "fusewright/lsh_attention.h"
#include "fusewright/normalization.h"
#include "fusewright/recurrent.h"
#include "fusewright/rotary.h"
#include "fusewright/softmax.h"

namespace fusewright {

struct CpuKernels {
  const char* isa;

  // Parameters and their sums are float32 in whole blocks of this many elements: ceil(N / block) * block of them.
  int64_t parameter_block;

  // target[i] = float32(row[i]) + offset for the one row of a parameter, 0 past its end. `pair_order` holds for plain
  // normalisation of bfloat16, whose kernels take elements in another order; see cpu/vector.h.
  void (*parameter_to_float)(const RowView& row, int64_t columns, float offset, bool pair_order, float* target);

  // Rows [begin, end). `weight` and `bias` come from parameter_to_float, or are nullptr.
  void (*norm_forward)(const NormForwardParams& params, const float* weight, const float* bias, int64_t begin,
                       int64_t end);

  // Rows [begin, end). Overwrites weight_sums and bias_sums, where they are not nullptr, with the sums over the rows.
  void (*norm_backward)(const NormBackwardParams& params, const float* weight, int64_t begin, int64_t end,
                        float* weight_sums, float* bias_sums);

  // Adds the sums of `chunks` calls in order, blocks [begin, end), and rounds once to the gradient's type.
  void (*norm_backward_reduce)(const float* sums, int64_t chunks, int64_t columns, bool pair_order,
                               const RowView& gradient, int64_t begin, int64_t end);

  void (*softmax_forward)(const SoftmaxForwardParams& params, int64_t begin, int64_t end);
  void (*softmax_backward)(const SoftmaxBackwardParams& params, int64_t begin, int64_t end);

  void (*cross_entropy_forward)(const CrossEntropyForwardParams& params, int64_t begin, int64_t end);
  void (*cross_entropy_backward)(const CrossEntropyBackwardParams& params, int64_t begin, int64_t end);

  void (*rotary_forward)(const RotaryParams& params, int64_t begin, int64_t end);

  void (*swiglu_forward)(const SwigluForwardParams& params, int64_t begin, int64_t end);
  void (*swiglu_backward)(const SwigluBackwardParams& params, int64_t begin, int64_t end);
  // `bias` comes from parameter_to_float, or is nullptr. Overwrites bias_sums, where it is not nullptr, with the sums
  // over the rows, for norm_backward_reduce.
  void (*bias_gelu_forward)(const BiasGeluForwardParams& params, const float* bias, int64_t begin, int64_t end);
  void (*bias_gelu_backward)(const BiasGeluBackwardParams& params, const float* bias, int64_t begin, int64_t end,
                             float* bias_sums);

  void (*dropout_add)(const DropoutAddParams& params, int64_t begin, int64_t end);

  void (*embedding_forward)(const EmbeddingForwardParams& params, int64_t begin, int64_t end);
  // Rows [begin, end) of the gradient, `count` columns from `column` on.
  void (*embedding_backward)(const EmbeddingBackwardParams& params, int64_t begin, int64_t end, int64_t column,
                             int64_t count);

  // The input in the form that products take, in so many bytes; then output columns [begin, end) of all rows.
  int64_t (*few_rows_linear_scratch)(const FewRowsLinearParams& params);
  void (*few_rows_linear_pack)(const FewRowsLinearParams& params, void* packed);
  void (*few_rows_linear)(const FewRowsLinearParams& params, const void* packed, int64_t begin, int64_t end);

  // Bytes of scratch, aligned to 64, that a task of up to `queries` queries takes.
  int64_t (*attention_forward_scratch)(const AttentionForwardParams& params, int64_t queries);
  void (*attention_forward)(const AttentionForwardParams& params, const AttentionSequence& sequence,
                            const AttentionForwardTask& task, void* scratch);

  int64_t (*attention_decode_scratch)(const AttentionDecodeParams& params, int64_t queries);
  void (*attention_decode)(const AttentionDecodeParams& params, const AttentionSequence& sequence,
                           const AttentionDecodeTask& task, void* scratch);
  void (*attention_decode_join)(const AttentionDecodeParams& params, const AttentionSequence& sequence,
                                int64_t key_head, const AttentionDecodeTask* parts, int64_t part_count);

  // Sums of rows of this width, as the tasks of decoding and of the backward leave them, have rows of this many
  // float32.
  int64_t (*attention_sum_columns)(int64_t width);
  int64_t (*attention_backward_scratch)(const AttentionBackwardParams& params);
  void (*attention_backward)(const AttentionBackwardParams& params, const AttentionSequence& sequence,
                             const AttentionBackwardTask& task, void* scratch);
  // Adds `parts` sums of keys and of values, each a stride behind the other, in order, and writes both gradients.
  void (*attention_backward_reduce)(const AttentionBackwardParams& params, const AttentionSequence& sequence,
                                    int64_t key_head, const float* key_sums, const float* value_sums, int64_t parts,
                                    int64_t key_part_stride, int64_t value_part_stride);

  int64_t (*attention_mask_gradient_scratch)(const AttentionBackwardParams& params);
  void (*attention_mask_gradient)(const AttentionBackwardParams& params, const AttentionMaskTask& task, void* scratch);

  // One head each, from its first to its last position.
  int64_t (*linear_forward_scratch)(const LinearForwardParams& params);
  void (*linear_forward)(const LinearForwardParams& params, int64_t batch, int64_t head, void* scratch);
  int64_t (*linear_backward_scratch)(const LinearBackwardParams& params);
  void (*linear_backward)(const LinearBackwardParams& params, int64_t batch, int64_t head, void* scratch);

  // Rotations of so many columns have rows of this many float32, zero behind the last.
  int64_t (*lsh_hash_columns)(int64_t columns);
  int64_t (*lsh_hash_scratch)(const LshHashParams& params);
  // Buckets (R, T) of vectors [begin, end) of one head.
  void (*lsh_hash)(const LshHashParams& params, int64_t batch, int64_t head, int64_t length, int64_t begin, int64_t end,
                   int64_t* buckets, void* scratch);
  // Positions in order of (bucket, position); `scratch` holds as many numbers as `order`.
  void (*lsh_sort)(const int64_t* buckets, int64_t length, int32_t* order, int32_t* scratch);
  void (*lsh_inverse_norms)(const LshAttentionParams& params, int64_t batch, int64_t head, int64_t begin, int64_t end);

  // Tasks of one round touch different sums; a round may begin when the one before is done.
  int64_t (*lsh_forward_scratch)(const LshForwardParams& params);
  void (*lsh_forward)(const LshForwardParams& params, const LshTask& task, void* scratch);
  // Rows [begin, end) of the output from the sums of all rounds.
  void (*lsh_forward_finish)(const LshForwardParams& params, int64_t batch, int64_t head, const float* sums,
                             int64_t begin, int64_t end);

  int64_t (*lsh_backward_scratch)(const LshBackwardParams& params);
  // Rows of sums that a chunk takes.
  int64_t (*lsh_chunk_rows)(const LshBackwardParams& params);
  void (*lsh_backward)(const LshBackwardParams& params, const LshTask& task, void* scratch);
  // When all tasks of a round are done, for each of a head in turn.
  void (*lsh_backward_add_edges)(const LshBackwardParams& params, const LshTask& task);
  void (*lsh_backward_finish)(const LshBackwardParams& params, int64_t batch, int64_t head, const LshSums& sums,
                              int64_t begin, int64_t end);
  // A member's part of a recurrent layer, for every member of a team at once. Bytes of scratch that they share, and of
  // each member's own.
  int64_t (*recurrent_forward_shared)(const RecurrentForwardParams& params);
  int64_t (*recurrent_forward_scratch)(const RecurrentForwardParams& params, int64_t member, int64_t members);
  void (*recurrent_forward)(const RecurrentForwardParams& params, Team& team, int64_t member, void* scratch);
  // Elements of a row of `columns` gradients that a later step multiplies, and their type, for tensors of `dtype`.
  // Products read up to 15 rows behind the last one.
  int64_t (*recurrent_gradient_stride)(DataType dtype, int64_t columns);
  DataType (*recurrent_gradient_type)(DataType dtype);
  int64_t (*recurrent_backward_scratch)(const RecurrentBackwardParams& params, int64_t member, int64_t members);
  void (*recurrent_backward)(const RecurrentBackwardParams& params, Team& team, int64_t member, void* scratch);
  // Rows [begin, end) of the target, columns of the left factor. Needs rows; without any the target is zero.
  void (*transposed_product)(const TransposedProductParams& params, int64_t begin, int64_t end);
};

}  // namespace fusewright

extern "C" {
#pragma GCC visibility push(default)

// The table in use: the best of this machine, or the one FUSEWRIGHT_CPU_ISA or fusewright_cpu_select names.
const fusewright::CpuKernels* fusewright_cpu_kernels();

// Uses the table of `isa` from now on; returns 0, or 1 if this machine or this build lacks it. Not for use while
// another thread runs a kernel.
int fusewright_cpu_select(const char* isa);

// Whether attention multiplies float32 as three bfloat16 where the table in use has tiles: at float32's accuracy, and
// faster than vectors do. Off unless FUSEWRIGHT_FLOAT32_PRODUCTS is "split" or it is switched on here.
int fusewright_cpu_float32_split();
void fusewright_cpu_split_float32(int split);

// Name of the table in use; empty if FUSEWRIGHT_CPU_ISA names one that cannot run here.
const char* fusewright_cpu_selected();

// Names of the tables this machine can run, best first, separated by commas.
const char* fusewright_cpu_available();

#pragma GCC visibility pop
}
