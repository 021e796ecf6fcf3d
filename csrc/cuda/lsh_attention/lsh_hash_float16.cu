#include "lsh_hash.cuh"

template cudaError_t fusewright::cuda::lsh_hash<__half>(const LshDigitParams&, void*);
