// The entry that a test of mutated attention of packed sequences calls: one instantiation.

#include "attention_forward_entry.h"
#include "attention_forward_sm90.cuh"

template cudaError_t fusewright::cuda::attention_forward_sm90<__nv_bfloat16, 64>(const AttentionForwardParams&, int64_t,
                                                                                 void*);

extern "C" int attention(void* query, void* key, void* value, void* output, float* statistics, int64_t* query_offsets,
                         int64_t* key_offsets, int64_t count, int64_t queries, int64_t keys) {
  auto params = forward_params(query, key, value, output, statistics, 1, 1, queries, keys, 1);
  params.packing.query_offsets = query_offsets;
  params.packing.key_offsets = key_offsets;
  params.packing.wide_query_offsets = params.packing.wide_key_offsets = true;
  params.packing.bottom_right = true;
  params.packing.count = count;
  return fusewright::cuda::attention_forward_sm90<__nv_bfloat16, 64>(params, 0, nullptr);
}
