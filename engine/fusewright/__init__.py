"""Fused Transformer kernels for PyTorch: normalisation, attention and recurrent cells on CPU and GPU.

``functional`` has one function per op, ``nn`` the modules; ``patch`` swaps a model's modules for them, ``enable`` puts them
behind torch's own functions; ``explain`` tells which kernel serves a call and why, ``testing`` measures a result against
a float64 oracle.
"""

from fusewright import functional, nn
from fusewright.diagnostics import explain
from fusewright.integrations import disable, enable, enabled, patch, unpatch

__version__ = "0.1.0"
__all__ = ["disable", "enable", "enabled", "explain", "functional", "nn", "patch", "unpatch"]
