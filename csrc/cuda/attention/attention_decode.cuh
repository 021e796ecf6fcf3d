// What the kernels of attention over a cache share, and the launch that attention_decode.cu chooses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "fusewright/attention.h"
#include "fusewright/cuda/launch.cuh"

namespace fusewright::cuda {

// Keys of one part of a sequence. Fixed, so that a row's bits do not depend on the batch or the device.
constexpr int attention_part_keys = 256;

struct AttentionDecodeKernelParams {
  HeadsView query, key, value, output;
  const int64_t *lengths, *block_table;
  int64_t block_table_stride;
  const float *alibi_slopes, *sinks;
  int64_t alibi_batch_stride;
  float *maximum, *total;  // (B, H, T)
  float *part_sums, *part_references,
      *part_totals;  // (B, H, T, parts, DV) and (B, H, T, parts)
  int page_size;     // 0 without pages
  int heads, group, queries, width, value_width, parts;
  int window_left;  // -1 is no limit
  float scale, softcap;

  // Key `key` of a sequence, its first element.
  template <class T>
  __device__ __forceinline__ const T* row(const HeadsView& cache, int batch, int key_head, int key) const {
    int64_t page = batch;
    if (page_size != 0) {
      page = block_table[batch * block_table_stride + key / page_size];
      key %= page_size;
    }
    return static_cast<const T*>(cache.data) + cache.offset(page, key_head, key);
  }

  // The keys that query `i_query` of a sequence sees: from first_key() to its own position, which may be negative.
  __device__ __forceinline__ int position(int length, int i_query) const { return length - queries + i_query; }
  __device__ __forceinline__ int first_key(int position) const {
    return window_left < 0 ? 0 : max(0, position - window_left);
  }
  // The part that the first of them lies in.
  __device__ __forceinline__ int first_part(int length) const {
    return first_key(position(length, 0)) / attention_part_keys;
  }

  // The logit of a product in the exponent's unit.
  __device__ __forceinline__ float logit(float product, float slope, int distance) const {
    constexpr float log2_e = 1.4426950408889634f;
    float value = product * scale;
    if (softcap > 0.0f) value = softcap * tanhf(value / softcap);
    return (value - slope * static_cast<float>(distance)) * log2_e;
  }
  __device__ __forceinline__ float slope(int batch, int head) const {
    return alibi_slopes == nullptr ? 0.0f : alibi_slopes[batch * alibi_batch_stride + head];
  }
};

// Parts of a sequence that a row sees at most.
inline int64_t attention_decode_parts(const AttentionDecodeParams& params, int64_t capacity) {
  const int64_t every = std::max<int64_t>(1, ceil_div(capacity, attention_part_keys));
  if (params.window_left < 0) return every;
  // Wherever its keys begin within one.
  return std::min(every, ceil_div(params.window_left + params.queries, attention_part_keys) + 1);
}

// The instantiation of one element type and number of columns.
template <class T, int D>
cudaError_t attention_decode(const AttentionDecodeKernelParams& params, int64_t batch, void* stream);

extern template cudaError_t attention_decode<__nv_bfloat16, 64>(const AttentionDecodeKernelParams&, int64_t, void*);
extern template cudaError_t attention_decode<__nv_bfloat16, 128>(const AttentionDecodeKernelParams&, int64_t, void*);
extern template cudaError_t attention_decode<__half, 64>(const AttentionDecodeKernelParams&, int64_t, void*);
extern template cudaError_t attention_decode<__half, 128>(const AttentionDecodeKernelParams&, int64_t, void*);

}  // namespace fusewright::cuda
