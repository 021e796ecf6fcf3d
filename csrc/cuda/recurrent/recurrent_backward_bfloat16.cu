#include "recurrent_backward.cuh"

template cudaError_t fusewright::cuda::recurrent_backward<__nv_bfloat16>(const RecurrentBackwardStepsParams&,
                                                                         const RecurrentPlan&, void*);
