#include "normalization_backward.cuh"

template cudaError_t fusewright::cuda::norm_backward<float>(const NormBackwardParams&, const NormBackwardPlan&,
                                                            const NormBackwardPartials&, void*);
