// Peak-rate probes of one instruction set: each runs on the calling thread and returns when done.
#pragma once

#include <cstdint>

namespace fusewright {

struct Probe {
  const char* isa;
  int64_t fma_flops;  // floating-point operations of one fma() iteration
  int64_t amx_flops;  // the same of amx(); 0 without AMX
  int64_t exps;       // exponentials of one exp() iteration
  float (*fma)(int64_t iterations);
  void (*amx)(int64_t iterations);
  float (*read)(const char* data, int64_t bytes);
  float (*exp)(int64_t iterations);                // to float32 accuracy
  float (*exp_for_two_bytes)(int64_t iterations);  // for results of two bytes
};

}  // namespace fusewright
