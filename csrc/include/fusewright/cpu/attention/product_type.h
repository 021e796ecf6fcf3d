// Which type the products of an attention task run in: that of its tensors, or parts of it where tiles multiply those.
#pragma once

#include "fusewright/cpu/arena.h"
#include "fusewright/cpu/attention/split_blocks.h"
#include "fusewright/cpu/rows.h"

namespace fusewright::FUSEWRIGHT_ISA {

#if FUSEWRIGHT_HAS_TILES

template <class T>
struct InParts {
  using type = T;
};
template <>
struct InParts<Float16> {
  using type = Split<Float16, 2>;
};
template <>
struct InParts<float> {
  using type = Split<float, 3>;
};

template <class T>
inline bool multiplied_in_parts(const AttentionParams& params) {
  return params.score_weight == nullptr && (!is_float<T> || params.split_float32);
}

// Parts of an infinity are one infinity and zeros, and zero times infinity is NaN: a logit of -inf, which should only
// hide its key, would spoil the row. Decided by keys and values alone, so that no row depends on another.
template <class T>
inline bool all_finite(const HeadsView& view, const AttentionSequence& sequence, int64_t key_head, int64_t width) {
  const T* first = static_cast<const T*>(view.data) + view.offset(sequence.batch, key_head, sequence.key_begin);
  // The largest float32 would be rounded to a part that is infinite.
  return all_finite(Rows<T>{first, view.row_stride, sequence.key_count, width}, 2.0f);
}

#endif

// Calls visit(T{}) with the type for the queries that meet one key head of a sequence.
template <class Visit>
inline void with_product_type(const AttentionParams& params, [[maybe_unused]] const AttentionSequence& sequence,
                              [[maybe_unused]] int64_t key_head, Visit visit) {
  with_type(params.dtype, [&](auto element) {
#if FUSEWRIGHT_HAS_TILES
    using T = decltype(element);
    using Parts = typename InParts<T>::type;
    if constexpr (segments<Parts> > 1) {
      if (multiplied_in_parts<T>(params) && all_finite<T>(params.key, sequence, key_head, params.width) &&
          all_finite<T>(params.value, sequence, key_head, params.value_width)) {
        return visit(Parts{});
      }
    }
#endif
    visit(element);
  });
}

// Bytes that lay_out(T{}, arena) takes for the type that takes the most.
template <class LayOut>
inline int64_t most_scratch(const AttentionParams& params, LayOut lay_out) {
  int64_t most = 0;
  with_type(params.dtype, [&](auto element) {
    const auto count = [&](auto type) {
      Arena arena(nullptr);
      lay_out(type, arena);
      if (arena.used() > most) most = arena.used();
    };
    count(element);
#if FUSEWRIGHT_HAS_TILES
    count(typename InParts<decltype(element)>::type{});
#endif
  });
  return most;
}

}  // namespace fusewright::FUSEWRIGHT_ISA
