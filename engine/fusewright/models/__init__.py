"""Models built from :mod:`fusewright.nn`, each a short file: to use, and to read as an example."""

from fusewright.models.bert import BERT
from fusewright.models.encoder_decoder import EncoderDecoder
from fusewright.models.gpt import GPT
from fusewright.models.reformer import Reformer
from fusewright.models.rnn_encoder_decoder import RNNEncoderDecoder
from fusewright.models.siamese import SiameseLSTM, hard_negative_triplet_loss
from fusewright.models.tagger import LSTMTagger
from fusewright.models.vit import ViT

__all__ = [
    "BERT",
    "GPT",
    "EncoderDecoder",
    "LSTMTagger",
    "RNNEncoderDecoder",
    "Reformer",
    "SiameseLSTM",
    "ViT",
    "hard_negative_triplet_loss",
]
