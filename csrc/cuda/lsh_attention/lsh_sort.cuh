// A stable sort of positions by bucket: a counting sort by some bits after the other, the lowest first. Of each pass
// tiles of positions count their digits, a scan over the counts of a row tells where each tile's digits go, and the
// tiles place their positions there. Nothing depends on the order in which blocks or warps run.
#pragma once

#include "fusewright/cuda/launch.cuh"
#include "fusewright/cuda/reduce.cuh"
#include "fusewright/cuda/shared.cuh"
#include "fusewright/lsh_attention.h"

namespace fusewright::cuda {

constexpr int sort_bits = 8, sort_bins = 1 << sort_bits;
constexpr int sort_threads = 256, sort_warps = sort_threads / warp_size;
// Positions of a thread; a warp's are adjacent.
constexpr int sort_steps = 8;
constexpr int sort_tile = sort_threads * sort_steps;
constexpr int scan_threads = 1024;

struct SortPass {
  const int64_t* buckets;  // (rows, T)
  const int32_t* source;   // (rows, T): positions as the passes before left them, nullptr in the first
  int32_t* target;         // (rows, T)
  int32_t* counts;         // (rows, bins, tiles)
  int64_t length, tiles;
  int bins, shift;
};

// The places of one tile, and what lies there.
class SortTile {
 public:
  __device__ explicit SortTile(const SortPass& pass)
      : pass_(pass), row_(block_index() / pass.tiles), tile_(block_index() % pass.tiles) {}

  __device__ __forceinline__ int64_t row() const { return row_; }
  __device__ __forceinline__ int64_t place(int step) const {
    return tile_ * sort_tile + threadIdx.x / warp_size * (warp_size * sort_steps) + step * warp_size +
           threadIdx.x % warp_size;
  }
  __device__ __forceinline__ int32_t position(int64_t place) const {
    return pass_.source == nullptr ? static_cast<int32_t>(place) : pass_.source[row_ * pass_.length + place];
  }
  __device__ __forceinline__ int digit(int32_t position) const {
    return static_cast<int>(pass_.buckets[row_ * pass_.length + position] >> pass_.shift) & (pass_.bins - 1);
  }
  __device__ __forceinline__ int32_t& count(int bin) const {
    return pass_.counts[(row_ * pass_.bins + bin) * pass_.tiles + tile_];
  }

