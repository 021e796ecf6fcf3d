// The instruction sets that CPU sources are compiled for, and which of them this machine can run.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// The build defines FUSEWRIGHT_FOR_EACH_ISA(MACRO), which calls MACRO for every instruction set compiled, best first.
#ifndef FUSEWRIGHT_FOR_EACH_ISA
#error "FUSEWRIGHT_FOR_EACH_ISA must name the instruction sets that this build holds"
#endif

namespace fusewright::isa {

#if defined(__x86_64__)
inline bool supports_generic() { return __builtin_cpu_supports("sse4.2"); }
inline bool supports_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi2");
}
inline bool supports_avx512() {
  return supports_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
}
inline bool supports_avx512_bf16() { return supports_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux hands out tile registers on request, once per process and before a thread uses them.
inline bool tile_registers_granted() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
inline bool supports_amx_model() { return supports_avx512_bf16(); }
inline bool supports_amx() {
  return supports_avx512_bf16() && __builtin_cpu_supports("avx512fp16") && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") && tile_registers_granted();
}
#else
inline bool supports_generic() { return true; }
#endif

}  // namespace fusewright::isa
