// Entries of the CUDA library. Plain C++: includable where neither torch nor the CUDA toolkit is present.
// Every entry enqueues on `stream` (a cudaStream_t) and returns a cudaError_t as int; 0 is success.
#pragma once

#include <cstdint>

#include "fusewright/activation.h"
#include "fusewright/attention.h"
#include "fusewright/cross_entropy.h"
#include "fusewright/lsh_attention.h"
#include "fusewright/normalization.h"
#include "fusewright/recurrent.h"
#include "fusewright/rotary.h"
#include "fusewright/softmax.h"

#pragma GCC visibility push(default)
extern "C" {

// The CUDA runtime's description of an error code.
const char* fusewright_cuda_error_string(int error);

// The kernel's type is that of input. residual and new_residual have that type or float32.
int fusewright_cuda_norm_forward(const fusewright::NormForwardParams* params, void* stream);

// The kernel's type is that of grad_output; stream and every other (M, N) tensor has that type or float32.
// `workspace` holds the bytes that fusewright_cuda_norm_backward_workspace tells for the same params on the same
// device, aligned to 16; it may be nullptr if that is 0.
int fusewright_cuda_norm_backward(const fusewright::NormBackwardParams* params, float* workspace, void* stream);
int fusewright_cuda_norm_backward_workspace(const fusewright::NormBackwardParams* params, int64_t* bytes);

// The kernel's type is that of input; output has that type or float32.
int fusewright_cuda_softmax_forward(const fusewright::SoftmaxForwardParams* params, void* stream);

// The kernel's type is that of grad_input; grad_output and output have that type or float32.
int fusewright_cuda_softmax_backward(const fusewright::SoftmaxBackwardParams* params, void* stream);

// All operands of one type.
int fusewright_cuda_swiglu_forward(const fusewright::SwigluForwardParams* params, void* stream);
int fusewright_cuda_swiglu_backward(const fusewright::SwigluBackwardParams* params, void* stream);
int fusewright_cuda_dropout_add(const fusewright::DropoutAddParams* params, void* stream);
int fusewright_cuda_rotary(const fusewright::RotaryParams* params, void* stream);

// The same; `bias`, one row of N, may have another type or be absent. grad_bias is contiguous, of any type, absent if
// `bias` is. `workspace` holds the bytes that the entry before tells for the same arguments on the same device, aligned
// to 16.
int fusewright_cuda_bias_gelu_forward(const fusewright::BiasGeluForwardParams* params, const fusewright::RowView* bias,
                                      void* stream);
int fusewright_cuda_bias_gelu_backward_workspace(const fusewright::BiasGeluBackwardParams* params,
                                                 const fusewright::RowView* bias, int64_t* bytes);
int fusewright_cuda_bias_gelu_backward(const fusewright::BiasGeluBackwardParams* params,
                                       const fusewright::RowView* bias, const fusewright::RowView* grad_bias,
                                       float* workspace, void* stream);

// grad_input has the type of input; probabilities and grad_target have any.
int fusewright_cuda_cross_entropy_forward(const fusewright::CrossEntropyForwardParams* params, void* stream);
int fusewright_cuda_cross_entropy_backward(const fusewright::CrossEntropyBackwardParams* params, void* stream);

// bfloat16 or float16, D and DV multiples of 8 up to 128, rows aligned to 16 bytes, no mask but the window, nothing
// else that changes logits or weights; on a device of compute capability 9.0. `shift` is S - T where windows align
// bottom-right, else 0.
int fusewright_cuda_attention_forward(const fusewright::AttentionForwardParams* params, int64_t shift, void* stream);

// The same; rows of output and gradient are aligned alike. A gradient of data nullptr is not written. `workspace` holds
// the bytes that fusewright_cuda_attention_backward_workspace tells, aligned to 16. `ordered`: grad_query repeats bit
// for bit, as the others always do.
int fusewright_cuda_attention_backward(const fusewright::AttentionBackwardParams* params, int64_t shift, bool ordered,
                                       void* workspace, void* stream);
int64_t fusewright_cuda_attention_backward_workspace(const fusewright::AttentionBackwardParams* params);

// bfloat16 or float16, D and DV multiples of 8 up to 128, rows aligned to 16 bytes, no mask but the window to the left,
// no dropout. `lengths` (B,) is in device memory. `workspace` holds the bytes that
// fusewright_cuda_attention_decode_workspace tells, aligned to 16.
int fusewright_cuda_attention_decode(const fusewright::AttentionDecodeParams* params, const int64_t* lengths,
                                     void* workspace, void* stream);
int64_t fusewright_cuda_attention_decode_workspace(const fusewright::AttentionDecodeParams* params);

// bfloat16 or float16. `workspace` holds the bytes that the entry before tells for the same params on the same device,
// aligned to 16, and is cleared on the stream where need be. The launch is cooperative.
int fusewright_cuda_recurrent_forward_workspace(const fusewright::RecurrentForwardStepsParams* params, int64_t* bytes);
int fusewright_cuda_recurrent_forward(const fusewright::RecurrentForwardStepsParams* params, void* workspace,
                                      void* stream);
int fusewright_cuda_recurrent_backward_workspace(const fusewright::RecurrentBackwardStepsParams* params,
                                                 int64_t* bytes);
int fusewright_cuda_recurrent_backward(const fusewright::RecurrentBackwardStepsParams* params, void* workspace,
                                       void* stream);
// taken (T, B, I) = input, all of 16-bit elements, with zeros for what lies behind a sample's end.
int fusewright_cuda_recurrent_taken_rows(const void* input, const int64_t* lengths, void* taken, int64_t time,
                                         int64_t batch, int64_t width, void* stream);

int fusewright_cuda_lsh_hash(const fusewright::LshDigitParams* params, void* stream);
// `workspace` holds the bytes that the entry below tells, aligned to 16.
int fusewright_cuda_lsh_sort(const fusewright::LshSortParams* params, void* workspace, void* stream);
int64_t fusewright_cuda_lsh_sort_workspace(const fusewright::LshSortParams* params);
}
#pragma GCC visibility pop
