"""Thin modules: the constructor, ``state_dict`` and forward of torch.nn's class of the same name, plus keywords."""

from fusewright.nn.normalization import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

__all__ = ["AddLayerNorm", "AddRMSNorm", "LayerNorm", "RMSNorm"]
