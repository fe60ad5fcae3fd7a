"""BERT-type encoders: the configuration, and the stack that maps token ids to hidden states."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dp_rmt.models import encoder_families
from dp_rmt.models.encoder_families import ENCODER_FAMILIES, EncoderFamily
from dp_rmt.models.layers import ACTIVATIONS, EncoderLayer, embedding, layer_norm, stacked
from dp_rmt.models.lora import LoRAConfig

ENCODER_PROJECTIONS = ("query", "key", "value", "output", "intermediate")
"""The dense layers of an encoder layer. LoRA can target all; "output" names that of attention and of the other part."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder and how it computes.

    Attributes:
        architecture: the kind of encoder by the `model_type` of its Hugging Face files, one of
            `dp_rmt.models.encoder_families.ENCODER_FAMILIES`. They differ in position ids and heads.
        vocab_size: rows of the word embedding.
        hidden_size: width of the hidden states.
        num_layers: transformer layers, scanned and stacked.
        num_heads: attention heads; the number divides `hidden_size`.
        intermediate_size: width inside the feed-forward part.
        max_position_embeddings: rows of the position embedding (RoBERTa loses `pad_token_id + 1` of them).
        type_vocab_size: rows of the token type embedding; 0 if there is none.
        layer_norm_eps: added to the variance in layer normalisation.
        pad_token_id: id of the padding token.
        hidden_act: Hugging Face name of the activation, e.g. "gelu" (exact erf).
        tie_word_embeddings: the word embedding is also the matrix of a masked language model's word scores.
        lora: low-rank updates of some of `ENCODER_PROJECTIONS`; None for none.
        dtype: compute dtype; parameters and logits are float32 whatever it is.
        remat: recompute each layer in the backward pass instead of keeping its activations.

    Raises:
        ValueError: an architecture, activation or LoRA target is unknown, or the heads do not divide the width.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    pad_token_id: int
    hidden_act: str = "gelu"
    tie_word_embeddings: bool = True
    lora: LoRAConfig | None = None
    dtype: Any = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.architecture not in ENCODER_FAMILIES:
            raise ValueError(
                f"architecture {self.architecture!r} is not supported; choose one of {', '.join(ENCODER_FAMILIES)}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported; choose one of {', '.join(ACTIVATIONS)}")
        unknown = sorted(set(self.lora.targets) - set(ENCODER_PROJECTIONS)) if self.lora else []
        if unknown:
            raise ValueError(
                f"LoRA targets {', '.join(unknown)} are no dense layers of an encoder; "
                f"choose among {', '.join(ENCODER_PROJECTIONS)}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; "
                "heads split the hidden states into equal parts"
            )
        if self.max_sequence_length < 1:
            raise ValueError(
                f"max_position_embeddings {self.max_position_embeddings} leaves no position for a token: "
                f"RoBERTa spends pad_token_id + 1 = {self.pad_token_id + 1} of them; give more"
            )

    @property
    def max_sequence_length(self) -> int:
        """The longest sequence in tokens. RoBERTa's positions start at pad_token_id + 1."""
        offset = self.pad_token_id + 1 if self.family.positions_after_padding else 0
        return self.max_position_embeddings - offset

    @property
    def family(self) -> EncoderFamily:
        """What is particular to the kind of encoder."""
        return ENCODER_FAMILIES[self.architecture]

    @classmethod
    def from_hf_config(
        cls, hf_config: Mapping[str, Any], *, dtype: Any = jnp.float32, remat: bool = False
    ) -> EncoderConfig:
        """Reads the content of a Hugging Face `config.json`.

        Args:
            hf_config: the parsed JSON object.
            dtype: compute dtype.
            remat: recompute layers in the backward pass.

        Returns:
            The configuration.

        Raises:
            ValueError: the model type or variant is not supported, or a key is missing.
        """
        return cls(**encoder_families.fields_from_hf(hf_config), dtype=dtype, remat=remat)

    def to_hf_config(self) -> dict[str, Any]:
        """The keys of a Hugging Face `config.json` that describe the encoder."""
        return encoder_families.fields_to_hf(self)


