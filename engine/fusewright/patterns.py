"""Block-sparse patterns for ``scaled_dot_product_attention(..., pattern=...)``.

``Window(4, 0) | Global(1) | Random(2)`` is Big Bird's pattern; see the classes.
"""

from fusewright_kernels.attention.op import Global, Pattern, PerHead, Random, Strided, Union, Window

__all__ = ["Global", "Pattern", "PerHead", "Random", "Strided", "Union", "Window"]
