// How the hardware permutes 16-byte chunks of shared memory, by address bits.
#pragma once

#include <cstdint>

namespace fusewright::emulation {

enum class Swizzle { none = 0, bytes32 = 1, bytes64 = 2, bytes128 = 3 };

constexpr int swizzle_span(Swizzle swizzle) { return swizzle == Swizzle::none ? 0 : 16 << static_cast<int>(swizzle); }

// Bits 7 and up choose the row of the pattern, which is added without carry to the number of the chunk from bit 4 on:
// one bit for a span of 32 bytes, two for 64, three for 128.
constexpr uintptr_t swizzled(uintptr_t address, Swizzle swizzle) {
  const uintptr_t mask = (uintptr_t{1} << static_cast<int>(swizzle)) - 1;
  return address ^ ((address >> 7 & mask) << 4);
}

}  // namespace fusewright::emulation
