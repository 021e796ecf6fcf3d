// How CPU ops spread rows over torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "fusewright/cpu/kernels.h"

namespace fusewright::ops {

// Elements below which another thread costs more than it saves; torch's own row-wise kernels use the same.
constexpr int64_t elements_per_thread = 32768;

// Calls body(begin, end) for ranges of [0, rows), each row holding `elements_per_row` elements of work.
template <class Body>
void parallel_rows(int64_t rows, int64_t elements_per_row, const Body& body) {
  if (rows == 0) return;
  const int64_t per_row = elements_per_row > 0 ? elements_per_row : 1;
  const int64_t grain = per_row >= elements_per_thread ? 1 : (elements_per_thread + per_row - 1) / per_row;
  if (rows <= grain) return body(0, rows);
  torch::stable::parallel_for(0, rows, grain, body);
}

inline const CpuKernels& cpu_kernels() {
  const CpuKernels* kernels = fusewright_cpu_kernels();
  STD_TORCH_CHECK(kernels != nullptr, "FUSEWRIGHT_CPU_ISA names an instruction set that this machine lacks, expected ",
                  fusewright_cpu_available());
  return *kernels;
}

}  // namespace fusewright::ops
