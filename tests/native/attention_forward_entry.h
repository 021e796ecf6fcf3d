// What a test of a mutated forward kernel calls: tensors (heads, length, 64) contiguous.
#pragma once

#include "fusewright/attention.h"

extern "C" {
int fault = 0;
void set_fault(int number) { fault = number; }
}

inline fusewright::AttentionForwardParams forward_params(void* query, void* key, void* value, void* output,
                                                         float* statistics, int64_t heads, int64_t key_heads,
                                                         int64_t queries, int64_t keys, int causal) {
  constexpr int64_t width = 64;
  fusewright::AttentionForwardParams params = {};
  params.batch = 1;
  params.heads = heads;
  params.key_heads = key_heads;
  params.queries = queries;
  params.keys = keys;
  params.width = params.value_width = width;
  params.dtype = fusewright::DataType::bfloat16;
  params.query = {query, heads * queries * width, queries * width, width};
  params.key = {key, key_heads * keys * width, keys * width, width};
  params.value = {value, key_heads * keys * width, keys * width, width};
  params.output = {output, heads * queries * width, queries * width, width};
  params.maximum = statistics;
  params.total = statistics + heads * queries;
  params.scale = 0.125f;
  params.window_left = -1;
  params.window_right = causal != 0 ? 0 : -1;
  return params;
}
