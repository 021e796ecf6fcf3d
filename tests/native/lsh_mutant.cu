// The entries that a test of mutated LSH kernels calls: hashing of one head in one round in bfloat16, and sorting of
// one row. The faults are in the sources; `planted` says which of them acts.

#include "lsh_hash.cuh"
#include "lsh_sort.cuh"

using namespace fusewright;

extern "C" int planted;
int planted = 0;

template cudaError_t cuda::lsh_hash<__nv_bfloat16>(const LshDigitParams&, void*);

extern "C" int hash(void* vectors, const float* rotations, int64_t* buckets, int length, int width, int columns) {
  LshDigitParams params = {};
  params.batch = params.heads = params.rounds = 1;
  params.length = length;
  params.width = width;
  params.dtype = DataType::bfloat16;
  params.vectors = {vectors, 0, 0, width};
  params.rotations = rotations;
  params.rotation_row_stride = columns;
  params.rotation_column_stride = 1;
  params.columns = columns;
  params.place_value = 1;
  params.first_digit = true;
  params.buckets = buckets;
  return cuda::lsh_hash<__nv_bfloat16>(params, nullptr);
}

static LshSortParams sort_params(int length, int n_buckets) {
  LshSortParams params = {};
  params.rows = 1;
  params.length = length;
  params.n_buckets = n_buckets;
  return params;
}

extern "C" int workspace_bytes(int length, int n_buckets) {
  const cuda::SortPlan plan(sort_params(length, n_buckets));
  return static_cast<int>((plan.counts + plan.scratch) * sizeof(int32_t));
}

extern "C" int sort(const int64_t* buckets, int32_t* order, int32_t* workspace, int length, int n_buckets) {
  LshSortParams params = sort_params(length, n_buckets);
  params.buckets = buckets;
  params.order = order;
  return cuda::lsh_sort(params, workspace, nullptr);
}
