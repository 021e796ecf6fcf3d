// Parameters of rotary position embedding: pair i of a row turns by the angle of the row's position,
//   (a, b) -> (a cos - b sin, a sin + b cos).
#pragma once

#include <cstdint>

#include "fusewright/row_view.h"

namespace fusewright {

struct RotaryParams {
  int64_t rows = 0;           // B * H * T
  int64_t columns = 0;        // D
  int64_t pairs = 0;          // R; columns behind the first 2R stay
  int64_t heads = 1;          // H
  int64_t length = 1;         // T
  bool heads_inside = false;  // rows are numbered (b, t, h), else (b, h, t)

  RowView input;
  RowView output;  // may be input itself

  // Row p of sequence b at b * table_stride + p * R.
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t table_rows = 0;    // P
  int64_t table_stride = 0;  // 0: one table for all sequences

  const int64_t* positions = nullptr;  // (B, T) rows of the tables; nullptr: row t
  bool interleaved = false;            // pairs are columns (2i, 2i + 1), else (i, i + R)
  bool inverse = false;                // turn back
};

}  // namespace fusewright
