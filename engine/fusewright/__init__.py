"""Fused Transformer kernels for PyTorch: normalisation, attention and recurrent cells on CPU and GPU.

``functional`` has one function per op, ``nn`` the modules, ``explain`` tells which kernel serves a call and why,
``testing`` measures a result against a float64 oracle.
"""

from fusewright import functional, nn
from fusewright.diagnostics import explain

__version__ = "0.1.0"
__all__ = ["explain", "functional", "nn"]
