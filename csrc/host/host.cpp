// Python module of host helpers: instruction sets, cores, caches, and probes of what this machine can do.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fusewright/cpu/isa.h"
#include "probe.h"

namespace fusewright {

#define FUSEWRIGHT_DECLARE_PROBE(isa) \
  namespace isa {                     \
  extern const Probe probe;           \
  }
FUSEWRIGHT_FOR_EACH_ISA(FUSEWRIGHT_DECLARE_PROBE)

namespace {

using Clock = std::chrono::steady_clock;

// A probe repeats its work for at least this long, so that clocks settle and the timer does not matter.
constexpr double probe_seconds = 0.05;
constexpr int probe_rounds = 3;

std::vector<const Probe*> usable_probes() {
  std::vector<const Probe*> probes;
#define FUSEWRIGHT_ADD_PROBE(name) \
  if (isa::supports_##name()) probes.push_back(&name::probe);
  FUSEWRIGHT_FOR_EACH_ISA(FUSEWRIGHT_ADD_PROBE)
  return probes;
}

const Probe& best_probe() {
  const std::vector<const Probe*> probes = usable_probes();
  if (probes.empty()) throw std::runtime_error("this processor lacks the baseline instruction set");
  return *probes.front();
}

// A barrier of a fixed number of threads. Not std::barrier, which loses a wake-up now and then in GCC 12 and then
// hangs.
class Gate {
 public:
  explicit Gate(int threads) : threads_(threads) {}

  void arrive_and_wait() {
    std::unique_lock lock(mutex_);
    const int64_t phase = phase_;
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++phase_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return phase_ != phase; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  const int threads_;
  int arrived_ = 0;
  int64_t phase_ = 0;
};

void check_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected at least 1");
}

// Runs prepare(thread) and then, all together, work(thread, repeats); returns the best rate of `amount` per repeat
// and thread over the rounds.
double best_rate(int threads, double amount, const std::function<void(int)>& prepare,
                 const std::function<void(int, int64_t)>& work) {
  check_threads(threads);
  double best = 0;
  Gate gate(threads + 1);
  std::vector<std::thread> pool;
  int64_t repeats = 1;
  bool stop = false;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      prepare(t);
      for (;;) {
        gate.arrive_and_wait();
        if (stop) return;
        work(t, repeats);
        gate.arrive_and_wait();
      }
    });
  }
  // The clock starts before the gate opens: this thread may be woken only when the others are done, and a time that is
  // too short by so much would let the repeats grow without bound.
  const auto run = [&] {
    const auto start = Clock::now();
    gate.arrive_and_wait();
    gate.arrive_and_wait();
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  for (double seconds = run(); seconds < probe_seconds; seconds = run()) {
    repeats = static_cast<int64_t>(repeats * (seconds > 1e-6 ? 1.3 * probe_seconds / seconds + 1 : 64));
  }
  for (int round = 0; round < probe_rounds; ++round) {
    const double rate = amount * repeats * threads / run();
    if (rate > best) best = rate;
  }
  stop = true;
  gate.arrive_and_wait();
  for (std::thread& thread : pool) thread.join();
  return best;
}

struct FreeDeleter {
  void operator()(char* data) const { free(data); }
};
using Buffer = std::unique_ptr<char, FreeDeleter>;

Buffer touched_buffer(int64_t bytes) {
  Buffer buffer(static_cast<char*>(aligned_alloc(64, (bytes + 63) / 64 * 64)));
  if (!buffer) throw std::bad_alloc();
  memset(buffer.get(), 1, bytes);
  return buffer;
}

int64_t share_of(int64_t bytes, int threads) {
  check_threads(threads);
  if (bytes < 1) throw std::invalid_argument("bytes is " + std::to_string(bytes) + ", expected at least 1");
  return bytes / threads > 4096 ? bytes / threads : 4096;
}

// GB/s, bytes read and written both counted, of copying a working set of `bytes` (source and target together).
double copy_bandwidth(int64_t bytes, int threads) {
  const int64_t share = share_of(bytes, threads) / 2;
  std::vector<Buffer> sources(threads), targets(threads);
  const double rate = best_rate(
      threads, 2.0 * static_cast<double>(share),
      [&](int t) {
        sources[t] = touched_buffer(share);
        targets[t] = touched_buffer(share);
      },
      [&](int t, int64_t repeats) {
        for (int64_t i = 0; i < repeats; ++i) {
          memcpy(targets[t].get(), sources[t].get(), share);
          asm volatile("" ::: "memory");
        }
      });
  return rate * 1e-9;
}

// GB/s of reading a working set of `bytes`.
double read_bandwidth(int64_t bytes, int threads) {
  const Probe& probe = best_probe();
  const int64_t share = share_of(bytes, threads);
  std::vector<Buffer> sources(threads);
  std::vector<float> sinks(threads);
  const double rate = best_rate(
      threads, static_cast<double>(share), [&](int t) { sources[t] = touched_buffer(share); },
      [&](int t, int64_t repeats) {
        for (int64_t i = 0; i < repeats; ++i) sinks[t] += probe.read(sources[t].get(), share);
      });
  return rate * 1e-9;
}

// GFLOP/s of float32 fused multiply-add in the widest registers, or in those of `isa`.
double fma_peak(int threads, const std::string& isa) {
  for (const Probe* probe : usable_probes()) {
    if (!isa.empty() && isa != probe->isa) continue;
    constexpr int64_t iterations = 10000;
    return 1e-9 * best_rate(
                      threads, static_cast<double>(probe->fma_flops) * iterations, [](int) {},
                      [&](int, int64_t repeats) { probe->fma(repeats * iterations); });
  }
  throw std::invalid_argument("isa is '" + isa + "', expected one of this machine's");
}

// GFLOP/s of bfloat16 tile products; 0 without AMX.
double amx_peak(int threads) {
  const Probe& probe = best_probe();
  if (probe.amx == nullptr) return 0;
  constexpr int64_t iterations = 10000;
  return 1e-9 * best_rate(
                    threads, static_cast<double>(probe.amx_flops) * iterations, [](int) {},
                    [&](int, int64_t repeats) { probe.amx(repeats * iterations); });
}

// 10^9 exponentials per second from and to registers, by the cheaper code for results of two bytes or to float32's
// accuracy.
double exp_peak(int threads, bool two_bytes) {
  const Probe& probe = best_probe();
  const auto exp = two_bytes ? probe.exp_for_two_bytes : probe.exp;
  constexpr int64_t iterations = 10000;
  return 1e-9 * best_rate(
                    threads, static_cast<double>(probe.exps) * iterations, [](int) {},
                    [&](int, int64_t repeats) { exp(repeats * iterations); });
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Probe* probe : usable_probes()) names.emplace_back(probe->isa);
  return names;
}

