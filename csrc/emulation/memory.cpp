#include "memory.h"

#include <sys/mman.h>

#include <stdexcept>
#include <utility>

namespace fusewright::emulation {

Region::Region(std::string name, void* begin, size_t bytes, Content content, bool writable, bool shared)
    : name_(std::move(name)),
      begin_(reinterpret_cast<uintptr_t>(begin)),
      bytes_(bytes),
      content_(content),
      writable_(writable),
      shared_(shared) {}

Region::~Region() {
  if (history_ != nullptr) munmap(history_, bytes_ * sizeof(ByteHistory));
}

ByteHistory* Region::history() {
  if (history_ == nullptr) {
    // Zero pages of the system: only those of bytes that are accessed ever take memory.
    void* pages = mmap(nullptr, bytes_ * sizeof(ByteHistory), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    history_ = static_cast<ByteHistory*>(pages);
  }
  return history_;
}

void GlobalMemory::add(const std::string& name, void* data, size_t bytes, Region::Content content, bool writable) {
  if (bytes == 0) return;
  remove(data);
  regions_.try_emplace(reinterpret_cast<uintptr_t>(data), name, data, bytes, content, writable, false);
}

void GlobalMemory::remove(const void* data) {
  last_found_ = nullptr;
  regions_.erase(reinterpret_cast<uintptr_t>(data));
}

Region* GlobalMemory::find(uintptr_t address) {
  if (last_found_ != nullptr && last_found_->contains(address)) return last_found_;
  auto next = regions_.upper_bound(address);
  if (next == regions_.begin()) return nullptr;
  Region& region = std::prev(next)->second;
  if (!region.contains(address)) return nullptr;
  last_found_ = &region;
  return last_found_;
}

std::string GlobalMemory::describe(uintptr_t address) const {
  const auto next = regions_.upper_bound(address);
  const Region* before = next == regions_.begin() ? nullptr : &std::prev(next)->second;
  const Region* behind = next == regions_.end() ? nullptr : &next->second;
  const size_t past = before == nullptr ? SIZE_MAX : address - (before->begin() + before->bytes());
  const size_t ahead = behind == nullptr ? SIZE_MAX : behind->begin() - address;
  if (past == SIZE_MAX && ahead == SIZE_MAX) return "no buffer is registered";
  const Region& nearest = past <= ahead ? *before : *behind;
  return std::to_string(std::min(past, ahead)) + " bytes " + (past <= ahead ? "behind" : "before") + " buffer '" +
         nearest.name() + "' of " + std::to_string(nearest.bytes()) + " bytes";
}

int AccessChecker::unordered_reader(const ByteHistory& byte, const Observer& observer) const {
  if (byte.reader != several_readers) return byte.read_time > observer.knows(byte.reader) ? byte.reader : -1;
  for (uint32_t index = byte.read_time; index != 0; index = readers_[index].next) {
    const Reader& reader = readers_[index];
    if (reader.time > observer.knows(reader.agent)) return reader.agent;
  }
  return -1;
}

// Readers that the new one knows of are dropped: whoever knows the new one knows those.
void AccessChecker::add_reader(ByteHistory& byte, const Observer& observer) {
  if (other_run_of_launch(byte.read_run)) {
    byte.read_run = run_;
    byte.reader = readers_of_several_runs;
    return;
  }
  const bool first = byte.read_run != run_;
  byte.read_run = run_;
  if (!first && byte.reader == readers_of_several_runs) return;
  if (first || (byte.reader != several_readers && byte.read_time <= observer.knows(byte.reader))) {
    byte.reader = static_cast<uint16_t>(observer.agent);
    byte.read_time = observer.now;
    return;
  }
  if (byte.reader != several_readers) {
    if (readers_.empty()) readers_.push_back({});  // index 0 ends a list
    readers_.push_back({byte.read_time, byte.reader, 0});
    byte.reader = several_readers;
    byte.read_time = static_cast<Time>(readers_.size() - 1);
  }
  for (uint32_t index = byte.read_time; index != 0; index = readers_[index].next) {
    if (readers_[index].agent == observer.agent) {
      readers_[index].time = observer.now;
      return;
    }
  }
  readers_.push_back({observer.now, static_cast<uint16_t>(observer.agent), byte.read_time});
  byte.read_time = static_cast<Time>(readers_.size() - 1);
}

std::string AccessChecker::check(Region& region, size_t offset, size_t bytes, Access access, const Observer& observer,
                                 const std::function<std::string(int)>& agent_name) {
  ByteHistory* history = region.history() + offset;
  for (size_t i = 0; i < bytes; ++i) {
    ByteHistory& byte = history[i];
    const auto conflict = [&](const char* what, const std::string& who) {
      return std::string(what) + who + " (byte " + std::to_string(i) + " of the access)";
    };
    const bool atomics = access == Access::atomic && byte.atomic_write;
    if (byte.write_run == run_) {
      if (!atomics && byte.write_time > observer.knows(byte.writer)) {
        return conflict("race with the write by ", agent_name(byte.writer));
      }
      if (!atomics && byte.write_time > observer.sees(byte.writer)) {
        return conflict("no fence.proxy.async between this asynchronous access and the write by ",
                        agent_name(byte.writer));
      }
    } else if (!region.shared() && other_run_of_launch(byte.write_run) && !atomics) {
      return conflict("race with a write by another block", "");
    } else if (access != Access::write && (region.shared() || byte.write_run == 0) &&
               region.content() == Region::Content::unwritten) {
      return conflict("nothing has written it", "");
    }
    if (access == Access::read) {
      add_reader(byte, observer);
      continue;
    }
    if (byte.read_run == run_ && byte.reader == readers_of_several_runs) {
      return conflict("race with reads by other blocks", "");
    }
    if (byte.read_run == run_) {
      const int reader = unordered_reader(byte, observer);
      if (reader >= 0) return conflict("race with the read by ", agent_name(reader));
    } else if (!region.shared() && other_run_of_launch(byte.read_run)) {
      return conflict("race with a read by another block", "");
    }
    byte.write_run = run_;
    byte.write_time = observer.now;
    byte.writer = static_cast<uint16_t>(observer.agent);
    byte.atomic_write = access == Access::atomic;
    byte.read_run = 0;
  }
  return "";
}

void AccessChecker::mark_written(Region& region, size_t offset, size_t bytes) {
  ++run_;
  ByteHistory* history = region.history() + offset;
  for (size_t i = 0; i < bytes; ++i) {
    history[i] = {};
    history[i].write_run = run_;
  }
  first_run_of_launch_ = run_ + 1;
}

}  // namespace fusewright::emulation
