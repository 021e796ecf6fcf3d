// The chunks of the ring that a task's present chunk meets.
#pragma once

#include "fusewright/cpu/lsh_attention/chunk.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Slots of the window, each holding the chunk whose number it has; numbers count from the start of the task's round
// and run on below 0 and behind its last chunk, where the ring leads into other rounds.
template <class AnyChunk>
class Ring {
 public:
  // Windows are short; a longer one would not fit the cache, but must work.
  Ring(const LshAttentionParams& params, Arena& arena) : before_(params.chunks_before), after_(params.chunks_after) {
    const int64_t slots = params.window();
    slots_ = static_cast<Slot*>(arena.bytes(slots * static_cast<int64_t>(sizeof(Slot))));
    for (int64_t i = 0; i < slots; ++i) {
      const AnyChunk chunk(params, arena);
      if (!arena.counts_only()) slots_[i] = {chunk, 0, false};
    }
  }

  // Makes the window of chunk `number` present; `leave(chunk, its number)` is called for each that goes.
  template <class Leave>
  void move_to(const LshAttentionParams& params, const LshTask& task, int64_t number, Leave leave) {
    for (int64_t n = number - before_; n <= number + after_; ++n) {
      Slot& slot = slots_[index(n)];
      if (slot.filled && slot.number == n) continue;
      if (slot.filled) leave(slot.chunk, slot.number);
      const int64_t at = task.round * params.chunks_per_round() + n;
      slot.chunk.gather(params, task.batch, task.head, (at % params.ring() + params.ring()) % params.ring());
      slot.number = n;
      slot.filled = true;
    }
  }

  void move_to(const LshAttentionParams& params, const LshTask& task, int64_t number) {
    move_to(params, task, number, [](const AnyChunk&, int64_t) {});
  }

  const AnyChunk& chunk(int64_t number) const { return slots_[index(number)].chunk; }

  int64_t index(int64_t number) const {
    const int64_t slots = before_ + 1 + after_;
    return (number % slots + slots) % slots;
  }

  // Calls leave(chunk, its number) for all that are present.
  template <class Leave>
  void clear(Leave leave) {
    for (int64_t i = 0; i < before_ + 1 + after_; ++i) {
      if (slots_[i].filled) leave(slots_[i].chunk, slots_[i].number);
      slots_[i].filled = false;
    }
  }

 private:
  struct Slot {
    AnyChunk chunk;
    int64_t number;
    bool filled;
  };

  int64_t before_, after_;
  Slot* slots_;
};

}  // namespace fusewright::FUSEWRIGHT_ISA
