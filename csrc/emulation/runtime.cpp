// The CUDA runtime's functions, and the emulator's own for tests.

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "control.h"
#include "cuda_runtime.h"
#include "grid.h"

namespace fusewright::emulation {
namespace {

// Guards everything of the emulator: tensors come and go in any thread, one kernel runs at a time.
std::recursive_mutex mutex;
uint64_t seed = 0;
uint64_t launches = 0;
// Few, so that a kernel whose grid follows their number gives each block several turns.
int multiprocessors = 3;
int generation = 9;
int clusters_together = 1;
std::map<const void*, int> largest_dynamic_shared;
std::string last_report;

constexpr size_t dynamic_shared_without_asking = 48 * 1024;

std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "kernel";
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);
  // The parameter list says less than the template arguments before it.
  const size_t begin = name.find("fusewright::cuda::");
  if (begin != std::string::npos) name = name.substr(begin + std::strlen("fusewright::cuda::"));
  const size_t parameters = name.rfind('(');
  return parameters == std::string::npos ? name : name.substr(0, parameters);
}

bool tiles(const dim3& grid, const dim3& cluster) {
  return cluster.x * cluster.y * cluster.z != 0 && grid.x % cluster.x == 0 && grid.y % cluster.y == 0 &&
         grid.z % cluster.z == 0;
}

}  // namespace

std::string describe_code(const void* pc) {
  Dl_info info;
  if (pc == nullptr || dladdr(pc, &info) == 0) return "";
  const char* file = std::strrchr(info.dli_fname, '/');
  char offset[32];
  // A return address is that of the next instruction.
  std::snprintf(offset, sizeof(offset), "+0x%zx",
                static_cast<size_t>(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1));
  return std::string(" [") + (file == nullptr ? info.dli_fname : file + 1) + offset + "]";
}

int launch(const void* address, const LaunchShape& shape, void (*run)(const void*), const void* arguments,
           size_t arguments_bytes) {
  const std::lock_guard lock(mutex);
  const uint64_t threads = uint64_t{shape.block.x} * shape.block.y * shape.block.z;
  if (threads == 0 || threads > 1024 || shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0 ||
      shape.grid.y > 65535 || shape.grid.z > 65535 || !tiles(shape.grid, shape.cluster)) {
    return cudaErrorInvalidConfiguration;
  }
  // No kernel that has to be resident as a whole is small enough for two of its blocks on one multiprocessor.
  const uint64_t blocks = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  if (shape.cooperative && blocks > static_cast<uint64_t>(multiprocessors)) return cudaErrorCooperativeLaunchTooLarge;
  const auto asked = largest_dynamic_shared.find(address);
  const size_t allowed = asked == largest_dynamic_shared.end() ? dynamic_shared_without_asking : asked->second;
  if (shape.dynamic_shared_bytes > allowed) return cudaErrorInvalidValue;
  if (grid.run(shape, clusters_together, kernel_name(address), run, arguments, arguments_bytes,
               seed * 1000003 + launches++)) {
    return cudaSuccess;
  }
  last_report = grid.report();
  return cudaErrorLaunchFailure;
}

void* static_shared(const void* key, size_t bytes, size_t alignment, const char* name) {
  void* variable = grid.current().block->shared.static_variable(key, bytes, alignment, name);
  if (variable == nullptr) {
    grid.fail("the block has more shared memory than " + std::to_string(shared_memory_limit) + " bytes", nullptr);
  }
  return variable;
}

void* dynamic_shared() { return grid.current().block->shared.dynamic(); }

void add_buffer(const char* name, void* data, size_t bytes, bool written, bool writable) {
  const std::lock_guard lock(mutex);
  const auto content = written ? Region::Content::written : Region::Content::unwritten;
  grid.global_memory().add(name, data, bytes, content, writable);
}

void remove_buffer(const void* data) {
  const std::lock_guard lock(mutex);
  grid.global_memory().remove(data);
}

}  // namespace fusewright::emulation

using namespace fusewright::emulation;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorLaunchFailure:
      return last_report.c_str();
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = generation;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(shared_memory_limit);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const std::lock_guard lock(mutex);
  if (value < 0 || value > static_cast<int>(shared_memory_limit)) return cudaErrorInvalidValue;
  largest_dynamic_shared[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  const std::lock_guard lock(mutex);
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  Region* buffer = grid.global_memory().find(address);
  if (buffer == nullptr || address - buffer->begin() + bytes > buffer->bytes()) return cudaErrorInvalidValue;
  std::memset(data, value, bytes);
  grid.checker().mark_written(*buffer, address - buffer->begin(), bytes);
  return cudaSuccess;
}

void fusewright_emulation_set_seed(uint64_t value) {
  seed = value;
  launches = 0;
}
void fusewright_emulation_set_multiprocessors(int value) { multiprocessors = value; }
void fusewright_emulation_set_generation(int value) { generation = value; }
void fusewright_emulation_set_clusters_together(int value) { clusters_together = value; }
void fusewright_emulation_add_buffer(const char* name, void* data, size_t bytes, int written, int writable) {
  add_buffer(name, data, bytes, written != 0, writable != 0);
}
void fusewright_emulation_remove_buffer(const void* data) { remove_buffer(data); }
const char* fusewright_emulation_report() { return last_report.c_str(); }
