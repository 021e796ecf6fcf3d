#include "recurrent_backward.cuh"

template cudaError_t fusewright::cuda::recurrent_backward<__half>(const RecurrentBackwardStepsParams&,
                                                                  const RecurrentPlan&, void*);
