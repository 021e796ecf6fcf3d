"""Thin modules: the constructor, ``state_dict`` and forward of torch.nn's class of the same name, plus keywords."""

from fusewright.nn.additive_attention import AdditiveAttention
from fusewright.nn.attention import MultiheadAttention
from fusewright.nn.kv_cache import KeyValueCache
from fusewright.nn.linear import Linear
from fusewright.nn.loss import CrossEntropyLoss
from fusewright.nn.lsh_attention import LSHSelfAttention
from fusewright.nn.lsh_cache import LSHCache
from fusewright.nn.normalization import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from fusewright.nn.paged_kv_cache import PagedKeyValueCache
from fusewright.nn.positional import (
    AxialPositionalEmbedding,
    LearnedPositionalEmbedding,
    SinusoidalPositionalEncoding,
)
from fusewright.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fusewright.nn.reformer import ChunkedFeedForward, ReformerLayer
from fusewright.nn.relative_position import RelativePositionBias
from fusewright.nn.reversible import ReversibleBlock, ReversibleSequence
from fusewright.nn.rolling_kv_cache import RollingKeyValueCache
from fusewright.nn.rotary import RotaryEmbedding
from fusewright.nn.routing_attention import RoutingSelfAttention
from fusewright.nn.sinkhorn_attention import SinkhornSelfAttention
from fusewright.nn.sparse_attention import SparseSelfAttention
from fusewright.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder
from fusewright.nn.transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AddLayerNorm",
    "AddRMSNorm",
    "AdditiveAttention",
    "AxialPositionalEmbedding",
    "ChunkedFeedForward",
    "CrossEntropyLoss",
    "GRUCell",
    "KeyValueCache",
    "LSHCache",
    "LSHSelfAttention",
    "LSTMCell",
    "LayerNorm",
    "LearnedPositionalEmbedding",
    "Linear",
    "MultiheadAttention",
    "PagedKeyValueCache",
    "RMSNorm",
    "RNNCell",
    "ReformerLayer",
    "RelativePositionBias",
    "ReversibleBlock",
    "ReversibleSequence",
    "RollingKeyValueCache",
    "RotaryEmbedding",
    "RoutingSelfAttention",
    "SinkhornSelfAttention",
    "SinusoidalPositionalEncoding",
    "SparseSelfAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]  # fmt: skip
