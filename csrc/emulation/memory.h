// What memory a kernel may access, and for each byte who wrote and read it last: out-of-range accesses, reads of what
// nothing wrote, and races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "clock.h"

namespace fusewright::emulation {

enum class Access : uint8_t { read, write, atomic };

// Who accesses, and what it knows to have happened before.
struct Observer {
  int agent = 0;
  Time now = 0;
  bool async_proxy = false;
  bool ordered = true;  // with its own earlier accesses, as a thread is and the copies of one slot are not
  const Knowledge* knowledge = nullptr;

  Time knows(int other) const { return other == agent && ordered ? now : knowledge->times()[other]; }
  // What an ordinary write must be known as for this observer to see it.
  Time sees(int other) const { return async_proxy ? knowledge->async_times()[other] : knows(other); }
};

// The history of one byte. All zero: never accessed.
struct ByteHistory {
  uint32_t write_run;  // the run (a cluster of blocks) that accessed it, see AccessChecker::begin_run
  uint32_t read_run;
  Time write_time;
  Time read_time;  // with several readers: their index in AccessChecker's lists
  uint16_t writer;
  uint16_t reader;
  bool atomic_write;
};

// A range that kernels may access, with the history of its bytes.
class Region {
 public:
  enum class Content { unwritten, written };

  Region(std::string name, void* begin, size_t bytes, Content content, bool writable, bool shared);
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  ~Region();

  bool contains(uintptr_t address) const { return address >= begin_ && address - begin_ < bytes_; }
  uintptr_t begin() const { return begin_; }
  size_t bytes() const { return bytes_; }
  const std::string& name() const { return name_; }
  bool writable() const { return writable_; }
  bool shared() const { return shared_; }  // memory of a block, whose contents end with it
  Content content() const { return content_; }

  // Allocated at the first access, as most buffers of a process never meet a kernel.
  ByteHistory* history();

 private:
  std::string name_;
  uintptr_t begin_;
  size_t bytes_;
  Content content_;
  bool writable_;
  bool shared_;
  ByteHistory* history_ = nullptr;
};

// The global memory that was handed to the emulator.
class GlobalMemory {
 public:
  void add(const std::string& name, void* data, size_t bytes, Region::Content content, bool writable);
  void remove(const void* data);
  Region* find(uintptr_t address);
  // "16 bytes behind buffer 'output' of 400 bytes", of whatever region lies nearest.
  std::string describe(uintptr_t address) const;

 private:
  std::map<uintptr_t, Region> regions_;
  Region* last_found_ = nullptr;
};

// Checks accesses against the history and adds them to it.
class AccessChecker {
 public:
  // Blocks of one launch are unordered; launches follow one another.
  void begin_launch() { first_run_of_launch_ = run_ + 1; }
  // A cluster of blocks, whose threads run together.
  void begin_run() {
    ++run_;
    readers_.clear();
  }

  // `agent_name` tells who an agent of the present run is. An empty result means that nothing is wrong.
  std::string check(Region& region, size_t offset, size_t bytes, Access access, const Observer& observer,
                    const std::function<std::string(int)>& agent_name);

  // Contents that came from the host, as by cudaMemset.
  void mark_written(Region& region, size_t offset, size_t bytes);

 private:
  struct Reader {
    Time time;
    uint16_t agent;
    uint32_t next;  // 0: the last
  };
  static constexpr uint16_t several_readers = 0xFFFF;
  static constexpr uint16_t readers_of_several_runs = 0xFFFE;

  bool other_run_of_launch(uint32_t run) const { return run >= first_run_of_launch_ && run != run_; }
  int unordered_reader(const ByteHistory& byte, const Observer& observer) const;
  void add_reader(ByteHistory& byte, const Observer& observer);

  uint32_t run_ = 0;
  uint32_t first_run_of_launch_ = 1;
  std::vector<Reader> readers_;
};

}  // namespace fusewright::emulation
