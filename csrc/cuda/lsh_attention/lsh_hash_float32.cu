#include "lsh_hash.cuh"

template cudaError_t fusewright::cuda::lsh_hash<float>(const LshDigitParams&, void*);
