#include "lsh_hash.cuh"

template cudaError_t fusewright::cuda::lsh_hash<__nv_bfloat16>(const LshDigitParams&, void*);
