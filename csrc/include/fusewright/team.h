// Threads that work through the same steps together and wait for each other after each one.
//
// A team is whoever has come when its first member stops waiting: a pool that starts fewer threads than were asked for,
// that is busy or that runs its ranges one after the other only makes it smaller, and nobody waits for a thread that is
// not there.
#pragma once

#include <sched.h>

#include <cstdint>

namespace fusewright {

class Team {
 public:
  static constexpr int64_t most_members = 64;

  // Always inlined: compiled for several instruction sets, see row_view.h.
#define FUSEWRIGHT_TEAM_INLINE inline __attribute__((always_inline))

  FUSEWRIGHT_TEAM_INLINE explicit Team(int64_t expected) : expected_(expected) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // This thread's number in the team, or -1 if it came too late.
  FUSEWRIGHT_TEAM_INLINE int64_t join() {
    const int64_t ticket = __atomic_fetch_add(&entered_.value, 1, __ATOMIC_ACQ_REL);
    if (ticket >= closed) return -1;
    if (ticket == 0) {
      for (int spins = 0; spins < spins_for_latecomers; ++spins) {
        if (__atomic_load_n(&entered_.value, __ATOMIC_ACQUIRE) >= expected_) break;
        pause();
      }
      const int64_t size = __atomic_fetch_or(&entered_.value, closed, __ATOMIC_ACQ_REL);
      __atomic_store_n(&size_.value, size, __ATOMIC_RELEASE);
    } else {
      wait_until([&] { return __atomic_load_n(&size_.value, __ATOMIC_ACQUIRE) != 0; });
    }
    return ticket;
  }

  FUSEWRIGHT_TEAM_INLINE int64_t size() const { return size_.value; }

  // Returns once every member has called it as often as this one: what they wrote before is then visible.
  FUSEWRIGHT_TEAM_INLINE void wait(int64_t member) {
    const int64_t members = size_.value;
    if (members == 1) return;
    const int64_t round = done_[member].value + 1;
    __atomic_store_n(&done_[member].value, round, __ATOMIC_RELEASE);
    for (int64_t other = 0; other < members; ++other) {
      wait_until([&] { return __atomic_load_n(&done_[other].value, __ATOMIC_ACQUIRE) >= round; });
    }
  }

 private:
  static constexpr int64_t closed = int64_t{1} << 32;
  // About 0.1 ms: an idle pool's threads come within a few microseconds.
  static constexpr int spins_for_latecomers = 1 << 12;
  // Behind this many the core is given away: the thread waited for may need it.
  static constexpr int spins_before_yield = 1 << 12;

  // On a cache line of its own, as each is written by another thread.
  struct alignas(64) Counter {
    int64_t value = 0;
  };

  static FUSEWRIGHT_TEAM_INLINE void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  template <class Ready>
  static FUSEWRIGHT_TEAM_INLINE void wait_until(Ready ready) {
    for (int spins = 0; !ready(); ++spins) {
      if (spins < spins_before_yield) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

  const int64_t expected_;
  Counter entered_, size_;
  Counter done_[most_members];
};

#undef FUSEWRIGHT_TEAM_INLINE

}  // namespace fusewright
