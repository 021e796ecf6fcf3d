// Small kernels that show where the emulated Hopper instructions expect and leave their elements.

#include "fusewright/cuda/bulk_copy.cuh"
#include "fusewright/cuda/cluster.cuh"
#include "fusewright/cuda/launch.cuh"
#include "fusewright/cuda/mma.cuh"
#include "fusewright/cuda/reduce.cuh"
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

struct CopyParams {
  CUtensorMap source, target;
};

constexpr int copied_row = -3;

// Rows from copied_row to the same rows: those beside the tensors read as 0 and are not written.
__global__ void copy_kernel(const __grid_constant__ CopyParams params) {
  Tiles& tiles = *dynamic_shared<Tiles>();
  if (threadIdx.x != 0) return;
  mbarrier_init(&tiles.full, 1);
  mbarrier_fence_init();
  mbarrier_arrive_expect_bytes(&tiles.full, slab_bytes);
  tensor_load(tiles.a.data, &params.source, &tiles.full, 0, copied_row, 0, 0);
  mbarrier_wait(&tiles.full, 0);
  tensor_store(&params.target, tiles.a.data, 0, copied_row, 0, 0);
  bulk_commit();
  bulk_wait_read<0>();
}

// One block of a cluster of two loads for both; each stores its tile to its own half of the target.
__global__ void multicast_kernel(const __grid_constant__ CopyParams params, bool ordered) {
  Tiles& tiles = *dynamic_shared<Tiles>();
  if (threadIdx.x == 0) {
    mbarrier_init(&tiles.full, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect_bytes(&tiles.full, slab_bytes);
  }
  if (ordered) cluster_sync();
  if (threadIdx.x == 0) {
    if (cluster_rank() == 1) tensor_load_multicast(tiles.a.data, &params.source, &tiles.full, 0, 0, 0, 0, 3);
    mbarrier_wait(&tiles.full, 0);
    tensor_store(&params.target, tiles.a.data, 0, cluster_rank() * tile_rows, 0, 0);
    bulk_commit();
    bulk_wait_read<0>();
  }
  cluster_sync();
}

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

struct alignas(16) WarpTiles {
  uint16_t a[16][16];
  uint16_t b[16][8];
};

// d (16, 8) = a b of matrices in rows, and the operands' registers.
__global__ void warp_product_kernel(const uint4* a, const uint4* b, uint32_t* registers_a, uint32_t* registers_b,
                                    float* d) {
  WarpTiles& tiles = *dynamic_shared<WarpTiles>();
  if (threadIdx.x >= warp_size) return;
  const int lane = threadIdx.x;
  copy_async(reinterpret_cast<uint4*>(tiles.a) + lane, a + lane, true);
  if (lane < 16) copy_async(reinterpret_cast<uint4*>(tiles.b) + lane, b + lane, true);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  uint32_t fragment_a[4], both_b[4];
  load_matrices<false>(fragment_a, &tiles.a[lane % 8 + 8 * (lane / 8 % 2)][8 * (lane / 16)]);
  load_matrices<true>(both_b, &tiles.b[lane % 16][0]);
  const uint32_t fragment_b[2] = {both_b[0], both_b[1]};
  float sums[4] = {};
  mma<__nv_bfloat16>(sums, fragment_a, fragment_b);
  // Through shared memory and back, the second time transposed twice.
  __syncwarp();
  store_matrices<false>(fragment_a, &tiles.a[lane % 16][8 * (lane / 16)]);
  __syncwarp();
  load_matrices<true>(fragment_a, &tiles.a[lane % 16][8 * (lane / 16)]);
  __syncwarp();
  store_matrices<true>(fragment_a, &tiles.a[lane % 16][8 * (lane / 16)]);
  __syncwarp();
  load_matrices<false>(fragment_a, &tiles.a[lane % 16][8 * (lane / 16)]);
  for (int i = 0; i < 4; ++i) registers_a[4 * lane + i] = fragment_a[i];
  for (int i = 0; i < 2; ++i) registers_b[2 * lane + i] = fragment_b[i];
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = sums[i];
}

TensorMapShape map_of(void* matrix, int64_t rows) {
  return {
      matrix, DataType::bfloat16, {slab_columns, rows, 1, 1}, {1, slab_columns, 1, 1}, {slab_columns, tile_rows, 1, 1}};
}

template <class... Arguments>
int run(void (*kernel)(Arguments...), Arguments... arguments) {
  return launch(kernel, dim3(1), dim3(warpgroup_size), sizeof(Tiles), nullptr, arguments...);
}

}  // namespace

extern "C" {

int rows_rows(const uint4* a, const uint4* b, float* d) { return run(rows_rows_kernel, a, b, d); }
int registers_columns(const uint4* a, const uint4* b, float* d) { return run(registers_columns_kernel, a, b, d); }

int warp_product(const uint4* a, const uint4* b, uint32_t* registers_a, uint32_t* registers_b, float* d) {
  return run(warp_product_kernel, a, b, registers_a, registers_b, d);
}

// From a contiguous (128, 64) matrix.
int load(void* matrix, uint4* shared_contents) {
  LoadParams params;
  const cudaError_t error = encode_tensor_map(params.map, map_of(matrix, tile_rows));
  return error != cudaSuccess ? error : run(load_kernel, params, shared_contents);
}

// Between contiguous (rows, 64) matrices.
int copy(void* source, int64_t source_rows, void* target, int64_t target_rows) {
  CopyParams params;
  cudaError_t error = encode_tensor_map(params.source, map_of(source, source_rows));
  if (error == cudaSuccess) error = encode_tensor_map(params.target, map_of(target, target_rows));
  return error != cudaSuccess ? error : run(copy_kernel, params);
}

// A contiguous (128, 64) matrix to both halves of a (256, 64) one.
int multicast(void* source, void* target, int ordered) {
  CopyParams params;
  cudaError_t error = encode_tensor_map(params.source, map_of(source, tile_rows));
  if (error == cudaSuccess) error = encode_tensor_map(params.target, map_of(target, 2 * tile_rows));
  if (error != cudaSuccess) return error;
  return launch_clusters(multicast_kernel, dim3(2), dim3(warpgroup_size), dim3(2), sizeof(Tiles), nullptr, params,
                         ordered != 0);
}

// Of operands at address 0.
uint64_t rows_descriptor() { return wgmma_rows(nullptr); }
uint64_t columns_descriptor() { return wgmma_columns(nullptr, slab_bytes); }
}
