// The entry that a test of mutated attention kernels calls: one instantiation.

#include "attention_forward_entry.h"
#include "attention_forward_sm90.cuh"

template cudaError_t fusewright::cuda::attention_forward_sm90<__nv_bfloat16, 64>(const AttentionForwardParams&, int64_t,
                                                                                 void*);

extern "C" int attention(void* query, void* key, void* value, void* output, float* statistics, int64_t heads,
                         int64_t key_heads, int64_t queries, int64_t keys, int causal) {
  return fusewright::cuda::attention_forward_sm90<__nv_bfloat16, 64>(
      forward_params(query, key, value, output, statistics, heads, key_heads, queries, keys, causal), 0, nullptr);
}
