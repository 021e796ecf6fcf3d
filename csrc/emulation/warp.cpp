// Warp collectives: the lanes named in a mask meet, and each takes away its result.

#include <algorithm>
#include <cstdio>

#include "grid.h"

namespace fusewright::emulation {
namespace {

using Kind = WarpCollective::Kind;

std::string hexadecimal(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::shuffle:
      return "a shuffle";
    case Kind::ballot:
      return "a vote";
    case Kind::synchronise:
      return "__syncwarp";
    case Kind::matrices:
      return "a load, store or product of matrices";
  }
  return "";
}

// The lane that a lane reads from; its own where the source lies outside its part of the warp.
int source_lane(const WarpCollective& collective, int lane) {
  const int operand = collective.operands[lane];
  const int first = lane / collective.width * collective.width;
  int source = lane;
  switch (collective.shuffle) {
    case Shuffle::index:
      return first + operand % collective.width;
    case Shuffle::up:
      source = lane - operand;
      break;
    case Shuffle::down:
      source = lane + operand;
      break;
    case Shuffle::exclusive_or:
      source = lane ^ operand;
      return source < first + collective.width ? source : lane;
  }
  return source >= first && source < first + collective.width ? source : lane;
}

void deliver(const WarpCollective& collective, Warp& warp, const void* pc) {
  uint64_t votes = 0;
  Knowledge joined;
  if (collective.kind == Kind::synchronise) joined = grid.no_knowledge();
  for (int lane = 0; lane < warp_size; ++lane) {
    if ((collective.mask >> lane & 1) == 0) continue;
    if (collective.values[lane] != 0) votes |= uint64_t{1} << lane;
    if (!joined.empty()) warp.first[lane].clock.add_to(joined);
  }
  for (int lane = 0; lane < warp_size; ++lane) {
    if ((collective.mask >> lane & 1) == 0) continue;
    Thread& thread = warp.first[lane];
    if (collective.kind == Kind::shuffle) {
      const int source = source_lane(collective, lane);
      if ((collective.mask >> source & 1) == 0) {
        grid.fail("a shuffle reads lane " + std::to_string(source) + ", which mask " + hexadecimal(collective.mask) +
                      " does not name",
                  pc);
      }
      thread.received = collective.values[source];
    } else {
      thread.received = votes;
    }
    if (!joined.empty()) {
      thread.clock.become(joined);
      thread.clock.advance();
    }
    grid.make_runnable(thread);
  }
}

uint64_t meet(Kind kind, unsigned mask, uint64_t value, int operand, Shuffle shuffle, int width, const void* pc,
              const WarpBody* body = nullptr) {
  Thread& thread = grid.current();
  Warp& warp = grid.warp_of(thread);
  const unsigned own = 1u << thread.lane;
  if ((mask & own) == 0) grid.fail("mask " + hexadecimal(mask) + " does not name the calling lane", pc);
  if ((mask & warp.exited) != 0) {
    grid.fail("mask " + hexadecimal(mask) + " names lanes that have exited, " + hexadecimal(mask & warp.exited), pc);
  }
  // Lanes may meet under one mask while others of the warp wait for them under a wider one.
  auto found = std::find_if(warp.collectives.begin(), warp.collectives.end(),
                            [&](const WarpCollective& other) { return other.mask == mask; });
  if (found == warp.collectives.end()) {
    warp.collectives.push_back({.kind = kind, .mask = mask, .shuffle = shuffle, .width = width});
    found = std::prev(warp.collectives.end());
  } else if (found->kind != kind || found->shuffle != shuffle || found->width != width) {
    grid.fail(std::string(name_of(kind)) + " with mask " + hexadecimal(mask) + ", while lanes " +
                  hexadecimal(found->arrived) + " wait at " + name_of(found->kind) + " with mask " +
                  hexadecimal(found->mask),
              pc);
  }
  found->values[thread.lane] = value;
  found->operands[thread.lane] = operand;
  found->arrived |= own;
  if (found->arrived == mask) {
    const WarpCollective complete = *found;
    warp.collectives.erase(found);
    if (body != nullptr) (*body)(complete.values);
    deliver(complete, warp, pc);
    return thread.received;
  }
  grid.park({Wait::Kind::warp_collective, 0, mask, nullptr, 0, pc});
  return thread.received;
}

}  // namespace

void with_every_lane(const void* own, const WarpBody& body, const void* pc) {
  meet(Kind::matrices, 0xFFFFFFFFu, reinterpret_cast<uintptr_t>(own), 0, Shuffle::index, warp_size, pc, &body);
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width) {
  return meet(Kind::shuffle, mask, value, operand, kind, width, __builtin_return_address(0));
}
unsigned ballot(unsigned mask, bool predicate) {
  return static_cast<unsigned>(
      meet(Kind::ballot, mask, predicate, 0, Shuffle::index, warp_size, __builtin_return_address(0)));
}
void sync_warp(unsigned mask) {
  meet(Kind::synchronise, mask, 0, 0, Shuffle::index, warp_size, __builtin_return_address(0));
}

void check_no_collective_waits_for(Thread& thread) {
  for (const WarpCollective& collective : grid.warp_of(thread).collectives) {
    if ((collective.mask >> thread.lane & 1) != 0) {
      grid.fail(std::string("exits, while lanes ") + hexadecimal(collective.arrived) + " wait for it at " +
                    name_of(collective.kind) + " with mask " + hexadecimal(collective.mask),
                nullptr);
    }
  }
}

std::string describe_collective(unsigned mask, const Warp& warp) {
  for (const WarpCollective& collective : warp.collectives) {
    if (collective.mask == mask) {
      return std::string(name_of(collective.kind)) + " with mask " + hexadecimal(mask) + ", lanes " +
             hexadecimal(collective.arrived) + " have arrived";
    }
  }
  return "a warp collective";
}

}  // namespace fusewright::emulation
