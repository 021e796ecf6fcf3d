#include "wgmma.h"

#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "grid.h"
#include "swizzle.h"

namespace fusewright::emulation {
namespace {

// Registers of accumulators in flight, 1.2e7: far from any result, and unlike a NaN nothing that a kernel looks for.
constexpr uint32_t in_flight_pattern = 0x4B3DEAD1;

Warpgroup& warpgroup_of(const Thread& thread) { return grid.warpgroup(thread.warp / 4); }

// Hopper's descriptor of a matrix in shared memory; offsets in units of 16 bytes.
struct Descriptor {
  uintptr_t start, leading, stride;
  Swizzle swizzle;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3FFF) << 4), leading((bits >> 16 & 0x3FFF) << 4), stride((bits >> 32 & 0x3FFF) << 4) {
    const int mode = static_cast<int>(bits >> 62);  // 1 is the widest
    swizzle = mode == 0 ? Swizzle::none : static_cast<Swizzle>(4 - mode);
  }
};

float element_value(Matrix16 type, uint16_t bits) {
  return type == Matrix16::bfloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

// The accumulators that these registers are, new ones unless products that write them are in flight.
Accumulators& accumulators_of(Thread& thread, float* d, int count, const void* pc) {
  for (Accumulators& known : thread.wgmma.accumulators) {
    if (known.registers == d) return known;
  }
  if (!thread.wgmma.fenced) grid.fail("wgmma.fence is missing before wgmma takes registers", pc);
  thread.wgmma.accumulators.push_back({d, std::vector<float>(d, d + count)});
  for (int i = 0; i < count; ++i) std::memcpy(d + i, &in_flight_pattern, sizeof(float));
  return thread.wgmma.accumulators.back();
}

void check_same(const WgmmaProduct& product, const WgmmaProduct& other, const void* pc) {
  if (product.type != other.type || product.n != other.n || product.descriptor_a != other.descriptor_a ||
      product.descriptor_b != other.descriptor_b || product.a_in_registers != other.a_in_registers ||
      product.accumulate != other.accumulate || product.transposed_b != other.transposed_b) {
    grid.fail("threads of a warpgroup issue different wgmma", pc);
  }
}

// rows x 16 values of an operand. A warp reads its 16 rows of a and the whole of b.
std::vector<float> read_shared(const WgmmaProduct& product, uint64_t descriptor, bool transposed, int rows, bool is_a) {
  const uintptr_t base = reinterpret_cast<uintptr_t>(product.parts[0].block->shared.dynamic());
  std::vector<float> values(rows * 16);
  // Eight elements that are adjacent in memory are one access.
  for (int major = 0; major < (transposed ? 16 : rows); ++major) {
    for (int first = 0; first < (transposed ? rows : 16); first += 8) {
      const int row = transposed ? first : major, k = transposed ? major : first;
      const uintptr_t address = wgmma_element(base, descriptor, transposed, row, k);
      for (int warp = 0; warp < 4; ++warp) {
        if (is_a && row / 16 != warp) continue;
        grid.check_async_access(product.parts[warp], reinterpret_cast<void*>(address), 16, Access::read, product.pc);
      }
      uint16_t elements[8];
      std::memcpy(elements, reinterpret_cast<const void*>(address), sizeof(elements));
      for (int i = 0; i < 8; ++i) {
        values[transposed ? (row + i) * 16 + k : row * 16 + k + i] = element_value(product.type, elements[i]);
      }
    }
  }
  return values;
}

// The fragment of a: element (row, k) of the warpgroup's 64 x 16.
std::vector<float> read_registers(const WgmmaProduct& product) {
  std::vector<float> values(64 * 16);
  for (int thread = 0; thread < warpgroup_size; ++thread) {
    const int warp = thread / 32, lane = thread % 32;
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * warp + lane / 4 + 8 * (i % 2);
      const int k = 2 * (lane % 4) + 8 * (i / 2);
      values[row * 16 + k] = element_value(product.type, static_cast<uint16_t>(product.a[thread][i]));
      values[row * 16 + k + 1] = element_value(product.type, static_cast<uint16_t>(product.a[thread][i] >> 16));
    }
  }
  return values;
}

void multiply(WgmmaProduct& product) {
  const std::vector<float> a =
      product.a_in_registers ? read_registers(product) : read_shared(product, product.descriptor_a, false, 64, true);
  const std::vector<float> b = read_shared(product, product.descriptor_b, product.transposed_b, product.n, false);
  for (int thread = 0; thread < warpgroup_size; ++thread) {
    const int warp = thread / 32, lane = thread % 32;
    float* d = product.d[thread]->values.data();
    for (int i = 0; i < product.n / 2; ++i) {
      const float* row = &a[(16 * warp + lane / 4 + 8 * (i / 2 % 2)) * 16];
      const float* column = &b[(8 * (i / 4) + 2 * (lane % 4) + i % 2) * 16];
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      d[i] = product.accumulate ? d[i] + sum : sum;
    }
  }
}

// One more product of the warpgroup lands when the scheduler draws this. Which one is not drawn: they are in order.
AsyncOperation landing_of_next(Warpgroup& group) {
  AsyncOperation landing;
  landing.name = "a wgmma";
  landing.run = [&group](const AsyncOperation&) {
    WgmmaProduct& next = group.products[group.landed - group.first];
    multiply(next);
    ++group.landed;
  };
  return landing;
}

}  // namespace

