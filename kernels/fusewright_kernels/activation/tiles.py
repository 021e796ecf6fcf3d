"""The tile of the Triton backward of GELU with a bias; the other activations take ``element_wise_tile``."""

from fusewright_kernels.triton_support import Tile

# Every program leaves one partial sum for each column: 32 rows keep them below a tenth of the bf16 input.
BIAS_GRADIENT = Tile(32, 128, 8, whole_rows=False)
