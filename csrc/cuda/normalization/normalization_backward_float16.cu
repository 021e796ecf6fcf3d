#include "normalization_backward.cuh"

template cudaError_t fusewright::cuda::norm_backward<__half>(const NormBackwardParams&, const NormBackwardPlan&,
                                                             const NormBackwardPartials&, void*);
