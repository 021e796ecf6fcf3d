// Vector clocks: what an execution knows to have happened before it.
//
// Every thread, and every slot of an asynchronous copy, is an agent with a clock that advances when it releases (at a
// barrier, an arrival, ...). An access is stamped with its agent and that agent's clock; it happened before another
// agent's access exactly if that agent has acquired a knowledge with at least this stamp.
//
// A second half of the vector holds what is known to the asynchronous proxy (bulk copies, wgmma), to which an ordinary
// write becomes visible by fence.proxy.async only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace fusewright::emulation {

using Time = uint32_t;

// An immutable vector, shared by the threads that left a barrier together. Counted by hand: everything runs on one
// host thread, and a std::shared_ptr would count atomically.
class Knowledge {
 public:
  Knowledge() = default;
  explicit Knowledge(int agents) : shared_(new Shared{1, std::vector<Time>(2 * agents)}) {}
  Knowledge(const Knowledge& other) : shared_(other.shared_) {
    if (shared_ != nullptr) ++shared_->references;
  }
  Knowledge(Knowledge&& other) noexcept : shared_(std::exchange(other.shared_, nullptr)) {}
  Knowledge& operator=(Knowledge other) noexcept {
    std::swap(shared_, other.shared_);
    return *this;
  }
  ~Knowledge() {
    if (shared_ != nullptr && --shared_->references == 0) delete shared_;
  }

  // A copy that only the caller has, to be changed before it is handed on.
  Knowledge copy() const {
    Knowledge result;
    result.shared_ = new Shared{1, shared_->times};
    return result;
  }

  bool empty() const { return shared_ == nullptr; }
  bool operator==(const Knowledge& other) const { return shared_ == other.shared_; }

  int agents() const { return static_cast<int>(shared_->times.size() / 2); }
  Time* times() { return shared_->times.data(); }
  const Time* times() const { return shared_->times.data(); }
  Time* async_times() { return times() + agents(); }
  const Time* async_times() const { return times() + agents(); }

  void join(const Knowledge& other) {
    if (other.empty() || other == *this) return;
    const Time* source = other.times();
    Time* target = times();
    for (int i = 0; i < 2 * agents(); ++i) target[i] = std::max(target[i], source[i]);
  }

 private:
  struct Shared {
    int64_t references;
    std::vector<Time> times;
  };
  Shared* shared_ = nullptr;
};

// One agent's knowledge of itself and of the others.
class Clock {
 public:
  void start(int agent, const Knowledge& origin) {
    agent_ = agent;
    others_ = origin;
    now_ = 1;
    async_now_ = 0;
  }

  int agent() const { return agent_; }
  Time now() const { return now_; }
  Time knows(int agent) const { return agent == agent_ ? now_ : others_.times()[agent]; }

  // What is handed to whoever acquires it; later accesses of this agent are not part of it.
  Knowledge release() {
    Knowledge released = others_.copy();
    add_to(released);
    advance();
    return released;
  }

  // The same for many agents at once: add_to each, then acquire and advance each.
  void add_to(Knowledge& joined) const {
    joined.join(others_);
    add_own_to(joined);
  }
  void add_own_to(Knowledge& joined) const {
    joined.times()[agent_] = std::max(joined.times()[agent_], now_);
    joined.async_times()[agent_] = std::max(joined.async_times()[agent_], async_now_);
  }
  void advance() { ++now_; }

  void acquire(const Knowledge& released) {
    if (released.empty() || released == others_) return;
    Knowledge joined = others_.copy();
    joined.join(released);
    others_ = std::move(joined);
  }
  // For an agent whose own knowledge went into `joined`.
  void become(const Knowledge& joined) { others_ = joined; }

  // fence.proxy.async: what this agent knows becomes visible to asynchronous copies that follow it.
  void fence_async_proxy() {
    Knowledge fenced = others_.copy();
    for (int i = 0; i < fenced.agents(); ++i) {
      fenced.async_times()[i] = std::max(fenced.async_times()[i], fenced.times()[i]);
    }
    others_ = std::move(fenced);
    async_now_ = now_;
  }

  const Knowledge& others() const { return others_; }

 private:
  int agent_ = 0;
  Time now_ = 1;
  Time async_now_ = 0;
  Knowledge others_;
};

}  // namespace fusewright::emulation
