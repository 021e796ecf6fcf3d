#include "recurrent_forward.cuh"

template cudaError_t fusewright::cuda::recurrent_forward<__half>(const RecurrentForwardStepsParams&,
                                                                 const RecurrentPlan&, void*);
