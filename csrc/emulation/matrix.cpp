#include "emulation/matrix.h"

#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "grid.h"

namespace fusewright::emulation {
namespace {

float element_value(Matrix16 type, uint32_t pair, int half) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * half));
  return type == Matrix16::bfloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

// Calls body(address, register, half) for each of the eight elements that the calling lane holds of four matrices.
template <class Element, class Row, class Body>
void for_each_element(Row* row, bool transposed, Access access, const void* pc, Body body) {
  const int lane = grid.current().lane;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    grid.fail("a row of a matrix at " + grid.describe_shared(row) + ", which 16 does not divide", pc);
  }
  struct Rows {
    Row* own;
    Row* of_lane[32];
  } rows = {row, {}};
  const auto hand_out = [](const uint64_t (&lanes)[32]) {
    for (const uint64_t to : lanes) {
      for (int from = 0; from < 32; ++from) {
        reinterpret_cast<Rows*>(to)->of_lane[from] = reinterpret_cast<const Rows*>(lanes[from])->own;
      }
    }
  };
  with_every_lane(&rows, hand_out, pc);
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int i = 0; i < 2; ++i) {
      const int i_row = transposed ? 2 * (lane % 4) + i : lane / 4;
      const int column = transposed ? lane / 4 : 2 * (lane % 4) + i;
      Element* address = static_cast<Element*>(rows.of_lane[8 * matrix + i_row]) + column;
      grid.check_access(address, sizeof(Element), access, pc);
      body(address, matrix, i);
    }
  }
}

}  // namespace

void load_matrices(uint32_t (&registers)[4], const void* row, bool transposed) {
  uint16_t elements[4][2];
  for_each_element<const uint16_t>(
      row, transposed, Access::read, __builtin_return_address(0),
      [&](const uint16_t* address, int matrix, int half) { elements[matrix][half] = *address; });
  std::memcpy(registers, elements, sizeof(elements));
}

void store_matrices(const uint32_t (&registers)[4], void* row, bool transposed) {
  uint16_t elements[4][2];
  std::memcpy(elements, registers, sizeof(elements));
  for_each_element<uint16_t>(row, transposed, Access::write, __builtin_return_address(0),
                             [&](uint16_t* address, int matrix, int half) { *address = elements[matrix][half]; });
}

void mma(Matrix16 type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Registers {
    float* d;
    const uint32_t *a, *b;
  };
  const auto multiply = [type](const uint64_t (&lanes)[32]) {
    float left[16][16], right[8][16];  // (row of a, k) and (column of b, k)
    for (int lane = 0; lane < 32; ++lane) {
      const Registers& own = *reinterpret_cast<const Registers*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        for (int half = 0; half < 2; ++half) {
          const int k = 2 * (lane % 4) + half;
          left[lane / 4 + i % 2 * 8][k + i / 2 * 8] = element_value(type, own.a[i], half);
          if (i < 2) right[lane / 4][k + i * 8] = element_value(type, own.b[i], half);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const float *row = left[lane / 4 + i / 2 * 8], *column = right[2 * (lane % 4) + i % 2];
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
        reinterpret_cast<const Registers*>(lanes[lane])->d[i] += sum;
      }
    }
  };
  const Registers own = {d, a, b};
  with_every_lane(&own, multiply, __builtin_return_address(0));
}

void copy_async(void* shared, const void* global, bool inside) {
  const void* pc = __builtin_return_address(0);
  Thread& thread = grid.current();
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    grid.fail("cp.async of addresses that 16 does not divide", pc);
  }
  if (thread.open_copy_group == nullptr) thread.open_copy_group = std::make_shared<BulkGroup>();
  const std::shared_ptr<BulkGroup> group = thread.open_copy_group;
  ++group->in_flight;
  AsyncOperation operation = grid.asynchronous().issue("a cp.async");
  operation.async_proxy = false;
  operation.run = [=](const AsyncOperation& self) {
    if (inside) grid.check_async_access(self, global, 16, Access::read, pc);
    grid.check_async_access(self, shared, 16, Access::write, pc);
    if (inside) {
      std::memcpy(shared, global, 16);
    } else {
      std::memset(shared, 0, 16);
    }
    group->land(self);
  };
  grid.asynchronous().add(std::move(operation));
}

void copy_async_commit() {
  Thread& thread = grid.current();
  if (thread.open_copy_group == nullptr) thread.open_copy_group = std::make_shared<BulkGroup>();
  thread.copy_groups.push_back(std::move(thread.open_copy_group));
}

void copy_async_wait(int pending) { wait_for_groups(grid.current().copy_groups, pending, __builtin_return_address(0)); }

}  // namespace fusewright::emulation