uintptr_t wgmma_element(uintptr_t shared_base, uint64_t bits, bool transposed, int row, int k) {
  const Descriptor descriptor(bits);
  const uintptr_t base = shared_base & ~uintptr_t{0x3FFFF};
  uintptr_t address = base + descriptor.start;
  const int span = swizzle_span(descriptor.swizzle);
  if (transposed) {
    const int columns = span / 2;  // adjacent elements of one row of the pattern
    address += row / columns * descriptor.leading + k / 8 * descriptor.stride + k % 8 * span + row % columns * 2;
  } else if (descriptor.swizzle == Swizzle::none) {
    address += row / 8 * descriptor.stride + k / 8 * descriptor.leading + row % 8 * 16 + k % 8 * 2;
  } else {
    address += row / 8 * descriptor.stride + row % 8 * span + k * 2;
  }
  return swizzled(address, descriptor.swizzle);
}

void wgmma(Matrix16 type, int n, float* d, const uint32_t* a, uint64_t descriptor_a, uint64_t descriptor_b,
           bool accumulate, bool transposed_b) {
  const void* pc = __builtin_return_address(0);
  Thread& thread = grid.current();
  Warpgroup& group = warpgroup_of(thread);
  if (n < 8 || n > 256 || n % 8 != 0) grid.fail("wgmma of N = " + std::to_string(n), pc);
  if (transposed_b && Descriptor(descriptor_b).swizzle == Swizzle::none) {
    grid.fail("wgmma of a transposed operand without swizzle is not emulated", pc);
  }
  WgmmaProduct product = {type, n, descriptor_a, descriptor_b, a != nullptr, accumulate, transposed_b};
  const int64_t number = thread.wgmma.issued++;
  const size_t index = static_cast<size_t>(number - group.first);
  if (index == group.products.size()) {
    product.pc = pc;
    for (AsyncOperation& part : product.parts) {
      part.name = "a wgmma";
      part.block = thread.block;
      part.knowledge = grid.no_knowledge();
    }
    group.products.push_back(std::move(product));
  } else {
    check_same(product, group.products[index], pc);
  }
  WgmmaProduct& joined = group.products[index];
  const int place = thread.number_in_block % warpgroup_size;
  Accumulators& accumulators = accumulators_of(thread, d, n / 2, pc);
  ++accumulators.in_flight;
  joined.d[place] = &accumulators;
  if (a != nullptr) {
    std::memcpy(joined.a[place].data(), a, sizeof(joined.a[place]));
    thread.wgmma.operands.push_back({a, joined.a[place], number});
  }
  // A warp's part starts when its lanes have issued it, and knows no more than they do.
  thread.clock.add_to(joined.parts[place / warp_size].knowledge);
  thread.clock.advance();
  if (++joined.issued == warpgroup_size) {
    for (int warp = 0; warp < 4; ++warp) {
      grid.asynchronous().stamp_product(joined.parts[warp], thread.warp / 4 * 4 + warp);
    }
    grid.asynchronous().add(landing_of_next(group));
  }
}

void wgmma_fence() { grid.current().wgmma.fenced = true; }

void wgmma_commit() {
  WgmmaThread& state = grid.current().wgmma;
  state.group_ends.push_back(state.issued);
}

void wgmma_wait(int pending) {
  const void* pc = __builtin_return_address(0);
  Thread& thread = grid.current();
  WgmmaThread& state = thread.wgmma;
  Warpgroup& group = warpgroup_of(thread);
  if (static_cast<int>(state.group_ends.size()) <= pending) return;
  const size_t finished = state.group_ends.size() - pending;
  const int64_t end = state.group_ends[finished - 1];
  state.group_ends.erase(state.group_ends.begin(), state.group_ends.begin() + static_cast<std::ptrdiff_t>(finished));
  grid.wait_until([&] { return group.landed >= end; }, {Wait::Kind::wgmma, 0, 0, nullptr, 0, pc});
  for (; state.waited < end; ++state.waited) {
    WgmmaProduct& product = group.products[state.waited - group.first];
    thread.clock.acquire(product.parts[thread.warp % 4].released());
    Accumulators& accumulators = *product.d[thread.number_in_block % warpgroup_size];
    if (--accumulators.in_flight > 0) continue;
    for (size_t i = 0; i < accumulators.values.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, accumulators.registers + i, sizeof(bits));
      if (bits != in_flight_pattern) {
        grid.fail("accumulator " + std::to_string(i) + " was written while wgmma was in flight", pc);
      }
    }
    std::memcpy(accumulators.registers, accumulators.values.data(), accumulators.values.size() * sizeof(float));
    state.accumulators.remove_if([&](const Accumulators& other) { return &other == &accumulators; });
  }
  for (const WgmmaThread::Operand& operand : state.operands) {
    if (operand.product < end && std::memcmp(operand.registers, operand.values.data(), sizeof(operand.values)) != 0) {
      grid.fail("operand registers were written while wgmma was in flight", pc);
    }
  }
  std::erase_if(state.operands, [&](const WgmmaThread::Operand& operand) { return operand.product < end; });
  state.fenced = false;
  // Products that every thread of the warpgroup knows the end of are forgotten.
  int64_t known = end;
  for (int warp = 0; warp < 4; ++warp) {
    const Warp& other = grid.warp(thread.warp / 4 * 4 + warp);
    for (int lane = 0; lane < warp_size; ++lane) known = std::min(known, other.first[lane].wgmma.waited);
  }
  for (; group.first < known; ++group.first) group.products.pop_front();
}

}  // namespace fusewright::emulation
