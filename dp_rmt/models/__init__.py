"""Encoders and decoders in flax.linen, which load from and save to Hugging Face folders."""

from dp_rmt.models.decoder.cache import DecoderCache, init_cache
from dp_rmt.models.decoder.config import DecoderConfig
from dp_rmt.models.decoder.model import CausalLanguageModel
from dp_rmt.models.dropout import PerExampleDropout, example_keys
from dp_rmt.models.encoder import EncoderConfig
from dp_rmt.models.heads import MaskedLanguageModel, SequenceClassifier, init_params
from dp_rmt.models.huggingface.folder import load_tokenizer
from dp_rmt.models.huggingface.loading import load_pretrained
from dp_rmt.models.huggingface.saving import save_pretrained
from dp_rmt.models.lora import LoRAConfig, LoRADense, merge_lora
from dp_rmt.models.peft.adapter import load_adapter, save_adapter
from dp_rmt.models.tuning import trainable_pattern, with_leaves, with_lora, without_lora

__all__ = [
    "CausalLanguageModel",
    "DecoderCache",
    "DecoderConfig",
    "EncoderConfig",
    "LoRAConfig",
    "LoRADense",
    "MaskedLanguageModel",
    "PerExampleDropout",
    "SequenceClassifier",
    "example_keys",
    "init_cache",
    "init_params",
    "load_adapter",
    "load_pretrained",
    "load_tokenizer",
    "merge_lora",
    "save_adapter",
    "save_pretrained",
    "trainable_pattern",
    "with_leaves",
    "with_lora",
    "without_lora",
]
