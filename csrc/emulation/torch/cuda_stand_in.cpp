// What the CUDA ops ask of torch beyond tensors, for tensors on the CPU: a stream, a device guard, and device memory,
// which here is what torch's CPU allocator hands out while this library is loaded.

#include <c10/core/CPUAllocator.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "control.h"

namespace {

// An op holds a device guard while it runs: what is allocated meanwhile is output or workspace, and comes unwritten.
thread_local int ops_running = 0;
// Unless a function of torch allocates it, which fills it.
thread_local bool torch_computes = false;

constexpr size_t alignment = 64;
// Beside every buffer, so that an access past it does not meet the next.
constexpr size_t gap = 256;

void release(void* data) {
  fusewright_emulation_remove_buffer(data);
  std::free(static_cast<char*>(data) - gap);
}

class DeviceMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t room = (bytes + alignment - 1) / alignment * alignment;
    void* memory = std::aligned_alloc(alignment, room + 2 * gap);
    if (memory == nullptr) throw std::bad_alloc();
    // NaN in every floating-point type: what a kernel fails to write is seen in the result.
    std::memset(memory, 0xFF, room + 2 * gap);
    void* data = static_cast<char*>(memory) + gap;
    const bool written = ops_running == 0 || torch_computes;
    const std::string name = (written ? "tensor " : "output or workspace ") + std::to_string(++allocations_);
    fusewright_emulation_add_buffer(name.c_str(), data, bytes, written, true);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, size_t bytes) const override { std::memcpy(target, source, bytes); }

 private:
  std::atomic<uint64_t> allocations_ = 0;
};

DeviceMemory device_memory;
c10::Allocator* allocator_before = nullptr;

// Above the priority of torch's own allocators.
constexpr uint8_t priority = 200;

}  // namespace

extern "C" {

// Tensors that a kernel is given have to be allocated while this is on.
__attribute__((visibility("default"))) void fusewright_emulation_use_device_memory(int on) {
  if (on != 0 && allocator_before == nullptr) {
    allocator_before = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&device_memory, priority);
  } else if (on == 0 && allocator_before != nullptr) {
    c10::SetCPUAllocator(allocator_before, priority);
    allocator_before = nullptr;
  }
}

// What an op asks of torch by name.
AOTITorchError torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack, uint64_t version) {
  static const auto call = reinterpret_cast<decltype(&torch_call_dispatcher)>(
      dlsym(dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD), "torch_call_dispatcher"));
  const bool leaves_empty = std::strstr(name, "empty") != nullptr;
  const bool before = std::exchange(torch_computes, torch_computes || !leaves_empty);
  const AOTITorchError error = call(name, overload, stack, version);
  torch_computes = before;
  return error;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++ops_running;
  // Not null, or it would not be deleted.
  *guard = reinterpret_cast<DeviceGuardHandle>(&ops_running);
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --ops_running;
  return 0;
}
}
