"""Models by name for the step profiler: shapes of well-known models, random weights, random tokens without padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dp_rmt.models import (
    CausalLanguageModel,
    DecoderConfig,
    EncoderConfig,
    LoRAConfig,
    SequenceClassifier,
    init_params,
)
from dp_rmt.models.decoder.config import PROJECTIONS
from dp_rmt.models.decoder.rope_scaling import RopeScaling
from dp_rmt.training.losses import causal_lm_loss, classifier_logits, label_losses
from dp_rmt.trees import merge_params, split_params
from dp_rmt.types import Batch, Params

NUM_LABELS = 2

_LLAMA = DecoderConfig(32000, 1024, 8, 16, 8, head_dim=64, intermediate_size=2816, max_position_embeddings=2048)
_LLAMA3_2_1B = DecoderConfig(
    128256,
    2048,
    16,
    32,
    8,
    head_dim=64,
    intermediate_size=8192,
    max_position_embeddings=131072,
    rope_theta=5e5,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    rope_scaling=RopeScaling(32.0, "llama3"),
)
_QWEN3_4B = DecoderConfig(
    151936,
    2560,
    36,
    32,
    8,
    head_dim=128,
    intermediate_size=9728,
    max_position_embeddings=40960,
    rope_theta=1e6,
    tie_word_embeddings=True,
    qk_norm=True,
    architecture="qwen3",
)
_TINY_LLAMA = DecoderConfig(101, 16, 2, 2, 1, head_dim=8, intermediate_size=32, max_position_embeddings=64)

MODELS: dict[str, EncoderConfig | DecoderConfig] = {
    "roberta_base": EncoderConfig("roberta", 50265, 768, 12, 12, 3072, 514, 1, 1e-5, pad_token_id=1),
    "roberta_large": EncoderConfig("roberta", 50265, 1024, 24, 16, 4096, 514, 1, 1e-5, pad_token_id=1),
    "minilm": EncoderConfig("bert", 30522, 384, 6, 12, 1536, 512, 2, 1e-12, pad_token_id=0),
    "llama_1024": _LLAMA,
    "llama_1024_lora": dataclasses.replace(_LLAMA, lora=LoRAConfig(16, 32.0, PROJECTIONS)),
    "llama3_2_1b": _LLAMA3_2_1B,
    "llama3_2_1b_lora": dataclasses.replace(_LLAMA3_2_1B, lora=LoRAConfig(16, 32.0, PROJECTIONS)),
    "qwen3_4b": _QWEN3_4B,
    "qwen3_4b_lora": dataclasses.replace(_QWEN3_4B, lora=LoRAConfig(16, 32.0, PROJECTIONS)),
    # To try the profiler out:
    "tiny": EncoderConfig("roberta", 101, 16, 2, 2, 32, 66, 1, 1e-5, pad_token_id=1),
    "tiny_bert": EncoderConfig("bert", 101, 16, 2, 2, 32, 64, 2, 1e-12, pad_token_id=0),
    "tiny_llama": _TINY_LLAMA,
    "tiny_llama_lora": dataclasses.replace(_TINY_LLAMA, lora=LoRAConfig(4, 8.0, PROJECTIONS)),
}
"""All parameters are trained, those of a model with LoRA excepted: there it is the LoRA factors alone."""


class Workload(NamedTuple):
    """What every arm computes a gradient of.

    Attributes:
      config: the model's configuration.
      per_example_losses: ``(trainable, frozen, batch) -> (batch,)``.
      trainable: the parameters to differentiate by.
      frozen: the others.
      batch: every sequence at full length.
    """

    config: EncoderConfig | DecoderConfig
    per_example_losses: Callable[[Params, Params, Batch], jax.Array]
    trainable: Params
    frozen: Params
    batch: Batch

    def shapes(self) -> dict[str, Any]:
        """For the record: the configuration, and the numbers of parameters."""
        config = dataclasses.asdict(self.config) | {"dtype": jnp.dtype(self.config.dtype).name}
        return {
            "config": config,
            "trainable_parameters": sum(leaf.size for leaf in jax.tree.leaves(self.trainable)),
            "frozen_parameters": sum(leaf.size for leaf in jax.tree.leaves(self.frozen)),
        }


def make_workload(
    name: str, *, batch_size: int, sequence_length: int, dtype: str, num_layers: int | None = None, **options: Any
) -> Workload:
    """Builds a model and one batch.

    Args:
      name: a key of `MODELS`.
      batch_size: examples.
      sequence_length: tokens of each.
      dtype: compute dtype; parameters are float32.
      num_layers: instead of the model's own number.
      **options: ``remat``, and of a decoder ``flash_attention``.

    Returns:
      The workload.

    Raises:
      ValueError: the name is unknown or a size is out of range.
    """
    if name not in MODELS:
        raise ValueError(f"--model={name} is unknown; choose one of {', '.join(MODELS)}")
    for flag, value in (("batch_size", batch_size), ("sequence_length", sequence_length), ("num_layers", num_layers)):
        if value is not None and value < 1:
            raise ValueError(f"--{flag} must be at least 1, got {value}")
    config = MODELS[name]
    if options.get("flash_attention") and not isinstance(config, DecoderConfig):
        raise ValueError(f"--flash_attention is for decoders, and {name} is an encoder")
    options = {option: True for option, is_set in options.items() if is_set}
    layers = num_layers or config.num_layers
    config = dataclasses.replace(config, dtype=jnp.dtype(dtype), num_layers=layers, **options)
    rng = np.random.default_rng(0)
    ids_BxL = rng.integers(2, config.vocab_size, (batch_size, sequence_length), np.int32)  # 0 and 1 are special tokens
    batch = {"input_ids": ids_BxL, "attention_mask": np.ones_like(ids_BxL)}
    if isinstance(config, DecoderConfig):
        return _decoder(config, jax.tree.map(jnp.asarray, batch))
    batch["token_type_ids"] = np.zeros_like(ids_BxL)
    batch["label"] = rng.integers(NUM_LABELS, size=batch_size, dtype=np.int32)
    return _encoder(config, jax.tree.map(jnp.asarray, batch))


def _encoder(config: EncoderConfig, batch: Batch) -> Workload:
    """A sequence classifier."""
    module = SequenceClassifier(config, NUM_LABELS)
    logits = classifier_logits(module)

    def per_example_losses(trainable: Params, frozen: Params, batch: Batch) -> jax.Array:
        return label_losses(logits(merge_params(trainable, frozen), batch), batch["label"])

    return Workload(config, per_example_losses, init_params(module, jax.random.key(0)), {}, batch)


def _decoder(config: DecoderConfig, batch: Batch) -> Workload:
    """A language model with a loss over all tokens."""
    module = CausalLanguageModel(config)

    def per_example_losses(trainable: Params, frozen: Params, batch: Batch) -> jax.Array:
        ids_BxL, mask_BxL = batch["input_ids"], batch["attention_mask"]
        logits_BxLxV: Any = module.apply({"params": merge_params(trainable, frozen)}, ids_BxL, mask_BxL)
        return causal_lm_loss(logits_BxLxV, ids_BxL, mask_BxL)

    params = init_params(module, jax.random.key(0))
    if config.lora is None:
        return Workload(config, per_example_losses, params, {}, batch)
    trainable, frozen = split_params(params, "lora_")
    return Workload(config, per_example_losses, jax.tree.map(_not_zero, trainable), frozen, batch)


def _not_zero(leaf: jax.Array) -> jax.Array:
    """LoRA's B starts at zero, which makes the gradient of A zero, and a check of it empty."""
    return leaf + 0.02 * jax.random.normal(jax.random.key(1), leaf.shape, leaf.dtype)
