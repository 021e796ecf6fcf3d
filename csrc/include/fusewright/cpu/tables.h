// Declarations of the kernels that make up one instruction set's table.
#pragma once

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

namespace fusewright::FUSEWRIGHT_ISA {

void parameter_to_float(const RowView& row, int64_t columns, float offset, bool pair_order, float* target);
void norm_forward(const NormForwardParams& params, const float* weight, const float* bias, int64_t begin, int64_t end);
void norm_backward(const NormBackwardParams& params, const float* weight, int64_t begin, int64_t end,
                   float* weight_sums, float* bias_sums);
void norm_backward_reduce(const float* partial_sums, int64_t chunks, int64_t columns, bool pair_order,
                          const RowView& gradient, int64_t begin, int64_t end);
void softmax_forward(const SoftmaxForwardParams& params, int64_t begin, int64_t end);
void softmax_backward(const SoftmaxBackwardParams& params, int64_t begin, int64_t end);
void cross_entropy_forward(const CrossEntropyForwardParams& params, int64_t begin, int64_t end);
void cross_entropy_backward(const CrossEntropyBackwardParams& params, int64_t begin, int64_t end);
void rotary_forward(const RotaryParams& params, int64_t begin, int64_t end);
void swiglu_forward(const SwigluForwardParams& params, int64_t begin, int64_t end);
void swiglu_backward(const SwigluBackwardParams& params, int64_t begin, int64_t end);
void bias_gelu_forward(const BiasGeluForwardParams& params, const float* bias, int64_t begin, int64_t end);
void bias_gelu_backward(const BiasGeluBackwardParams& params, const float* bias, int64_t begin, int64_t end,
                        float* bias_sums);
void dropout_add(const DropoutAddParams& params, int64_t begin, int64_t end);
void embedding_forward(const EmbeddingForwardParams& params, int64_t begin, int64_t end);
void embedding_backward(const EmbeddingBackwardParams& params, int64_t begin, int64_t end, int64_t column,
                        int64_t count);
int64_t few_rows_linear_scratch(const FewRowsLinearParams& params);
void few_rows_linear_pack(const FewRowsLinearParams& params, void* packed);
void few_rows_linear(const FewRowsLinearParams& params, const void* packed, int64_t begin, int64_t end);
int64_t attention_forward_scratch(const AttentionForwardParams& params, int64_t queries);
void attention_forward(const AttentionForwardParams& params, const AttentionSequence& sequence,
                       const AttentionForwardTask& task, void* scratch);
int64_t attention_decode_scratch(const AttentionDecodeParams& params, int64_t queries);
void attention_decode(const AttentionDecodeParams& params, const AttentionSequence& sequence,
                      const AttentionDecodeTask& task, void* scratch);
void attention_decode_join(const AttentionDecodeParams& params, const AttentionSequence& sequence, int64_t key_head,
                           const AttentionDecodeTask* parts, int64_t part_count);
int64_t attention_sum_columns(int64_t width);
int64_t attention_backward_scratch(const AttentionBackwardParams& params);
void attention_backward(const AttentionBackwardParams& params, const AttentionSequence& sequence,
                        const AttentionBackwardTask& task, void* scratch);
void attention_backward_reduce(const AttentionBackwardParams& params, const AttentionSequence& sequence,
                               int64_t key_head, const float* key_sums, const float* value_sums, int64_t parts,
                               int64_t key_part_stride, int64_t value_part_stride);
int64_t attention_mask_gradient_scratch(const AttentionBackwardParams& params);
void attention_mask_gradient(const AttentionBackwardParams& params, const AttentionMaskTask& task, void* scratch);
int64_t linear_forward_scratch(const LinearForwardParams& params);
void linear_forward(const LinearForwardParams& params, int64_t batch, int64_t head, void* scratch);
int64_t linear_backward_scratch(const LinearBackwardParams& params);
void linear_backward(const LinearBackwardParams& params, int64_t batch, int64_t head, void* scratch);
int64_t lsh_hash_columns(int64_t columns);
int64_t lsh_hash_scratch(const LshHashParams& params);
void lsh_hash(const LshHashParams& params, int64_t batch, int64_t head, int64_t length, int64_t begin, int64_t end,
              int64_t* buckets, void* scratch);
void lsh_sort(const int64_t* buckets, int64_t length, int32_t* order, int32_t* scratch);
void lsh_inverse_norms(const LshAttentionParams& params, int64_t batch, int64_t head, int64_t begin, int64_t end);
int64_t lsh_forward_scratch(const LshForwardParams& params);
void lsh_forward(const LshForwardParams& params, const LshTask& task, void* scratch);
void lsh_forward_finish(const LshForwardParams& params, int64_t batch, int64_t head, const float* sums, int64_t begin,
                        int64_t end);
int64_t lsh_backward_scratch(const LshBackwardParams& params);
int64_t lsh_chunk_rows(const LshBackwardParams& params);
void lsh_backward(const LshBackwardParams& params, const LshTask& task, void* scratch);
void lsh_backward_add_edges(const LshBackwardParams& params, const LshTask& task);
void lsh_backward_finish(const LshBackwardParams& params, int64_t batch, int64_t head, const LshSums& sums,
                         int64_t begin, int64_t end);
int64_t recurrent_forward_shared(const RecurrentForwardParams& params);
int64_t recurrent_forward_scratch(const RecurrentForwardParams& params, int64_t member, int64_t members);
void recurrent_forward(const RecurrentForwardParams& params, Team& team, int64_t member, void* scratch);
int64_t recurrent_gradient_stride(DataType dtype, int64_t columns);
DataType recurrent_gradient_type(DataType dtype);
int64_t recurrent_backward_scratch(const RecurrentBackwardParams& params, int64_t member, int64_t members);
void recurrent_backward(const RecurrentBackwardParams& params, Team& team, int64_t member, void* scratch);
void transposed_product(const TransposedProductParams& params, int64_t begin, int64_t end);

}  // namespace fusewright::FUSEWRIGHT_ISA
