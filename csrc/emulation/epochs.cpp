// Words by which blocks that run at the same time tell each other how far they are.

#include "grid.h"

namespace fusewright::emulation {

void publish_epoch(uint32_t* word, uint32_t epoch) {
  grid.check_access(word, sizeof(*word), Access::atomic, __builtin_return_address(0));
  *word = epoch;
  // Whoever published before is not known through this one unless it was waited for, as with a store that releases.
  grid.published()[word] = grid.current().clock.release();
  grid.wake_waiting();
  grid.maybe_yield();
}

void wait_for_epoch(const uint32_t* word, uint32_t epoch) {
  const void* pc = __builtin_return_address(0);
  grid.check_access(word, sizeof(*word), Access::atomic, pc);
  grid.maybe_yield();
  Wait wait{Wait::Kind::epoch, 0, 0, nullptr, 0, pc};
  wait.word = word;
  wait.epoch = epoch;
  grid.wait_until([&] { return *word >= epoch; }, wait);
  const auto found = grid.published().find(word);
  if (found != grid.published().end()) grid.current().clock.acquire(found->second);
}

std::string describe_epoch(const Wait& wait) {
  return "epoch " + std::to_string(wait.epoch) + " of a word that holds " + std::to_string(*wait.word);
}

}  // namespace fusewright::emulation
