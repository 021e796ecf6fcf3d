"""Thin modules: the constructor, ``state_dict`` and forward of torch.nn's class of the same name, plus keywords."""

from fusewright.nn.attention import MultiheadAttention
from fusewright.nn.kv_cache import KeyValueCache
from fusewright.nn.normalization import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from fusewright.nn.positional import RotaryEmbedding
from fusewright.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU", "LSTM", "RNN", "AddLayerNorm", "AddRMSNorm", "GRUCell", "KeyValueCache", "LSTMCell", "LayerNorm",
    "MultiheadAttention", "RMSNorm", "RNNCell", "RotaryEmbedding",
]  # fmt: skip
