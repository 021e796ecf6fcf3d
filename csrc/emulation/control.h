// What tests set and ask. Kernels that run in the emulator may access only buffers that were added.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// Of every choice of the launches that follow: the order of blocks, warps, lanes and asynchronous copies.
void fusewright_emulation_set_seed(uint64_t seed);
void fusewright_emulation_set_multiprocessors(int count);
// The major number of the compute capability, 9 until this is called. It decides which kernels a launch chooses, and
// nothing else.
void fusewright_emulation_set_generation(int major);
// Clusters of blocks, 1 until this is called, that run at the same time: kernels whose blocks wait for each other.
void fusewright_emulation_set_clusters_together(int count);

// `written`: the contents came from the host. A kernel that reads other bytes before one has written them is reported.
void fusewright_emulation_add_buffer(const char* name, void* data, size_t bytes, int written, int writable);
void fusewright_emulation_remove_buffer(const void* data);

// Of the last launch that failed.
const char* fusewright_emulation_report();
}