def position_ids(config: EncoderConfig, input_ids_BxL: jax.Array) -> jax.Array:
    """Computes position ids as Hugging Face does.

    For BERT they are 0, 1, ..., L-1. For RoBERTa they are p_i = pad + m_i sum_{j <= i} m_j with m = (input_ids != pad),
    so tokens count from pad + 1 and padding stays at pad (transformers, `create_position_ids_from_input_ids`).

    Args:
        config: the encoder's configuration.
        input_ids_BxL: token ids.

    Returns:
        An int array (B, L).
    """
    if not config.family.positions_after_padding:
        return jnp.broadcast_to(jnp.arange(input_ids_BxL.shape[-1]), input_ids_BxL.shape)
    is_token = (input_ids_BxL != config.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(is_token, axis=-1) * is_token + config.pad_token_id


class Embeddings(nn.Module):
    """The embedding LayerNorm(word + position + token type)."""

    config: EncoderConfig

    def setup(self) -> None:
        config = self.config

        def table(rows: int, name: str) -> nn.Embed:
            return embedding(rows, config.hidden_size, dtype=config.dtype, name=name)

        self.word_embeddings = table(config.vocab_size, "word_embeddings")
        self.position_embeddings = table(config.max_position_embeddings, "position_embeddings")
        if config.type_vocab_size:
            self.token_type_embeddings = table(config.type_vocab_size, "token_type_embeddings")
        self.layer_norm = layer_norm(eps=config.layer_norm_eps, name="layer_norm")

    def __call__(self, input_ids_BxL: jax.Array, token_type_ids_BxL: jax.Array) -> jax.Array:
        """Embeds tokens: (B, L) ids to (B, L, D). Without a table of token types these are not read."""
        summed = self.word_embeddings(input_ids_BxL)
        if self.config.type_vocab_size:
            summed += self.token_type_embeddings(token_type_ids_BxL)
        summed += self.position_embeddings(position_ids(self.config, input_ids_BxL))
        return self.layer_norm(summed).astype(self.config.dtype)


class Encoder(nn.Module):
    """Maps token ids to hidden states. The layers are one scanned stack whose leaves are (layers, ...)."""

    config: EncoderConfig

    def setup(self) -> None:
        config = self.config
        self.embeddings = Embeddings(config)
        stack = stacked(EncoderLayer, length=config.num_layers, remat=config.remat)
        self.layers = stack(
            config.num_heads,
            config.intermediate_size,
            config.layer_norm_eps,
            config.hidden_act,
            config.dtype,
            config.lora,
        )

    def __call__(
        self, input_ids_BxL: jax.Array, attention_mask_BxL: jax.Array, token_type_ids_BxL: jax.Array
    ) -> jax.Array:
        """Encodes each sequence on its own.

        Args:
            input_ids_BxL: token ids.
            attention_mask_BxL: 1 for a token, 0 for padding.
            token_type_ids_BxL: segment ids; all 0 for RoBERTa.

        Returns:
            (B, L, D) hidden states in the compute dtype.

        Raises:
            ValueError: the sequences are longer than the model's positions.
        """
        length, limit = input_ids_BxL.shape[-1], self.config.max_sequence_length
        if length > limit:
            raise ValueError(
                f"sequences of {length} tokens, but this model has positions for {limit}; "
                f"tokenise with a maximum length of {limit} or less"
            )
        hidden_BxLxD = self.embeddings(input_ids_BxL, token_type_ids_BxL)
        hidden_BxLxD, _ = self.layers(hidden_BxLxD, attention_mask_BxL)
        return hidden_BxLxD

    def word_logits(self, hidden: jax.Array) -> jax.Array:
        """The score of every word, h E^T in the compute dtype with the word embedding E: (..., D) to (..., vocab)."""
        return self.embeddings.word_embeddings.attend(hidden)
