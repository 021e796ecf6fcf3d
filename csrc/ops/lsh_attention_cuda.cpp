// CUDA kernels of LSH hashing and sorting, attached to the schemas of fusewright_kernels/library/lsh_attention.py.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "cuda_call.h"
#include "heads_tensor.h"

namespace fusewright::ops {
namespace {

using std::optional;

Tensor lsh_hash(Tensor vectors, std::vector<Tensor> rotations, optional<Tensor> key_padding_mask) {
  const CudaCall call("lsh_hash", vectors);
  LshDigitParams params;
  params.batch = vectors.size(0);
  params.heads = vectors.size(1);
  params.length = vectors.size(2);
  params.width = vectors.size(3);
  params.rounds = rotations.front().size(2);
  params.dtype = data_type(vectors.scalar_type());
  params.vectors = heads_view(vectors);
  const int64_t sizes[4] = {params.batch, params.heads, params.rounds, params.length};
  Tensor buckets = empty(sizes, 4, ScalarType::Long, vectors);
  params.buckets = static_cast<int64_t*>(buckets.data_ptr());
  const optional<Tensor> padding =
      key_padding_mask.has_value() ? optional<Tensor>(torch::stable::contiguous(*key_padding_mask)) : std::nullopt;
  params.place_value = 1;
  for (size_t number = 0; number < rotations.size(); ++number) {
    const Tensor& factor = rotations[number];
    params.rotations = static_cast<const float*>(factor.data_ptr());
    params.rotation_head_stride = factor.stride(0);
    params.rotation_row_stride = factor.stride(1);
    params.rotation_round_stride = factor.stride(2);
    params.rotation_column_stride = factor.stride(3);
    params.columns = factor.size(3);
    params.first_digit = number == 0;
    if (padding.has_value() && number + 1 == rotations.size()) {
      params.key_padding = static_cast<const bool*>(padding->data_ptr());
    }
    call.check(fusewright_cuda_lsh_hash(&params, call.stream()));
    params.place_value *= 2 * params.columns;
  }
  return buckets;
}

Tensor lsh_sort(Tensor buckets, int64_t n_buckets) {
  const CudaCall call("lsh_sort", buckets);
  const int64_t sizes[4] = {buckets.size(0), buckets.size(1), buckets.size(2), buckets.size(3)};
  const Tensor unit = torch::stable::contiguous(buckets);
  Tensor order = empty(sizes, 4, ScalarType::Int, buckets);
  LshSortParams params;
  params.buckets = static_cast<const int64_t*>(unit.data_ptr());
  params.rows = sizes[0] * sizes[1] * sizes[2];
  params.length = sizes[3];
  params.n_buckets = n_buckets;
  params.order = static_cast<int32_t*>(order.data_ptr());
  const int64_t bytes[1] = {fusewright_cuda_lsh_sort_workspace(&params)};
  Tensor workspace = empty(bytes, 1, ScalarType::Byte, buckets);
  call.check(fusewright_cuda_lsh_sort(&params, workspace.data_ptr(), call.stream()));
  return order;
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, FUSEWRIGHT_CUDA_KEY, library) {
  library.impl("lsh_hash.cuda", TORCH_BOX(&fusewright::ops::lsh_hash));
  library.impl("lsh_sort.cuda", TORCH_BOX(&fusewright::ops::lsh_sort));
}
