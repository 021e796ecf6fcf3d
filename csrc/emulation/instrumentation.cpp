// The compiler's calls at each load and store of a kernel: it is compiled with -fsanitize=thread, whose library is not
// linked. Host code in the same sources makes the same calls, outside any kernel.

#include "grid.h"

namespace {

using fusewright::emulation::Access;
using fusewright::emulation::grid;

inline void access(const void* address, size_t bytes, Access kind, const void* pc) {
  if (grid.in_kernel()) grid.check_access(address, bytes, kind, pc);
}

}  // namespace

#define FUSEWRIGHT_ACCESS(NAME, BYTES, KIND) \
  void NAME(void* address) { access(address, BYTES, Access::KIND, __builtin_return_address(0)); }

#define FUSEWRIGHT_ACCESSES(PREFIX, KIND) \
  FUSEWRIGHT_ACCESS(PREFIX##1, 1, KIND)   \
  FUSEWRIGHT_ACCESS(PREFIX##2, 2, KIND)   \
  FUSEWRIGHT_ACCESS(PREFIX##4, 4, KIND)   \
  FUSEWRIGHT_ACCESS(PREFIX##8, 8, KIND)   \
  FUSEWRIGHT_ACCESS(PREFIX##16, 16, KIND)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

FUSEWRIGHT_ACCESSES(__tsan_read, read)
FUSEWRIGHT_ACCESSES(__tsan_write, write)
FUSEWRIGHT_ACCESSES(__tsan_unaligned_read, read)
FUSEWRIGHT_ACCESSES(__tsan_unaligned_write, write)
FUSEWRIGHT_ACCESSES(__tsan_volatile_read, read)
FUSEWRIGHT_ACCESSES(__tsan_volatile_write, write)

void __tsan_read_range(void* address, size_t bytes) {
  access(address, bytes, Access::read, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  access(address, bytes, Access::write, __builtin_return_address(0));
}
void __tsan_vptr_update(void**, void*) {}

// Of the guards of local static variables, which host code alone has.
uint8_t __tsan_atomic8_load(const volatile uint8_t* address, int) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }
}
