// Parameters of the cross-entropy kernels. Letters: M rows, C classes.
// With q the distribution that a row wants, smoothed and weighted, and p the softmax of its logits:
//   loss = sum(q) * lse - sum(q * logits) + z_loss * lse^2
//   grad_logits = grad * (p * (sum(q) + 2 * z_loss * lse) - q)
#pragma once

#include <cstdint>

#include "fusewright/row_view.h"

namespace fusewright {

struct CrossEntropyParams {
  int64_t rows = 0;     // M
  int64_t columns = 0;  // C

  RowView input;                    // (M, C); logits, or what softcap turns into logits
  const int64_t* target = nullptr;  // a class for each of M rows; nullptr: probabilities
  RowView probabilities;            // (M, C), absent with classes
  const float* weight = nullptr;    // C factors, or nullptr
  int64_t ignore_index = 0;         // rows of this class have loss and gradient 0
  double label_smoothing = 0;
  float z_loss = 0;
  float softcap = 0;  // logits = softcap * tanh(input / softcap); 0: none

  // M each: the largest logit, the log of the sum of exponentials relative to it, and sum(q). The first two add up to
  // the log-sum-exp; apart they keep their digits where logits are large.
  float* largest = nullptr;
  float* log_sum = nullptr;
  float* mass = nullptr;
};

struct CrossEntropyForwardParams : CrossEntropyParams {
  float* losses = nullptr;  // M
};

struct CrossEntropyBackwardParams : CrossEntropyParams {
  const float* grad_losses = nullptr;  // M
  RowView grad_input;                  // (M, C), may be input itself; absent if not wanted
  RowView grad_target;                 // (M, C) of probabilities, absent if not wanted
};

}  // namespace fusewright