 private:
  const SortPass& pass_;
  int64_t row_, tile_;
};

__global__ void __launch_bounds__(sort_threads)
    lsh_sort_count_kernel(const __grid_constant__ SortPass pass, int64_t blocks) {
  struct Histogram {
    int counts[sort_bins];
  };
  auto& counts = block_shared<Histogram>().counts;
  if (block_index() >= blocks) return;
  const SortTile tile(pass);
  for (int bin = threadIdx.x; bin < pass.bins; bin += sort_threads) counts[bin] = 0;
  __syncthreads();
  for (int step = 0; step < sort_steps; ++step) {
    const int64_t place = tile.place(step);
    if (place < pass.length) atomicAdd(&counts[tile.digit(tile.position(place))], 1);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < pass.bins; bin += sort_threads) tile.count(bin) = counts[bin];
}

// In place of each count the sum of all before it, a row a block.
__global__ void __launch_bounds__(scan_threads)
    lsh_sort_scan_kernel(int32_t* counts, int64_t rows, int64_t counts_of_row) {
  struct WarpSums {
    int32_t sums[2][scan_threads / warp_size];
  };
  auto& warp_sums = block_shared<WarpSums>().sums;
  if (block_index() >= rows) return;
  int32_t* const row = counts + block_index() * counts_of_row;
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const auto inclusive = [lane](int32_t sum) {
#pragma unroll
    for (int distance = 1; distance < warp_size; distance *= 2) {
      const int32_t other = __shfl_up_sync(0xFFFFFFFFu, sum, distance);
      if (lane >= distance) sum += other;
    }
    return sum;
  };
  int32_t before = 0;
  int slot = 0;
  for (int64_t first = 0; first < counts_of_row; first += scan_threads) {
    const int64_t at = first + threadIdx.x;
    const int32_t count = at < counts_of_row ? row[at] : 0;
    const int32_t sum = inclusive(count);
    if (lane == warp_size - 1) warp_sums[slot][warp] = sum;
    __syncthreads();
    const int32_t sums = inclusive(warp_sums[slot][lane]);
    const int32_t earlier_warps = __shfl_sync(0xFFFFFFFFu, sums, max(warp - 1, 0));
    if (at < counts_of_row) row[at] = before + (warp > 0 ? earlier_warps : 0) + sum - count;
    before += __shfl_sync(0xFFFFFFFFu, sums, warp_size - 1);
    // The next barrier tells that everybody has read this slot.
    slot ^= 1;
  }
}

// The lanes whose digit is this lane's; none if it has none.
__device__ __forceinline__ unsigned lanes_of_digit(int digit, bool exists) {
  unsigned lanes = __ballot_sync(0xFFFFFFFFu, exists);
#pragma unroll
  for (int bit = 0; bit < sort_bits; ++bit) {
    const bool is_set = digit >> bit & 1;
    const unsigned set = __ballot_sync(0xFFFFFFFFu, is_set);
    lanes &= is_set ? set : ~set;
  }
  return exists ? lanes : 0;
}

__global__ void __launch_bounds__(sort_threads)
    lsh_sort_place_kernel(const __grid_constant__ SortPass pass, int64_t blocks) {
  // Of each warp: how many positions of a digit it has met; then where its first of them goes.
  struct Starts {
    int32_t starts[sort_warps][sort_bins];
  };
  auto& starts = block_shared<Starts>().starts;
  if (block_index() >= blocks) return;
  const SortTile tile(pass);
  const int lane = threadIdx.x % warp_size;
  int32_t* const own = starts[threadIdx.x / warp_size];
  for (int bin = lane; bin < pass.bins; bin += warp_size) own[bin] = 0;
  __syncwarp();

  int32_t positions[sort_steps], before[sort_steps];
  int digits[sort_steps];
#pragma unroll
  for (int step = 0; step < sort_steps; ++step) {
    const int64_t place = tile.place(step);
    const bool exists = place < pass.length;
    positions[step] = exists ? tile.position(place) : 0;
    digits[step] = exists ? tile.digit(positions[step]) : 0;
    const unsigned lanes = lanes_of_digit(digits[step], exists);
    const int rank = __popc(lanes & ((1u << lane) - 1));
    before[step] = own[digits[step]] + rank;
    __syncwarp();
    if (exists && rank == 0) own[digits[step]] += __popc(lanes);
    __syncwarp();
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < pass.bins; bin += sort_threads) {
    int32_t start = tile.count(bin);
#pragma unroll
    for (auto& of_warp : starts) {
      const int32_t count = of_warp[bin];
      of_warp[bin] = start;
      start += count;
    }
  }
  __syncthreads();
#pragma unroll
  for (int step = 0; step < sort_steps; ++step) {
    if (tile.place(step) < pass.length) {
      pass.target[tile.row() * pass.length + own[digits[step]] + before[step]] = positions[step];
    }
  }
}

// How many bits a pass sorts by, how many passes there are, and what they need beside the result.
struct SortPlan {
  int bits, passes;
  int64_t tiles, counts, scratch;  // elements of int32

  explicit SortPlan(const LshSortParams& params) {
    int needed = 1;
    while (needed < 63 && (params.n_buckets - 1) >> needed > 0) ++needed;
    passes = static_cast<int>(ceil_div(needed, sort_bits));
    bits = static_cast<int>(ceil_div(needed, passes));
    tiles = ceil_div(params.length, sort_tile);
    counts = params.rows * tiles << bits;
    scratch = passes > 1 ? params.rows * params.length : 0;
  }
};

inline cudaError_t lsh_sort(const LshSortParams& params, int32_t* workspace, void* stream) {
  const SortPlan plan(params);
  SortPass pass;
  pass.buckets = params.buckets;
  pass.source = nullptr;
  pass.counts = workspace;
  pass.length = params.length;
  pass.tiles = plan.tiles;
  pass.bins = 1 << plan.bits;
  const int64_t blocks = params.rows * plan.tiles;
  for (int number = 0; number < plan.passes; ++number) {
    pass.shift = number * plan.bits;
    // The last pass writes the result.
    pass.target = (plan.passes - number) % 2 == 1 ? params.order : workspace + plan.counts;
    cudaError_t error = launch(lsh_sort_count_kernel, grid_of(blocks), dim3(sort_threads), 0, stream, pass, blocks);
    if (error == cudaSuccess) {
      error = launch(lsh_sort_scan_kernel, grid_of(params.rows), dim3(scan_threads), 0, stream, pass.counts,
                     params.rows, pass.bins * plan.tiles);
    }
    if (error == cudaSuccess) {
      error = launch(lsh_sort_place_kernel, grid_of(blocks), dim3(sort_threads), 0, stream, pass, blocks);
    }
    if (error != cudaSuccess) return error;
    pass.source = pass.target;
  }
  return cudaSuccess;
}

}  // namespace fusewright::cuda
