"""One documented function per op.

Tensors may have any strides; nothing is copied to make it contiguous. Every function takes ``backend``: ``"cpu"``,
``"triton"``, ``"cuda"`` or ``"reference"`` forces one and raises if it cannot serve the call; None picks the best.
Arguments that cannot be served raise ``ValueError`` or ``TypeError``, both also ``RuntimeError``, before any kernel
runs.
"""

from fusewright.functional.activation import bias_gelu as bias_gelu
from fusewright.functional.activation import swiglu as swiglu
from fusewright.functional.attention import additive_attention as additive_attention
from fusewright.functional.attention import decode_attention as decode_attention
from fusewright.functional.attention import scaled_dot_product_attention as scaled_dot_product_attention
from fusewright.functional.attention import varlen_attention as varlen_attention
from fusewright.functional.cross_entropy import cross_entropy as cross_entropy
from fusewright.functional.cross_entropy import linear_cross_entropy as linear_cross_entropy
from fusewright.functional.dropout_add import dropout_add as dropout_add
from fusewright.functional.embedding import embedding as embedding
from fusewright.functional.linear import linear as linear
from fusewright.functional.linear_attention import linear_attention as linear_attention
from fusewright.functional.lsh_attention import lsh_attention as lsh_attention
from fusewright.functional.lsh_attention import lsh_decode_attention as lsh_decode_attention
from fusewright.functional.lsh_attention import lsh_hash as lsh_hash
from fusewright.functional.normalization import add_layer_norm as add_layer_norm
from fusewright.functional.normalization import add_rms_norm as add_rms_norm
from fusewright.functional.normalization import layer_norm as layer_norm
from fusewright.functional.normalization import rms_norm as rms_norm
from fusewright.functional.recurrent import gru as gru
from fusewright.functional.recurrent import gru_cell as gru_cell
from fusewright.functional.recurrent import lstm as lstm
from fusewright.functional.recurrent import lstm_cell as lstm_cell
from fusewright.functional.recurrent import rnn_relu as rnn_relu
from fusewright.functional.recurrent import rnn_relu_cell as rnn_relu_cell
from fusewright.functional.recurrent import rnn_tanh as rnn_tanh
from fusewright.functional.recurrent import rnn_tanh_cell as rnn_tanh_cell
from fusewright.functional.rotary import rotary_embedding as rotary_embedding
from fusewright.functional.softmax import softmax as softmax
