// What a warp does together with matrices of 8 x 8 16-bit elements, on any tensor core.
#pragma once

#include <cstdint>

#include "emulation/asynchronous.h"

namespace fusewright::emulation {

// Four matrices; lane l gives the address of row l % 8 of matrix l / 8. Not transposed, a lane receives of each the two
// elements from 2 (l % 4) on of row l / 4.
void load_matrices(uint32_t (&registers)[4], const void* row, bool transposed);

// The opposite: each lane stores, where the lanes say that rows are, what it would have received.
void store_matrices(const uint32_t (&registers)[4], void* row, bool transposed);

// d (16, 8) += a (16, 16) b (16, 8)
void mma(Matrix16 type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// 16 bytes from global to shared memory, zeros unless `inside`; commits and waits are as those of bulk copies.
void copy_async(void* shared, const void* global, bool inside);
void copy_async_commit();
void copy_async_wait(int pending);

}  // namespace fusewright::emulation
