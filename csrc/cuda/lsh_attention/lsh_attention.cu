// Entries of the kernels of LSH attention: hashing and sorting.

#include "fusewright/cuda_api.h"
#include "lsh_hash.cuh"
#include "lsh_sort.cuh"

namespace fusewright::cuda {
namespace {

cudaError_t hash(const LshDigitParams& params, void* stream) {
  if (params.batch * params.heads * params.rounds * params.length == 0) return cudaSuccess;
  switch (params.dtype) {
    case DataType::float32:
      return lsh_hash<float>(params, stream);
    case DataType::bfloat16:
      return lsh_hash<__nv_bfloat16>(params, stream);
    case DataType::float16:
      return lsh_hash<__half>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace fusewright::cuda

int fusewright_cuda_lsh_hash(const fusewright::LshDigitParams* params, void* stream) {
  return fusewright::cuda::hash(*params, stream);
}

int64_t fusewright_cuda_lsh_sort_workspace(const fusewright::LshSortParams* params) {
  const fusewright::cuda::SortPlan plan(*params);
  return (plan.counts + plan.scratch) * static_cast<int64_t>(sizeof(int32_t));
}

int fusewright_cuda_lsh_sort(const fusewright::LshSortParams* params, void* workspace, void* stream) {
  if (params->rows * params->length == 0) return cudaSuccess;
  return fusewright::cuda::lsh_sort(*params, static_cast<int32_t*>(workspace), stream);
}
