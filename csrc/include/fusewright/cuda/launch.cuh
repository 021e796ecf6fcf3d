// Host side of a launch: what the device offers, which rows take vector accesses, grid sizes.
// Nothing here allocates, synchronises or reads device memory, so a launch can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "fusewright/row_view.h"

namespace fusewright::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grid of at least `blocks` blocks, more than the 2^31 - 1 along x where need be; block_index() counts them.
inline dim3 grid_of(int64_t blocks) {
  const int64_t along_x = std::min<int64_t>(blocks, 2147483647);
  return dim3(static_cast<unsigned>(along_x), static_cast<unsigned>(ceil_div(blocks, along_x)));
}

__device__ __forceinline__ int64_t block_index() { return static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x; }

struct DeviceLimits {
  int generation = 0;  // the major number of the compute capability
  int multiprocessors = 0;
  int shared_bytes = 0;  // dynamic shared memory a block may ask for
};

inline cudaError_t query_device(DeviceLimits& limits) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limits.generation, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  // Reductions take up to 1 KiB of static shared memory beside the dynamic part.
  limits.shared_bytes -= 1024;
  return error;
}

constexpr int64_t size_of(DataType dtype) { return dtype == DataType::float32 ? 4 : 2; }

inline bool is_aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// Whether every row of `view` can be accessed in vectors of `width` elements; an absent operand can.
inline bool takes_vectors(const RowView& view, int64_t width) {
  if (view.data == nullptr) return true;
  const int64_t bytes = std::min<int64_t>(16, width * size_of(view.dtype));
  if (!view.unit_inner_stride() || !is_aligned(view.data, bytes)) return false;
  for (int dim = 0; dim < view.outer_dims; ++dim) {
    if (view.outer_stride[dim] * size_of(view.dtype) % bytes != 0) return false;
  }
  return true;
}

inline bool take_vectors(std::initializer_list<const RowView*> views, int64_t columns, int64_t width) {
  return columns % width == 0 &&
         std::all_of(views.begin(), views.end(), [&](const RowView* view) { return takes_vectors(*view, width); });
}

// Whether one stride leads from column to column in every operand.
inline bool have_one_stride(std::initializer_list<const RowView*> views) {
  return std::all_of(views.begin(), views.end(), [](const RowView* view) { return view->inner_dims <= 1; });
}

// Whether a kernel for type `dtype` can read or write `view`: activations are of that type or float32.
inline bool is_stream_of(const RowView& view, DataType dtype) {
  return view.data == nullptr || view.dtype == dtype || view.dtype == DataType::float32;
}

// Threads of a block that holds a row, `elements` of it in each thread.
inline int threads_for_row(int64_t columns, int64_t elements) {
  return static_cast<int>(ceil_div(ceil_div(columns, elements), 32) * 32);
}

// With one attribute of the launch, or none.
template <class... Parameters, class... Arguments>
cudaError_t launch_with(const cudaLaunchAttribute* attribute, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                        int64_t shared_bytes, void* stream, const Arguments&... arguments) {
  // More than 48 KiB, static shared memory included, has to be asked for. Always the same size: another thread may be
  // between this call and its own launch of the same kernel.
  if (shared_bytes > 47 * 1024) {
    DeviceLimits limits;
    cudaError_t error = query_device(limits);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   limits.shared_bytes);
    }
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[1] = {};
  if (attribute != nullptr) attributes[0] = *attribute;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = attribute != nullptr ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  // The runtime keeps a failed launch as its last error, where a later, unrelated check would find it.
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// In clusters of `cluster` blocks, which divide the grid.
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, dim3 cluster, int64_t shared_bytes,
                            void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster.x;
  attribute.val.clusterDim.y = cluster.y;
  attribute.val.clusterDim.z = cluster.z;
  const bool in_clusters = cluster.x * cluster.y * cluster.z > 1;
  return launch_with(in_clusters ? &attribute : nullptr, kernel, grid, block, shared_bytes, stream, arguments...);
}

// All blocks at the same time, so that they may wait for each other; an error where the device has no room for that.
template <class... Parameters, class... Arguments>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, void* stream,
                               const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  return launch_with(&attribute, kernel, grid, block, shared_bytes, stream, arguments...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  return launch_with(nullptr, kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace fusewright::cuda
