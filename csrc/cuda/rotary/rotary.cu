// Rotary position embedding, (a, b) -> (a cos - b sin, a sin + b cos). Short: all element types share this source.

#include "fusewright/cuda/element_tile.cuh"
#include "fusewright/cuda_api.h"
#include "fusewright/rotary.h"

namespace fusewright::cuda {
namespace {

// Where the angles of a row start in the tables, or -1 for a position that they do not have.
__device__ __forceinline__ int64_t table_offset(const RotaryParams& params, int64_t row) {
  const int64_t outer = row / (params.heads_inside ? params.heads : params.length);
  const int64_t b = outer / (params.heads_inside ? params.length : params.heads);
  const int64_t t = params.heads_inside ? outer % params.length : row % params.length;
  const int64_t position = params.positions == nullptr ? t : params.positions[b * params.length + t];
  if (position < 0 || position >= params.table_rows) return -1;
  return b * params.table_stride + position * params.pairs;
}

// `Pairs` adjacent pairs of a row: halves are two vectors in memory, interleaved pairs one of twice the width.
template <class T, int Pairs, bool Interleaved>
struct PairVector {
  float first[Pairs];
  float second[Pairs];

  // `stride` is that of columns; with several pairs it is 1.
  __device__ __forceinline__ void load(const T* row, int64_t i_pair, int64_t pairs, int64_t stride) {
    if constexpr (!Interleaved) {
      load_vector(row + i_pair * stride, first);
      load_vector(row + (i_pair + pairs) * stride, second);
    } else if constexpr (Pairs == 1) {
      load_vector(row + 2 * i_pair * stride, first);
      load_vector(row + (2 * i_pair + 1) * stride, second);
    } else {
      float both[2 * Pairs];
      load_vector(row + 2 * i_pair, both);
#pragma unroll
      for (int i = 0; i < Pairs; ++i) {
        first[i] = both[2 * i];
        second[i] = both[2 * i + 1];
      }
    }
  }

  __device__ __forceinline__ void store(T* row, int64_t i_pair, int64_t pairs, int64_t stride) const {
    if constexpr (!Interleaved) {
      store_vector(row + i_pair * stride, first);
      store_vector(row + (i_pair + pairs) * stride, second);
    } else if constexpr (Pairs == 1) {
      store_vector(row + 2 * i_pair * stride, first);
      store_vector(row + (2 * i_pair + 1) * stride, second);
    } else {
      float both[2 * Pairs];
#pragma unroll
      for (int i = 0; i < Pairs; ++i) {
        both[2 * i] = first[i];
        both[2 * i + 1] = second[i];
      }
      store_vector(row + 2 * i_pair, both);
    }
  }

 private:
  template <int Width>
  static __device__ __forceinline__ void load_vector(const T* source, float (&values)[Width]) {
    Packed<T, Width> packed;
    packed.load(source);
    packed.unpack(values);
  }

  template <int Width>
  static __device__ __forceinline__ void store_vector(T* target, const float (&values)[Width]) {
    Packed<T, Width> packed;
    packed.pack(values);
    packed.store(target);
  }
};

template <class T, int Pairs, bool Interleaved>
__global__ void __launch_bounds__(element_tile_threads) rotary_kernel(const __grid_constant__ RotaryParams params) {
  const int64_t row = block_index() * blockDim.y + threadIdx.y;
  if (row >= params.rows) return;
  const T* input = static_cast<const T*>(params.input.data) + params.input.row_offset(row);
  T* output = static_cast<T*>(params.output.data) + params.output.row_offset(row);
  const int64_t input_stride = Pairs > 1 ? 1 : params.input.inner_stride[0];
  const int64_t output_stride = Pairs > 1 ? 1 : params.output.inner_stride[0];
  const int64_t angles = table_offset(params, row);
  const float direction = params.inverse ? -1.0f : 1.0f;

  for (int64_t i_pair = threadIdx.x * Pairs; i_pair < params.pairs; i_pair += blockDim.x * Pairs) {
    Packed<float, Pairs> packed_cos, packed_sin;
    float cos[Pairs], sin[Pairs];
    PairVector<T, Pairs, Interleaved> pair;
    pair.load(input, i_pair, params.pairs, input_stride);
    if (angles >= 0) {
      packed_cos.load(params.cos + angles + i_pair);
      packed_sin.load(params.sin + angles + i_pair);
      packed_cos.unpack(cos);
      packed_sin.unpack(sin);
    }
#pragma unroll
    for (int i = 0; i < Pairs; ++i) {
      const float c = angles >= 0 ? cos[i] : NAN;
      const float s = angles >= 0 ? sin[i] * direction : NAN;
      const float a = pair.first[i], b = pair.second[i];
      pair.first[i] = a * c - b * s;
      pair.second[i] = a * s + b * c;
    }
    pair.store(output, i_pair, params.pairs, output_stride);
  }
  if (input == output) return;
  for (int64_t column = 2 * params.pairs + threadIdx.x; column < params.columns; column += blockDim.x) {
    output[column * params.output.inner_stride[0]] = input[column * params.input.inner_stride[0]];
  }
}

template <class T, int Pairs>
cudaError_t launch_rotary(const RotaryParams& params, void* stream) {
  const dim3 block = element_tile_block(params.pairs, Pairs, element_tile_threads);
  const dim3 grid = grid_of(ceil_div(params.rows, block.y));
  return params.interleaved ? launch(rotary_kernel<T, Pairs, true>, grid, block, 0, stream, params)
                            : launch(rotary_kernel<T, Pairs, false>, grid, block, 0, stream, params);
}

cudaError_t rotary(const RotaryParams& params, void* stream) {
  if (params.rows == 0 || params.columns == 0) return cudaSuccess;
  if (params.output.dtype != params.input.dtype) return cudaErrorInvalidValue;
  return with_element_type(params.input.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int width = full_vector<T>;
    const bool vectors = take_vectors({&params.input, &params.output}, params.pairs, width) &&
                         is_aligned(params.cos, 16) && is_aligned(params.sin, 16);
    return vectors ? launch_rotary<T, width>(params, stream) : launch_rotary<T, 1>(params, stream);
  });
}

}  // namespace
}  // namespace fusewright::cuda

int fusewright_cuda_rotary(const fusewright::RotaryParams* params, void* stream) {
  return fusewright::cuda::rotary(*params, stream);
}
