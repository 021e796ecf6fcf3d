#include "cuda/normalization/normalization_backward.cuh"

namespace fusewright::cuda {
FUSEWRIGHT_NORM_BACKWARD(__half);
}
