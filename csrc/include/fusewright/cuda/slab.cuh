// How tiles of 16-bit elements lie in shared memory for tensor copies, products of warpgroups and loads of matrices.
#pragma once

namespace fusewright::cuda {

// A row of a slab has 64 elements. Its 16-byte chunk c lies at chunk c ^ (row % 8), so that chunk c of eight rows comes
// from every bank. A wider tile is several slabs, one behind the other.
constexpr int slab_row_bytes = 128;
constexpr int slab_columns = 64;
constexpr int swizzle_rows = 8;

}  // namespace fusewright::cuda
