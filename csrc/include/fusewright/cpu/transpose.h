// Square blocks of 32-bit words turned in registers.
#pragma once

#include "fusewright/cpu/vector.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Columns become rows. At each step the off-diagonal quarters of the blocks of 2 * half rows and columns change places.
inline void transpose(Float (&rows)[lanes]) {
#pragma GCC unroll 4
  for (int half = lanes / 2; half >= 1; half /= 2) {
    Int upper, lower;
    for (int i = 0; i < lanes; ++i) {
      upper[i] = (i & half) == 0 ? i : lanes + i - half;
      lower[i] = (i & half) == 0 ? i + half : lanes + i;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & half) continue;
      const Float a = rows[i], b = rows[i + half];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + half] = __builtin_shuffle(a, b, lower);
    }
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
