// How attention's tasks, unequal in length, are spread over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>

namespace fusewright::ops {

// Aligned memory of one thread that lives until the thread ends, for scratch that every call needs again: fresh pages
// would be faulted in on each call. What is larger than a cache is given back after the call.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : kept_(bytes <= most_kept) {
    if (!kept_) {
      data_ = allocate(bytes);
      return;
    }
    Arena& arena = thread_arena();
    if (arena.bytes < bytes) {
      std::free(arena.data);
      arena.data = allocate(bytes);
      arena.bytes = bytes;
    }
    data_ = arena.data;
  }
  ~Scratch() {
    if (!kept_) std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }

 private:
  static constexpr int64_t most_kept = int64_t{2} << 20;

  struct Arena {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Arena() { std::free(data); }
  };

  static Arena& thread_arena() {
    static thread_local Arena arena;
    return arena;
  }

  static void* allocate(int64_t bytes) {
    void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    // Nothing can be thrown through a parallel region, and no kernel can go on without its scratch.
    if (data == nullptr && bytes > 0) std::abort();
    return data;
  }

  bool kept_;
  void* data_;
};

// Calls body(task, scratch) for every task, in order of their numbers as threads come free: with the longest first, no
// thread is left with a long one at the end. `work` multiply-adds in all decide whether a second thread pays.
template <class Body>
void for_each_task(int64_t tasks, double work, int64_t scratch_bytes, const Body& body) {
  constexpr double least_work_for_threads = 1e6;
  std::atomic<int64_t> next{0};
  const auto take_tasks = [&](int64_t, int64_t) {
    const Scratch scratch(scratch_bytes);
    for (int64_t task = next++; task < tasks; task = next++) body(task, scratch.data());
  };
  const int64_t threads = torch::stable::get_num_threads();
  if (tasks <= 1 || threads <= 1 || work < least_work_for_threads) return take_tasks(0, 1);
  torch::stable::parallel_for(0, threads < tasks ? threads : tasks, 1, take_tasks);
}

}  // namespace fusewright::ops
