#include "recurrent_forward.cuh"

template cudaError_t fusewright::cuda::recurrent_forward<__nv_bfloat16>(const RecurrentForwardStepsParams&,
                                                                        const RecurrentPlan&, void*);
