#include "normalization_backward.cuh"

template cudaError_t fusewright::cuda::norm_backward<__nv_bfloat16>(const NormBackwardParams&, const NormBackwardPlan&,
                                                                    const NormBackwardPartials&, void*);
