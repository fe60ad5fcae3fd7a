"""Encoders in flax.linen that load from and save to Hugging Face folders."""

from dp_rmt.models.encoder import EncoderConfig
from dp_rmt.models.heads import MaskedLanguageModel, SequenceClassifier, init_params
from dp_rmt.models.hf_folder import load_tokenizer
from dp_rmt.models.hf_loading import load_pretrained
from dp_rmt.models.hf_saving import save_pretrained

__all__ = [
    "EncoderConfig",
    "MaskedLanguageModel",
    "SequenceClassifier",
    "init_params",
    "load_pretrained",
    "load_tokenizer",
    "save_pretrained",
]
