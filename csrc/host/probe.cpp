// Peak-rate probes, compiled once per instruction set.

#include "probe.h"

#include "fusewright/cpu/exp.h"
#include "fusewright/cpu/vector.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

// Independent chains enough to hide a latency of 4 to 5 cycles on two units; named one by one, since the compiler keeps
// an array that an asm statement touches in memory.
constexpr int chains = 10;

float fma(int64_t iterations) {
  const Float factor = broadcast(0.999f), addend = broadcast(0.001f);
  Float a = factor, b = a + 1, c = b + 1, d = c + 1, e = d + 1, f = e + 1, g = f + 1, h = g + 1, i = h + 1, j = i + 1;
  for (int64_t n = 0; n < iterations; ++n) {
    a = a * factor + addend;
    b = b * factor + addend;
    c = c * factor + addend;
    d = d * factor + addend;
    e = e * factor + addend;
    f = f * factor + addend;
    g = g * factor + addend;
    h = h * factor + addend;
    i = i * factor + addend;
    j = j * factor + addend;
    // Keeps the compiler from taking iterations together.
    asm volatile("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d), "+x"(e), "+x"(f), "+x"(g), "+x"(h), "+x"(i), "+x"(j));
  }
  return sum_lanes(((a + b) + (c + d)) + ((e + f) + (g + h)) + (i + j));
}

float read(const char* data, int64_t bytes) {
  Float sums[8] = {};
  constexpr int64_t step = 8 * vector_bytes;
  for (int64_t offset = 0; offset + step <= bytes; offset += step) {
    for (int c = 0; c < 8; ++c) sums[c] += load(reinterpret_cast<const float*>(data + offset + c * vector_bytes));
  }
  Float total = {};
  for (int c = 0; c < 8; ++c) total += sums[c];
  return sum_lanes(total);
}

constexpr int exp_vectors = 8;

template <Float (*function)(Float)>
float exponentials(int64_t iterations) {
  Float sums[exp_vectors] = {};
  for (int64_t n = 0; n < iterations; ++n) {
    for (int v = 0; v < exp_vectors; ++v) {
      Float x = broadcast(-0.5f * v);
      // Hides the value, or it would be computed once and for all.
      asm volatile("" : "+x"(x));
      sums[v] += function(x);
    }
  }
  Float total = {};
  for (int v = 0; v < exp_vectors; ++v) total += sums[v];
  return sum_lanes(total);
}

#if defined(__AMX_BF16__)
constexpr int64_t tile_flops = 2 * 16 * 16 * 32;

// Four accumulators of 16 x 16 float32, fed by two A and two B tiles: products never wait for each other.
void amx(int64_t iterations) {
  struct alignas(64) {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } configuration;
  _tile_loadconfig(&configuration);
  alignas(64) static const char zeros[1024] = {};
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < iterations; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}
constexpr int64_t amx_flops = 4 * tile_flops;
#else
constexpr void (*amx)(int64_t) = nullptr;
constexpr int64_t amx_flops = 0;
#endif

}  // namespace

extern const Probe probe;
const Probe probe = {FUSEWRIGHT_ISA_NAME,
                     2 * lanes * chains,
                     amx_flops,
                     exp_vectors * lanes,
                     fma,
                     amx,
                     read,
                     exponentials<exp_nonpositive>,
                     exponentials<exp_nonpositive_for_two_bytes>};

}  // namespace fusewright::FUSEWRIGHT_ISA
