// The kernel table of one instruction set.

#include "fusewright/cpu/kernels.h"
#include "fusewright/cpu/tables.h"
#include "fusewright/cpu/vector.h"

namespace fusewright::FUSEWRIGHT_ISA {

extern const CpuKernels table;
const CpuKernels table = {
    FUSEWRIGHT_ISA_NAME,
    pair_lanes,
    parameter_to_float,
    norm_forward,
    norm_backward,
    norm_backward_reduce,
    softmax_forward,
    softmax_backward,
    cross_entropy_forward,
    cross_entropy_backward,
    rotary_forward,
    swiglu_forward,
    swiglu_backward,
    bias_gelu_forward,
    bias_gelu_backward,
    dropout_add,
    few_rows_linear_scratch,
    few_rows_linear_pack,
    few_rows_linear,
    attention_forward_scratch,
    attention_forward,
    attention_decode_scratch,
    attention_decode,
    attention_decode_join,
    attention_sum_columns,
    attention_backward_scratch,
    attention_backward,
    attention_backward_reduce,
    attention_mask_gradient_scratch,
    attention_mask_gradient,
    linear_forward_scratch,
    linear_forward,
    linear_backward_scratch,
    linear_backward,
    lsh_hash_columns,
    lsh_hash_scratch,
    lsh_hash,
    lsh_sort,
    lsh_inverse_norms,
    lsh_forward_scratch,
    lsh_forward,
    lsh_forward_finish,
    lsh_backward_scratch,
    lsh_chunk_rows,
    lsh_backward,
    lsh_backward_add_edges,
    lsh_backward_finish,
    recurrent_forward_shared,
    recurrent_forward_scratch,
    recurrent_forward,
    recurrent_gradient_stride,
    recurrent_gradient_type,
    recurrent_backward_scratch,
    recurrent_backward,
    transposed_product,
};

}  // namespace fusewright::FUSEWRIGHT_ISA
