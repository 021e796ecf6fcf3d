// A shuffle, vote or barrier that lanes of a warp take part in together.
#pragma once

#include <cstdint>

#include "emulation/warp.h"

namespace fusewright::emulation {

struct WarpCollective {
  enum class Kind { shuffle, ballot, synchronise };

  Kind kind;
  unsigned mask;
  unsigned arrived = 0;
  uint64_t values[32] = {};
  int operands[32] = {};
  Shuffle shuffle = Shuffle::index;
  int width = 32;
};

}  // namespace fusewright::emulation
