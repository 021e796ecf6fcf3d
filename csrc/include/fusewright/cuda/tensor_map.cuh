// Copies of tiles between tensors in global memory and shared memory, by the tensor memory accelerator. Needs sm_90.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "fusewright/cuda/mbarrier.cuh"
#include "fusewright/row_view.h"

namespace fusewright::cuda {

// Dimensions from the fastest; strides in elements, that of dimension 0 is 1.
struct TensorMapShape {
  void* data;
  DataType dtype;
  int64_t size[4];
  int64_t stride[4];
  int box[4];
};

// What the accelerator takes: 16-byte alignment of every row, 32-bit sizes.
inline bool takes_tensor_map(const TensorMapShape& shape) {
  const int64_t bytes = shape.dtype == DataType::float32 ? 4 : 2;
  if (reinterpret_cast<uintptr_t>(shape.data) % 16 != 0) return false;
  for (int dim = 0; dim < 4; ++dim) {
    if (shape.size[dim] < 1 || shape.size[dim] > int64_t{0x7FFFFFFF}) return false;
    const int64_t stride = shape.stride[dim] * bytes;
    if (dim > 0 && shape.size[dim] > 1 && (stride % 16 != 0 || stride <= 0 || stride >= int64_t{1} << 40)) return false;
  }
  return true;
}

using TensorMapEncoder = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found without linking to the driver, which a machine that only builds has not; nullptr where
// it is missing.
inline TensorMapEncoder find_tensor_map_encoder() {
#if defined(__CUDACC__)
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<TensorMapEncoder>(entry) : nullptr;
#else
  return &cuTensorMapEncodeTiled;
#endif
}

// Boxes of 64 16-bit elements a row, which lie in shared memory with the 128-byte swizzle: 16-byte chunk c of row r is
// chunk c ^ (r % 8) there. Elements outside the tensor read as 0 and are not written.
inline cudaError_t encode_tensor_map(CUtensorMap& map, const TensorMapShape& shape) {
  static const TensorMapEncoder encode = find_tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint64_t sizes[4], strides[3];
  cuuint32_t box[4], element_strides[4];
  for (int dim = 0; dim < 4; ++dim) {
    sizes[dim] = static_cast<cuuint64_t>(shape.size[dim]);
    box[dim] = static_cast<cuuint32_t>(shape.box[dim]);
    element_strides[dim] = 1;
    // The stride of a dimension of one is never used, and may be anything.
    if (dim > 0) strides[dim - 1] = shape.size[dim] > 1 ? static_cast<cuuint64_t>(shape.stride[dim]) * 2 : 16;
  }
  const auto type =
      shape.dtype == DataType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(&map, type, 4, shape.data, sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// One thread starts the copy of a box; its bytes, those outside the tensor included, are counted by `barrier`.
#if defined(__CUDACC__)

__device__ __forceinline__ void tensor_load(void* shared, const CUtensorMap* map, uint64_t* barrier, int at0, int at1,
                                            int at2, int at3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(at0), "r"(at1), "r"(at2), "r"(at3)
      : "memory");
}

// The same to every block of the cluster that `ranks` has a bit for, at the same place of its shared memory, counted by
// the barrier at the same place.
__device__ __forceinline__ void tensor_load_multicast(void* shared, const CUtensorMap* map, uint64_t* barrier, int at0,
                                                      int at1, int at2, int at3, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(at0), "r"(at1), "r"(at2), "r"(at3), "h"(ranks)
      : "memory");
}

// One thread starts the store of a box; bulk_copy.cuh has what it waits with.
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, const void* shared, int at0, int at1, int at2,
                                             int at3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(at0), "r"(at1), "r"(at2), "r"(at3)
               : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

#else

inline void tensor_load(void* shared, const CUtensorMap* map, uint64_t* barrier, int at0, int at1, int at2, int at3) {
  const int at[4] = {at0, at1, at2, at3};
  emulation::tensor_load(shared, map, barrier, at);
}

inline void tensor_load_multicast(void* shared, const CUtensorMap* map, uint64_t* barrier, int at0, int at1, int at2,
                                  int at3, uint16_t ranks) {
  const int at[4] = {at0, at1, at2, at3};
  emulation::tensor_load_multicast(shared, map, barrier, at, ranks);
}

inline void tensor_store(const CUtensorMap* map, const void* shared, int at0, int at1, int at2, int at3) {
  const int at[4] = {at0, at1, at2, at3};
  emulation::tensor_store(map, shared, at);
}

inline void prefetch_tensor_map(const CUtensorMap*) {}

#endif

}  // namespace fusewright::cuda
