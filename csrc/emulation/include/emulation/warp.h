// Warp collectives. Shuffles and votes order no memory accesses, __syncwarp does.
#pragma once

#include <cstdint>
#include <cstring>

namespace fusewright::emulation {

enum class Shuffle { index, up, down, exclusive_or };

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width);
unsigned ballot(unsigned mask, bool predicate);
void sync_warp(unsigned mask);

template <class T>
T shuffle_as(Shuffle kind, unsigned mask, T value, int operand, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace fusewright::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return fusewright::emulation::shuffle_as(fusewright::emulation::Shuffle::index, mask, value, lane, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  return fusewright::emulation::shuffle_as(fusewright::emulation::Shuffle::up, mask, value, distance, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  return fusewright::emulation::shuffle_as(fusewright::emulation::Shuffle::down, mask, value, distance, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return fusewright::emulation::shuffle_as(fusewright::emulation::Shuffle::exclusive_or, mask, value, lane_mask, width);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) { return fusewright::emulation::ballot(mask, predicate); }
inline bool __any_sync(unsigned mask, bool predicate) { return fusewright::emulation::ballot(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return fusewright::emulation::ballot(mask, predicate) == mask; }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { fusewright::emulation::sync_warp(mask); }
inline void __syncthreads() { fusewright::emulation::block_barrier(); }
