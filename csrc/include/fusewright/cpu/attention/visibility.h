// Which pairs of a block of queries and a block of keys take part: none, all, or some.
#pragma once

#include "fusewright/attention.h"
#include "fusewright/cpu/vector.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Queries [query, query + queries) and keys [key, key + keys) of one sequence, counted from its start, for one head.
struct Block {
  int64_t batch, head;
  int64_t query, queries;
  int64_t key, keys;
  int64_t shift;
};

enum class Visible { none, some, all };

inline Visible both(Visible a, Visible b) {
  if (a == Visible::none || b == Visible::none) return Visible::none;
  return a == Visible::all && b == Visible::all ? Visible::all : Visible::some;
}

// Relative positions key - query - shift run from the last query and first key to the first query and last key.
inline Visible visible_in_window(const AttentionParams& params, const Block& block) {
  const int64_t lowest = block.key - (block.query + block.queries - 1) - block.shift;
  const int64_t highest = block.key + block.keys - 1 - block.query - block.shift;
  const int64_t left = params.window_left, right = params.window_right;
  if ((right >= 0 && lowest > right) || (left >= 0 && highest < -left)) return Visible::none;
  const bool all = (right < 0 || highest <= right) && (left < 0 || lowest >= -left);
  return all ? Visible::all : Visible::some;
}

// The keys that any of `queries` queries from `query` may see: [begin, end).
struct KeyRange {
  int64_t begin, end;
};

inline KeyRange keys_in_window(const AttentionParams& params, int64_t query, int64_t queries, int64_t keys,
                               int64_t shift) {
  KeyRange range{0, keys};
  if (params.window_left >= 0 && query + shift - params.window_left > 0) {
    range.begin = query + shift - params.window_left;
  }
  if (params.window_right >= 0) {
    const int64_t end = query + queries - 1 + shift + params.window_right + 1;
    if (end < keys) range.end = end;
  }
  return range;
}

inline Visible visible_in_block_mask(const AttentionParams& params, const Block& block) {
  if (params.block_mask == nullptr) return Visible::all;
  const bool* head = params.block_mask + block.head * params.block_head_stride;
  const int64_t size = params.block_size;
  bool any = false, all = true;
  for (int64_t r = block.query / size; r <= (block.query + block.queries - 1) / size; ++r) {
    for (int64_t c = block.key / size; c <= (block.key + block.keys - 1) / size; ++c) {
      const bool visible = head[r * params.block_columns + c];
      any |= visible;
      all &= visible;
    }
  }
  return all ? Visible::all : any ? Visible::some : Visible::none;
}

inline int64_t mask_offset(const MaskView& mask, const Block& block) {
  return block.batch * mask.stride[0] + block.head * mask.stride[1] + block.query * mask.stride[2] +
         block.key * mask.stride[3];
}

inline Visible visible_in_boolean_mask(const MaskView& mask, const Block& block) {
  if (mask.kind != MaskKind::boolean) return Visible::all;
  const char* data = static_cast<const char*>(mask.data) + mask_offset(mask, block);
  const int64_t rows = mask.stride[2] == 0 ? 1 : block.queries;
  const int64_t columns = mask.stride[3] == 0 ? 1 : block.keys;
  // Eight at a time: a byte of a boolean tensor is 0 or 1.
  constexpr uint64_t all_ones = 0x0101010101010101;
  uint64_t any = 0, all = all_ones;
  for (int64_t r = 0; r < rows; ++r) {
    const char* row = data + r * mask.stride[2];
    int64_t c = 0;
    if (mask.stride[3] == 1) {
      for (; c + 8 <= columns; c += 8) {
        uint64_t eight;
        memcpy(&eight, row + c, sizeof(eight));
        any |= eight;
        all &= eight;
      }
    }
    for (; c < columns; ++c) {
      const uint64_t one = row[c * mask.stride[3]];
      any |= one;
      all &= one * all_ones;
    }
    if (any != 0 && all != all_ones) return Visible::some;
  }
  return any == 0 ? Visible::none : Visible::all;
}

// What of a block takes part, and which of the three sources leave out a part of it.
struct Visibility {
  Visible window, block_mask, mask;

  Visible together() const { return both(both(window, block_mask), mask); }
};

inline Visibility visibility(const AttentionParams& params, const Block& block) {
  Visibility result{visible_in_window(params, block), Visible::all, Visible::all};
  if (result.window == Visible::none) return result;
  result.block_mask = visible_in_block_mask(params, block);
  if (result.block_mask == Visible::none) return result;
  result.mask = visible_in_boolean_mask(params.mask, block);
  return result;
}

}  // namespace fusewright::FUSEWRIGHT_ISA
