// Rows that lie side by side in memory, as they do in a softmax along any dimension but the last. A warp takes 32
// adjacent rows, so that its accesses are adjacent, and the warps of a block take the columns in turn.
#pragma once

#include "fusewright/cuda/reduce.cuh"
#include "fusewright/row_view.h"

namespace fusewright::cuda {

constexpr int across_warps = 16;

inline bool rows_lie_across(const RowView& view) {
  return view.inner_dims == 1 && view.inner_stride[0] != 1 && view.outer_dims > 0 &&
         view.outer_stride[view.outer_dims - 1] == 1;
}

}  // namespace fusewright::cuda
