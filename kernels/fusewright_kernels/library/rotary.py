"""Schemas of rotary position embedding: input (B, H, T, D), cos and sin (B or 1, P, R) float32, positions (B, T)."""

from fusewright_kernels.library.attention import in_layout_of
from fusewright_kernels.library.registry import define

_INPUTS = "Tensor input, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse"

define("rotary_forward", f"({_INPUTS}) -> Tensor", lambda input, *_: in_layout_of(input, input.shape))

# In place: each row is read before it is written.
define(
    "rotary_in_place",
    "(Tensor(a!) input, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> ()",
    lambda *args: None,
)
