// Chooses the kernel table by what the processor can do. Compiled for the baseline instruction set only.

#include <cstdlib>
#include <cstring>

#include "fusewright/cpu/isa.h"
#include "fusewright/cpu/kernels.h"

namespace fusewright {

#define FUSEWRIGHT_DECLARE_TABLE(isa) \
  namespace isa {                     \
  extern const CpuKernels table;      \
  }
FUSEWRIGHT_FOR_EACH_ISA(FUSEWRIGHT_DECLARE_TABLE)

namespace {

struct Candidate {
  const CpuKernels* table;
  bool (*supported)();
};

#define FUSEWRIGHT_CANDIDATE(name) {&name::table, isa::supports_##name},
const Candidate candidates[] = {FUSEWRIGHT_FOR_EACH_ISA(FUSEWRIGHT_CANDIDATE)};

const CpuKernels* find(const char* isa) {
  for (const Candidate& candidate : candidates) {
    if ((isa == nullptr || strcmp(isa, candidate.table->isa) == 0) && candidate.supported()) return candidate.table;
  }
  return nullptr;
}

const CpuKernels* initial() {
  const char* forced = getenv("FUSEWRIGHT_CPU_ISA");
  return find(forced != nullptr && forced[0] != '\0' ? forced : nullptr);
}

const CpuKernels*& selected() {
  static const CpuKernels* table = initial();
  return table;
}

bool& float32_split() {
  static const char* products = getenv("FUSEWRIGHT_FLOAT32_PRODUCTS");
  static bool split = products != nullptr && strcmp(products, "split") == 0;
  return split;
}

}  // namespace
}  // namespace fusewright

extern "C" {

const fusewright::CpuKernels* fusewright_cpu_kernels() { return fusewright::selected(); }

int fusewright_cpu_select(const char* isa) {
  const fusewright::CpuKernels* table = fusewright::find(isa);
  if (table == nullptr) return 1;
  fusewright::selected() = table;
  return 0;
}

int fusewright_cpu_float32_split() { return fusewright::float32_split(); }

void fusewright_cpu_split_float32(int split) { fusewright::float32_split() = split != 0; }

const char* fusewright_cpu_selected() {
  const fusewright::CpuKernels* table = fusewright::selected();
  return table == nullptr ? "" : table->isa;
}

const char* fusewright_cpu_available() {
  static char names[128];
  if (names[0] == '\0') {
    for (const fusewright::Candidate& candidate : fusewright::candidates) {
      if (!candidate.supported()) continue;
      if (names[0] != '\0') strcat(names, ",");
      strcat(names, candidate.table->isa);
    }
  }
  return names;
}
}
