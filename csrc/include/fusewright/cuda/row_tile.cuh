// The part of a row that a group of threads holds in registers as float32.
#pragma once

#include "fusewright/cuda/reduce.cuh"
#include "fusewright/cuda/vector.cuh"
#include "fusewright/philox.h"

namespace fusewright::cuda {

// How the columns of a row lie in memory: elements of one access, and the offset of a column in elements.

// Adjacent elements, in vectors: every row is aligned to the vector and its number of columns divides by Width.
template <int Width>
struct AdjacentColumns {
  static constexpr int width = Width;
  static __device__ __forceinline__ int64_t offset(const RowView&, int64_t column) { return column; }
};

// One stride.
struct StridedColumns {
  static constexpr int width = 1;
  static __device__ __forceinline__ int64_t offset(const RowView& view, int64_t column) {
    return column * view.inner_stride[0];
  }
};

// Any strides. A division for each dimension and element: for tiles of few elements, as the code is long.
struct AnyColumns {
  static constexpr int width = 1;
  static __device__ __forceinline__ int64_t offset(const RowView& view, int64_t column) {
    return view.column_offset(column);
  }
};

// Threads of a row take vectors in turn: vector v of a thread starts at column (thread + v * threads) * width of the
// tile. A row that does not fit one tile is taken a tile at a time.
template <class Columns, int Elements>
struct RowTile {
  static constexpr int width = Columns::width;
  static constexpr int vectors = Elements / width;
  static_assert(Elements % width == 0);

  int thread;         // within those of the row
  int threads;        // that share the row
  int count;          // columns of the row in this tile
  int64_t columns;    // columns of the row, N
  int64_t first = 0;  // column of the row where this tile starts

  __device__ __forceinline__ int column(int vector) const { return (thread + vector * threads) * width; }
  __device__ __forceinline__ bool holds(int vector) const { return column(vector) < count; }

  // Moves the tile to the columns from `first_column`.
  __device__ __forceinline__ void move_to(int64_t first_column) {
    const int64_t left = columns - first_column;
    const int64_t capacity = static_cast<int64_t>(threads) * Elements;
    first = first_column;
    count = static_cast<int>(left < capacity ? left : capacity);
  }

  // In a loop over rows the compiler would keep the address of every element of every operand in registers, far more
  // than there are. Told that `thread` may have changed, it computes them anew.
  __device__ __forceinline__ void forget_addresses() { asm volatile("" : "+r"(thread)); }

  __device__ __forceinline__ int64_t offset(const RowView& view, int vector) const {
    return Columns::offset(view, first + column(vector));
  }

  // Calls body(element) for each element in registers that belongs to the row.
  template <class Body>
  __device__ __forceinline__ void for_each(Body body) const {
#pragma unroll
    for (int vector = 0; vector < vectors; ++vector) {
      if (!holds(vector)) continue;
#pragma unroll
      for (int i = 0; i < width; ++i) body(vector * width + i);
    }
  }

  // Elements beyond the row read as 0.
  template <class T>
  __device__ __forceinline__ void load(const RowView& view, int64_t row, float (&values)[Elements]) const {
    const T* source = static_cast<const T*>(view.data) + view.row_offset(row);
    load_vectors<T>([&](int vector) { return source + offset(view, vector); }, values);
  }

  // From a contiguous (M, N) matrix.
  template <class T>
  __device__ __forceinline__ void load_contiguous(const T* matrix, int64_t row, float (&values)[Elements]) const {
    const T* source = matrix + row * columns + first;
    load_vectors<T>([&](int vector) { return source + column(vector); }, values);
  }

  // values[i] = combine(values[i], parameter[i]) for a parameter of one row and any type.
  template <class Combine>
  __device__ __forceinline__ void with_parameter(const RowView& parameter, float (&values)[Elements],
                                                 Combine combine) const {
    with_parameter_type(parameter.dtype, [&](auto type) {
      float loaded[Elements];
      load<decltype(type)>(parameter, 0, loaded);
#pragma unroll
      for (int i = 0; i < Elements; ++i) values[i] = combine(values[i], loaded[i]);
    });
  }

  template <class T>
  __device__ __forceinline__ void store(const RowView& view, int64_t row, const float (&values)[Elements]) const {
    T* target = static_cast<T*>(view.data) + view.row_offset(row);
    store_vectors<T>([&](int vector) { return target + offset(view, vector); }, values);
  }

  template <class T>
  __device__ __forceinline__ void store_contiguous(T* matrix, int64_t row, const float (&values)[Elements]) const {
    T* target = matrix + row * columns + first;
    store_vectors<T>([&](int vector) { return target + column(vector); }, values);
  }

  // values = keep ? values * keep_scale : 0, the mask drawn from the seed; see dropout_block.
  __device__ __forceinline__ void dropout(const int64_t* seed, uint64_t keep_threshold, float keep_scale, int64_t row,
                                          float (&values)[Elements]) const {
    const uint64_t key = static_cast<uint64_t>(*seed);
#pragma unroll
    for (int vector = 0; vector < vectors; ++vector) {
      const int64_t in_row = first + column(vector);
      uint32_t words[4];
      if constexpr (width == 1) {
        philox4x32(key, dropout_block(row, in_row, columns), words);
        // A choice among registers; an index known only at run time would put the words in local memory.
        const uint32_t low = in_row % 2 == 0 ? words[0] : words[1];
        const uint32_t high = in_row % 2 == 0 ? words[2] : words[3];
        const uint32_t word = in_row % 4 < 2 ? low : high;
        values[vector] = word >= keep_threshold ? values[vector] * keep_scale : 0.0f;
      } else {
#pragma unroll
        for (int i = 0; i < width; ++i) {
          if (i % 4 == 0) philox4x32(key, dropout_block(row, in_row + i, columns), words);
          float& value = values[vector * width + i];
          value = words[i % 4] >= keep_threshold ? value * keep_scale : 0.0f;
        }
      }
    }
  }

 private:
  template <class T, class Address>
  __device__ __forceinline__ void load_vectors(Address address, float (&values)[Elements]) const {
    Packed<T, width> packed[vectors];
#pragma unroll
    for (int vector = 0; vector < vectors; ++vector) {
      packed[vector].clear();
      if (holds(vector)) packed[vector].load(address(vector));
    }
#pragma unroll
    for (int vector = 0; vector < vectors; ++vector) packed[vector].unpack(values + vector * width);
  }

  template <class T, class Address>
  __device__ __forceinline__ void store_vectors(Address address, const float (&values)[Elements]) const {
#pragma unroll
    for (int vector = 0; vector < vectors; ++vector) {
      Packed<T, width> packed;
      packed.pack(values + vector * width);
      if (holds(vector)) packed.store(address(vector));
    }
  }
};

// The tile of the calling thread, at the start of the row.
template <class Columns, int Elements, int Lanes>
__device__ __forceinline__ RowTile<Columns, Elements> make_row_tile(int64_t columns) {
  RowTile<Columns, Elements> tile;
  tile.thread = Lanes == whole_block ? threadIdx.x : threadIdx.x % Lanes;
  tile.threads = Lanes == whole_block ? blockDim.x : Lanes;
  tile.columns = columns;
  tile.move_to(0);
  return tile;
}

}  // namespace fusewright::cuda
