// A shuffle, vote or barrier that lanes of a warp take part in together.
#pragma once

#include <cstdint>
#include <functional>

#include "emulation/warp.h"

namespace fusewright::emulation {

struct WarpCollective {
  enum class Kind { shuffle, ballot, synchronise, matrices };

  Kind kind;
  unsigned mask;
  unsigned arrived = 0;
  uint64_t values[32] = {};
  int operands[32] = {};
  Shuffle shuffle = Shuffle::index;
  int width = 32;
};

// The whole warp meets, each lane with a pointer. The last to come calls `body` with all of them while the others wait.
using WarpBody = std::function<void(const uint64_t (&pointers)[32])>;
void with_every_lane(const void* own, const WarpBody& body, const void* pc);

}  // namespace fusewright::emulation
