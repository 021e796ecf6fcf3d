"""Fused Transformer kernels for PyTorch: normalisation, attention and recurrent cells on CPU and GPU.

``functional`` has one function per op, ``nn`` the modules, ``models`` what is built from them, ``generation`` the ways
to decode. ``patch`` swaps a model's modules for ours, ``enable`` puts ours behind torch's own functions,
``attn_implementation="fusewright"`` into the models of transformers. ``explain`` tells which kernel serves a call and
why, ``testing`` measures a result against a float64 oracle.
"""

from fusewright import functional, generation, models, nn
from fusewright.diagnostics import explain
from fusewright.integrations import disable, enable, enabled, patch, unpatch

__version__ = "0.1.0"
__all__ = [
    "disable",
    "enable",
    "enabled",
    "explain",
    "functional",
    "generation",
    "models",
    "nn",
    "patch",
    "unpatch",
]
