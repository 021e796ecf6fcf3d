"""Other libraries that compute the same thing: how to find them, why one is absent, how to install it."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fusewright_bench.case import Forward, Inputs, Provider


@dataclass(frozen=True)
class Peer:
    """A library to compare with. ``module`` is its import name."""

    name: str
    module: str
    install: str
    cuda_only: bool = True

    def absence(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if importlib.util.find_spec(self.module) is None:
            return f"the package {self.module} is not installed"
        if self.cuda_only and device.type != "cuda":
            return f"runs on CUDA devices only, this run is on {device.type}"
        return None

    def provider(self, bind: Callable[[Inputs], Forward]) -> Provider:
        """The peer's version of one op; ``bind`` imports the library, so it is called only where it is present."""
        return Provider(self.name, self.name, bind, absence=self.absence, install=self.install)


LIGER = Peer("liger-kernel", "liger_kernel", "pip install liger-kernel")
FLASH_ATTN = Peer("flash-attn", "flash_attn", "pip install flash-attn --no-build-isolation")
XFORMERS = Peer("xformers", "xformers", "pip install xformers")
FLASHRNN = Peer("flashrnn", "flashrnn", "pip install flashrnn")
QUACK = Peer("quack", "quack", "pip install quack-kernels")
TRANSFORMERS = Peer("transformers", "transformers", "pip install transformers", cuda_only=False)
REFORMER_PYTORCH = Peer("reformer-pytorch", "reformer_pytorch", "pip install reformer-pytorch", cuda_only=False)
