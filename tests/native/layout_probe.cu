// Small kernels that show where the emulated Hopper instructions expect and leave their elements.

#include "fusewright/cuda/launch.cuh"
#include "fusewright/cuda/shared.cuh"
#include "fusewright/cuda/tensor_map.cuh"
#include "fusewright/cuda/wgmma.cuh"

namespace {

using namespace fusewright;
using namespace fusewright::cuda;

constexpr int tile_rows = 128;
constexpr int slab_bytes = tile_rows * slab_row_bytes;

// 128 rows of 128 elements, in two slabs.
struct alignas(1024) Tile {
  unsigned char data[2 * slab_bytes];
};

struct Tiles {
  Tile a, b;
  uint64_t full;
};

__device__ void copy_tile(Tile& target, const uint4* source) {
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(Tile) / sizeof(uint4)); i += warpgroup_size) {
    reinterpret_cast<uint4*>(target.data)[i] = source[i];
  }
}

// d (64, 128) = a b^T over 64 columns, both as rows in shared memory; registers of each thread as they are.
__global__ void rows_rows_kernel(const uint4* a, const uint4* b, float* d) {
  Tiles& tiles = *dynamic_shared<Tiles>();
  copy_tile(tiles.a, a);
  copy_tile(tiles.b, b);
  fence_async_proxy();
  __syncthreads();
  float sums[64];
  wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    wgmma_rows_rows<__nv_bfloat16>(sums, wgmma_rows(tiles.a.data + 32 * k), wgmma_rows(tiles.b.data + 32 * k), k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>(sums);
  for (int i = 0; i < 64; ++i) d[threadIdx.x * 64 + i] = sums[i];
}

// d (64, 128) = a b with a (64, 16) in registers, four of each thread, and b's rows of 128 adjacent columns.
__global__ void registers_columns_kernel(const uint4* a, const uint4* b, float* d) {
  Tiles& tiles = *dynamic_shared<Tiles>();
  copy_tile(tiles.b, b);
  fence_async_proxy();
  __syncthreads();
  const uint4 four = a[threadIdx.x];
  const uint32_t operand[4] = {four.x, four.y, four.z, four.w};
  float sums[64] = {};
  wgmma_fence();
  wgmma_registers_columns<__nv_bfloat16>(sums, operand, wgmma_columns(tiles.b.data, slab_bytes), true);
  wgmma_commit();
  wgmma_wait<0>(sums);
  for (int i = 0; i < 64; ++i) d[threadIdx.x * 64 + i] = sums[i];
}

struct LoadParams {
  CUtensorMap map;
};

// A tile of 128 rows of 64 as the tensor copy leaves it.
__global__ void load_kernel(const __grid_constant__ LoadParams params, uint4* shared_contents) {
  Tiles& tiles = *dynamic_shared<Tiles>();
  if (threadIdx.x == 0) {
    mbarrier_init(&tiles.full, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect_bytes(&tiles.full, slab_bytes);
    tensor_load(tiles.a.data, &params.map, &tiles.full, 0, 0, 0, 0);
  }
  __syncthreads();
  mbarrier_wait(&tiles.full, 0);
  for (int i = threadIdx.x; i < slab_bytes / 16; i += warpgroup_size) {
    shared_contents[i] = reinterpret_cast<const uint4*>(tiles.a.data)[i];
  }
}

template <class... Arguments>
int run(void (*kernel)(Arguments...), Arguments... arguments) {
  return launch(kernel, dim3(1), dim3(warpgroup_size), sizeof(Tiles), nullptr, arguments...);
}

}  // namespace

extern "C" {

int rows_rows(const uint4* a, const uint4* b, float* d) { return run(rows_rows_kernel, a, b, d); }
int registers_columns(const uint4* a, const uint4* b, float* d) { return run(registers_columns_kernel, a, b, d); }

// From a contiguous (128, 64) matrix.
int load(void* matrix, uint4* shared_contents) {
  LoadParams params;
  const cudaError_t error = encode_tensor_map(params.map, {matrix,
                                                           DataType::bfloat16,
                                                           {slab_columns, tile_rows, 1, 1},
                                                           {1, slab_columns, 1, 1},
                                                           {slab_columns, tile_rows, 1, 1}});
  return error != cudaSuccess ? error : run(load_kernel, params, shared_contents);
}

// Of operands at address 0.
uint64_t rows_descriptor() { return wgmma_rows(nullptr); }
uint64_t columns_descriptor() { return wgmma_columns(nullptr, slab_bytes); }
}
