// The entry that a test of mutated decoding kernels calls: one instantiation, one sequence, caches (capacity, 64)
// contiguous and one key head.

extern "C" {
int fault = 0;
void set_fault(int number) { fault = number; }
}

#include "attention_decode_launch.cuh"

template cudaError_t fusewright::cuda::attention_decode<__nv_bfloat16, 64>(const AttentionDecodeKernelParams&, int64_t,
                                                                           void*);

using namespace fusewright;

// tensors: query (heads, queries, 64), key, value, lengths, output, statistics, workspace.
extern "C" int attention_decode(void** tensors, int64_t heads, int64_t queries, int64_t capacity) {
  constexpr int64_t width = 64;
  cuda::AttentionDecodeKernelParams params = {};
  params.query = {tensors[0], 0, queries * width, width};
  params.key = {tensors[1], 0, 0, width};
  params.value = {tensors[2], 0, 0, width};
  params.lengths = static_cast<const int64_t*>(tensors[3]);
  params.output = {tensors[4], 0, queries * width, width};
  params.maximum = static_cast<float*>(tensors[5]);
  params.total = params.maximum + heads * queries;
  params.heads = params.group = static_cast<int>(heads);
  params.queries = static_cast<int>(queries);
  params.width = params.value_width = width;
  params.parts = static_cast<int>(cuda::ceil_div(capacity, cuda::attention_part_keys));
  params.window_left = -1;
  params.scale = 0.125f;
  params.part_sums = static_cast<float*>(tensors[6]);
  params.part_references = params.part_sums + heads * queries * params.parts * width;
  params.part_totals = params.part_references + heads * queries * params.parts;
  return cuda::attention_decode<__nv_bfloat16, 64>(params, 1, nullptr);
}
