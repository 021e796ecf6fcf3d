// Products of a tile of vectors and a tile of rotations, as exact as float32 for every type of vectors: a rounded one
// would put one vector of a hundred elsewhere.
#pragma once

#include "fusewright/cuda/mma.cuh"
#include "fusewright/cuda/reduce.cuh"
#include "fusewright/cuda/shared.cuh"
#include "fusewright/cuda/vector.cuh"
#include "fusewright/lsh_attention.h"

namespace fusewright::cuda {

constexpr int hash_threads = 128;
constexpr int hash_rows = 64, hash_columns = 64;

// Where a block's vectors and rotations lie in global memory.
template <class T>
class HashOperands {
 public:
  // Elements of a row that a thread fetches together.
  static constexpr int group = 8;

  __device__ HashOperands(const LshDigitParams& params, int64_t batch, int64_t head, int64_t round, int64_t first_row)
      : vectors_(static_cast<const T*>(params.vectors.data) + params.vectors.offset(batch, head, first_row)),
        rotations_(params.rotations + head * params.rotation_head_stride + round * params.rotation_round_stride),
        rows_(params.length - first_row),
        row_stride_(params.vectors.row_stride),
        width_(params.width),
        columns_(params.columns),
        rotation_row_stride_(params.rotation_row_stride),
        rotation_column_stride_(params.rotation_column_stride),
        in_vectors_(row_stride_ % full_vector<T> == 0 && reinterpret_cast<uintptr_t>(vectors_) % 16 == 0) {}

  // Elements [k, k + group) of a row; zeros past the last row and the last element.
  __device__ __forceinline__ void fetch_row(int row, int64_t k, float (&values)[group]) const {
    const T* const source = vectors_ + row * row_stride_ + k;
    if (in_vectors_ && row < rows_ && k + group <= width_) {
      Packed<T, group> packed;
      packed.load(source);
      packed.unpack(values);
      return;
    }
#pragma unroll
    for (int i = 0; i < group; ++i) values[i] = row < rows_ && k + i < width_ ? load_float(source + i) : 0.0f;
  }

  __device__ __forceinline__ float fetch_rotation(int64_t k, int64_t column) const {
    if (k >= width_ || column >= columns_) return 0.0f;
    return rotations_[k * rotation_row_stride_ + column * rotation_column_stride_];
  }

 private:
  const T* vectors_;
  const float* rotations_;
  int64_t rows_, row_stride_, width_, columns_, rotation_row_stride_, rotation_column_stride_;
  bool in_vectors_;
};

// 16-bit vectors on tensor cores. A rotation is the sum of three bfloat16, a float16 the sum of two, all of them exact.
template <class T>
class HashProduct {
  using Operands = HashOperands<T>;
  static constexpr int vector_parts = std::is_same_v<T, __nv_bfloat16> ? 1 : 2;
  static constexpr int rotation_parts = 3;

 public:
  static constexpr int depth = 64;
  static constexpr int thread_rows = 2, thread_columns = hash_columns / 4;
  static constexpr int row_lanes = 4;

  __device__ HashProduct(const LshDigitParams& params, int64_t batch, int64_t head, int64_t round, int64_t first_row)
      : operands_(params, batch, head, round, first_row),
        shared_(block_shared<Shared>()),
        lane_(threadIdx.x % warp_size),
        warp_(threadIdx.x / warp_size) {}

  __device__ __forceinline__ int row(int i) const { return warp_ * 16 + lane_ / 4 + 8 * i; }
  __device__ __forceinline__ int column(int j) const { return j / 2 * 8 + lane_ % 4 * 2 + j % 2; }
  __device__ __forceinline__ float sum(int i, int j) const { return sums_[j / 2][2 * i + j % 2]; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& tile : sums_) {
#pragma unroll
      for (float& sum : tile) sum = 0.0f;
    }
  }

  __device__ __forceinline__ void fetch_rows(int64_t k) {
    constexpr int groups = depth / Operands::group;
#pragma unroll
    for (int i = threadIdx.x; i < hash_rows * groups; i += hash_threads) {
      const int row = i / groups, group = i % groups * Operands::group;
      float values[Operands::group];
      operands_.fetch_row(row, k + group, values);
      store_parts(shared_.vectors, row, group, values);
    }
  }

  // Columns become rows of shared memory, whose elements are adjacent along k as those of vectors are.
  __device__ __forceinline__ void fetch_rotations(int64_t k, int64_t first) {
#pragma unroll
    for (int i = threadIdx.x; i < hash_columns * (depth / Operands::group); i += hash_threads) {
      const int column = i % hash_columns, group = i / hash_columns * Operands::group;
      float values[Operands::group];
#pragma unroll
      for (int e = 0; e < Operands::group; ++e) {
        values[e] = operands_.fetch_rotation(k + group + e, first + column);
      }
      store_parts(shared_.rotations, column, group, values);
    }
  }

