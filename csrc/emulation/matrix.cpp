#include "emulation/matrix.h"

#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "grid.h"

namespace fusewright::emulation {
namespace {

constexpr unsigned whole_warp = 0xFFFFFFFFu;

float element_value(Matrix16 type, uint32_t pair, int half) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * half));
  return type == Matrix16::bfloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

// Another lane's pointer.
template <class T>
T* pointer_of_lane(T* own, int lane) {
  return reinterpret_cast<T*>(shuffle(Shuffle::index, whole_warp, reinterpret_cast<uintptr_t>(own), lane, 32));
}

// Calls body(address, register, half) for each of the eight elements that the calling lane holds of four matrices.
template <class Element, class Row, class Body>
void for_each_element(Row* row, bool transposed, Access access, const void* pc, Body body) {
  const int lane = grid.current().lane;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    grid.fail("a row of a matrix at " + grid.describe_shared(row) + ", which 16 does not divide", pc);
  }
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int i = 0; i < 2; ++i) {
      const int i_row = transposed ? 2 * (lane % 4) + i : lane / 4;
      const int column = transposed ? lane / 4 : 2 * (lane % 4) + i;
      Element* address = static_cast<Element*>(pointer_of_lane(row, 8 * matrix + i_row)) + column;
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
  const int lane = grid.current().lane;
  // The lanes that hold the rows of a, lane / 4 and that + 8, and the two columns of b.
  const uint32_t *others_a[4], *others_b[2][4];
  for (int i = 0; i < 4; ++i) {
    others_a[i] = pointer_of_lane(&a[0], lane / 4 * 4 + i);
    for (int c = 0; c < 2; ++c) others_b[c][i] = pointer_of_lane(&b[0], (2 * (lane % 4) + c) * 4 + i);
  }
  float result[4];
  for (int i = 0; i < 4; ++i) {
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      sum += element_value(type, others_a[k % 8 / 2][i / 2 + 2 * (k / 8)], k % 2) *
             element_value(type, others_b[i % 2][k % 8 / 2][k / 8], k % 2);
    }
    result[i] = d[i] + sum;
  }
  // Nobody's registers change before all have read them.
  ballot(whole_warp, true);
  std::memcpy(d, result, sizeof(result));
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