// Processors this process may run on.
int usable_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  return CPU_COUNT(&set);
}

// Bytes per level as the C library reports them; 0 where it does not know.
std::map<std::string, long> cache_sizes() {
  return {{"l1d", sysconf(_SC_LEVEL1_DCACHE_SIZE)},
          {"l2", sysconf(_SC_LEVEL2_CACHE_SIZE)},
          {"l3", sysconf(_SC_LEVEL3_CACHE_SIZE)},
          {"line", sysconf(_SC_LEVEL1_DCACHE_LINESIZE)}};
}

}  // namespace
}  // namespace fusewright

PYBIND11_MODULE(fusewright_host, module) {
  namespace py = pybind11;
  using release_gil = py::call_guard<py::gil_scoped_release>;
  module.doc() = "Processor features and probes of peak rates; no tensors.";
  module.def("isas", &fusewright::isas, "Instruction sets that kernels exist for and this machine has, best first.");
  module.def("usable_processors", &fusewright::usable_processors, "Processors this process may run on.");
  module.def("cache_sizes", &fusewright::cache_sizes, "Bytes of l1d, l2, l3 and of a line; 0 where unknown.");
  module.def("copy_bandwidth", &fusewright::copy_bandwidth, py::arg("bytes"), py::arg("threads") = 1, release_gil(),
             "GB/s, read and written, of copying within a working set of `bytes` over all threads.");
  module.def("read_bandwidth", &fusewright::read_bandwidth, py::arg("bytes"), py::arg("threads") = 1, release_gil(),
             "GB/s of reading a working set of `bytes` over all threads.");
  module.def("fma_peak", &fusewright::fma_peak, py::arg("threads") = 1, py::arg("isa") = "", release_gil(),
             "GFLOP/s of float32 fused multiply-add.");
  module.def("amx_peak", &fusewright::amx_peak, py::arg("threads") = 1, release_gil(),
             "GFLOP/s of bfloat16 AMX tile products, 0 without AMX.");
  module.def("exp_peak", &fusewright::exp_peak, py::arg("threads") = 1, py::arg("two_bytes") = false, release_gil(),
             "10^9 exponentials per second, for float32 results or for results of two bytes.");
}