  __device__ __forceinline__ void multiply() {
#pragma unroll
    for (int k = 0; k < depth; k += 16) {
      uint32_t vectors[vector_parts][4];
#pragma unroll
      for (int part = 0; part < vector_parts; ++part) {
        load_matrices<false>(vectors[part], &shared_.vectors[part][warp_ * 16 + lane_ % 16][k + lane_ / 16 * 8]);
      }
#pragma unroll
      for (int pair = 0; pair < hash_columns / 16; ++pair) {
#pragma unroll
        for (int part = 0; part < rotation_parts; ++part) {
          uint32_t rotations[4];
          load_matrices<false>(rotations,
                               &shared_.rotations[part][pair * 16 + lane_ / 16 * 8 + lane_ % 8][k + lane_ / 8 % 2 * 8]);
          // The product of the smallest parts would be lost in the rounding of the others.
#pragma unroll
          for (int own = 0; own < vector_parts && own + part < rotation_parts; ++own) {
            const uint32_t first[2] = {rotations[0], rotations[1]}, second[2] = {rotations[2], rotations[3]};
            mma<__nv_bfloat16>(sums_[2 * pair], vectors[own], first);
            mma<__nv_bfloat16>(sums_[2 * pair + 1], vectors[own], second);
          }
        }
      }
    }
  }

 private:
  // Rows of 144 bytes: the eight that a load of matrices takes at a time lie in different banks.
  static constexpr int stride = depth + 8;
  struct alignas(16) Shared {
    __nv_bfloat16 vectors[vector_parts][hash_rows][stride];
    __nv_bfloat16 rotations[rotation_parts][hash_columns][stride];
  };

  // Each part is what the parts before leave, rounded.
  template <int Parts>
  static __device__ __forceinline__ void store_parts(__nv_bfloat16 (&target)[Parts][hash_rows][stride], int row,
                                                     int column, float (&rest)[Operands::group]) {
#pragma unroll
    for (int part = 0; part < Parts; ++part) {
      Packed<__nv_bfloat16, Operands::group> packed;
      packed.pack(rest);
      packed.store(&target[part][row][column]);
      float rounded[Operands::group];
      packed.unpack(rounded);
#pragma unroll
      for (int i = 0; i < Operands::group; ++i) rest[i] -= rounded[i];
    }
  }
  static_assert(hash_rows == hash_columns, "store_parts takes vectors and rotations alike");

  Operands operands_;
  Shared& shared_;
  int lane_, warp_;
  float sums_[hash_columns / 8][4];
};

// float32 vectors by multiply-adds of the ordinary cores, 8 rows by 4 columns a thread.
template <>
class HashProduct<float> {
  using Operands = HashOperands<float>;

 public:
  static constexpr int depth = 32;
  static constexpr int thread_rows = 8, thread_columns = 4;
  static constexpr int row_lanes = hash_columns / thread_columns;

  __device__ HashProduct(const LshDigitParams& params, int64_t batch, int64_t head, int64_t round, int64_t first_row)
      : operands_(params, batch, head, round, first_row), shared_(block_shared<Shared>()) {}

  __device__ __forceinline__ int row(int i) const { return threadIdx.x / row_lanes * thread_rows + i; }
  __device__ __forceinline__ int column(int j) const { return threadIdx.x % row_lanes * thread_columns + j; }
  __device__ __forceinline__ float sum(int i, int j) const { return sums_[i][j]; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& row : sums_) {
#pragma unroll
      for (float& sum : row) sum = 0.0f;
    }
  }

  __device__ __forceinline__ void fetch_rows(int64_t k) {
#pragma unroll
    for (int i = threadIdx.x; i < hash_rows * (depth / Operands::group); i += hash_threads) {
      const int row = i % hash_rows, group = i / hash_rows * Operands::group;
      float values[Operands::group];
      operands_.fetch_row(row, k + group, values);
#pragma unroll
      for (int e = 0; e < Operands::group; ++e) shared_.vectors[group + e][row] = values[e];
    }
  }

  __device__ __forceinline__ void fetch_rotations(int64_t k, int64_t first) {
#pragma unroll
    for (int i = threadIdx.x; i < hash_columns * depth; i += hash_threads) {
      shared_.rotations[i / hash_columns][i % hash_columns] =
          operands_.fetch_rotation(k + i / hash_columns, first + i % hash_columns);
    }
  }

  __device__ __forceinline__ void multiply() {
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
      Packed<float, thread_rows> rows;
      Packed<float, thread_columns> columns;
      rows.load(&shared_.vectors[k][row(0)]);
      columns.load(&shared_.rotations[k][column(0)]);
      float left[thread_rows], right[thread_columns];
      rows.unpack(left);
      columns.unpack(right);
#pragma unroll
      for (int i = 0; i < thread_rows; ++i) {
#pragma unroll
        for (int j = 0; j < thread_columns; ++j) sums_[i][j] = fmaf(left[i], right[j], sums_[i][j]);
      }
    }
  }

 private:
  struct alignas(16) Shared {
    float vectors[depth][hash_rows];
    float rotations[depth][hash_columns];
  };

  Operands operands_;
  Shared& shared_;
  float sums_[thread_rows][thread_columns];
};

}  // namespace fusewright::cuda
