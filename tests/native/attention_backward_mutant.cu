// The entry that a test of mutated backward kernels calls: one instantiation, tensors (heads, length, 64) contiguous,
// one key head.

extern "C" {
int fault = 0;
void set_fault(int number) { fault = number; }
}

#include "attention_backward_launch_sm90.cuh"

template cudaError_t fusewright::cuda::attention_backward_sm90<__nv_bfloat16, 64>(const AttentionBackwardParams&,
                                                                                  int64_t, bool, void*, void*);

using namespace fusewright;

extern "C" {

AttentionPacking packing = {};
void pack_sequences(int64_t* query_offsets, int64_t* key_offsets, int64_t count) {
  packing = {query_offsets, key_offsets, true, true, false, count};
}

// tensors: query, key, value, output, grad_output, statistics, grad_query, grad_key, grad_value, workspace.
int attention_backward(void** tensors, int64_t heads, int64_t queries, int64_t keys, int causal, int ordered) {
  constexpr int64_t width = 64;
  const auto view = [&](int index, int64_t length) {
    return HeadsView{tensors[index], heads * length * width, length * width, width};
  };
  AttentionBackwardParams params = {};
  params.batch = params.key_heads = 1;
  params.heads = heads;
  params.queries = queries;
  params.keys = keys;
  params.width = params.value_width = width;
  params.dtype = DataType::bfloat16;
  params.query = view(0, queries);
  params.key = view(1, keys);
  params.value = view(2, keys);
  params.output = view(3, queries);
  params.grad_output = view(4, queries);
  params.maximum = static_cast<float*>(tensors[5]);
  params.total = params.maximum + heads * queries;
  params.grad_query = view(6, queries);
  params.grad_key = view(7, keys);
  params.grad_value = view(8, keys);
  params.scale = 0.125f;
  params.window_left = -1;
  params.window_right = causal != 0 ? 0 : -1;
  params.packing = packing;
  return cuda::attention_backward_sm90<__nv_bfloat16, 64>(params, 0, ordered != 0, tensors[9], nullptr);
}

int64_t attention_backward_workspace(int64_t heads, int64_t queries) {
  AttentionParams params = {};
  params.batch = 1;
  params.heads = heads;
  params.queries = queries;
  params.width = 64;
  params.packing = packing;
  return cuda::AttentionBackwardWorkspace::bytes(params);
}
}
