// Products of a warpgroup: 128 threads issue each together, and it runs beside them in the order of issue.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <list>
#include <vector>

#include "asynchronous.h"
#include "emulation/asynchronous.h"

namespace fusewright::emulation {

constexpr int warpgroup_size = 128;

// The accumulators of one thread while products may write them. The thread's own registers hold a pattern meanwhile.
struct Accumulators {
  float* registers;
  std::vector<float> values;
  int in_flight = 0;  // products that the thread has not waited for
};

struct WgmmaProduct {
  Matrix16 type;
  int n;
  uint64_t descriptor_a, descriptor_b;
  bool a_in_registers, accumulate, transposed_b;
  int issued = 0;  // threads
  std::array<Accumulators*, warpgroup_size> d = {};
  std::array<std::array<uint32_t, 4>, warpgroup_size> a = {};
  // What each warp reads is an operation of its own: one that has waited knows nothing of the others' reads.
  std::array<AsyncOperation, 4> parts = {};
  const void* pc = nullptr;
};

struct Warpgroup {
  std::deque<WgmmaProduct> products;
  int64_t first = 0;   // the number of products.front(); older ones have landed and were waited for by all
  int64_t landed = 0;  // products
};

// Part of a thread's state.
struct WgmmaThread {
  int64_t issued = 0;
  int64_t waited = 0;               // products whose end this thread knows of
  std::vector<int64_t> group_ends;  // of the committed groups not waited for: products issued until then
  bool fenced = false;
  struct Operand {
    const uint32_t* registers;
    std::array<uint32_t, 4> values;
    int64_t product;
  };
  std::vector<Operand> operands;
  std::list<Accumulators> accumulators;
};

// Element (row, k) of an operand in shared memory: its address.
uintptr_t wgmma_element(uintptr_t shared_base, uint64_t descriptor, bool transposed, int row, int k);

}  // namespace fusewright::emulation
