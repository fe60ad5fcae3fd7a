"""Llama-type decoders: from token ids to hidden states, and to the logits of each next token."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dp_rmt.models.decoder_config import DecoderConfig
from dp_rmt.models.decoder_layers import DecoderLayer, rms_norm, rotary_embedding, visible_keys
from dp_rmt.models.layers import dense, embedding, stacked


class Decoder(nn.Module):
    """Token ids to normalised hidden states; the layers are one scanned stack whose leaves are (layers, ...)."""

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        self.word_embeddings = embedding(
            config.vocab_size, config.hidden_size, dtype=config.dtype, name="word_embeddings"
        )
        stack = stacked(DecoderLayer, length=config.num_layers, remat=config.remat)
        self.layers = stack(config)
        self.final_norm = rms_norm(config, name="final_norm")

    def __call__(self, input_ids_BxL: jax.Array, attention_mask_BxL: jax.Array) -> jax.Array:
        """Reads each sequence on its own, from its first token on.

        Args:
            input_ids_BxL: token ids.
            attention_mask_BxL: 1 for a token, 0 for padding, on either side.

        Returns:
            (B, L, D) hidden states in the compute dtype; those at padding mean nothing.

        Raises:
            ValueError: if the sequences are longer than the model's positions.
        """
        config = self.config
        length, limit = input_ids_BxL.shape[-1], config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"sequences of {length} tokens, but this model has positions for {limit}; "
                f"tokenise with a maximum length of {limit} or less"
            )
        rotary = rotary_embedding(position_ids(attention_mask_BxL), head_dim=config.head_dim, theta=config.rope_theta)
        hidden_BxLxD = self.word_embeddings(input_ids_BxL)
        hidden_BxLxD, _ = self.layers(hidden_BxLxD, visible_keys(attention_mask_BxL), rotary)
        return self.final_norm(hidden_BxLxD)

    def word_logits(self, hidden: jax.Array) -> jax.Array:
        """Scores of every word, h E^T with the word embedding E: (..., D) to (..., vocab)."""
        return self.word_embeddings.attend(hidden)


class CausalLanguageModel(nn.Module):
    """Logits over the vocabulary for the token after each token, W^T h; W is the word embedding if tied.

    There is no dropout: the loss of an example is a function.

    Attributes:
        config: the decoder's configuration.
    """

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        self.decoder = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = dense(config.vocab_size, dtype=config.dtype, use_bias=False, name="lm_head")

    def __call__(self, input_ids_BxL: jax.Array, attention_mask_BxL: jax.Array) -> jax.Array:
        """Predicts, at each token, the next one.

        Args:
            input_ids_BxL: token ids.
            attention_mask_BxL: 1 for a token, 0 for padding, on either side.

        Returns:
            (B, L, vocab) float32 logits. Each is a product in the compute dtype, summed in float32 and rounded
            once to the compute dtype, as in transformers.
        """
        hidden_BxLxD = self.decoder(input_ids_BxL, attention_mask_BxL)
        head = self.decoder.word_logits if self.config.tie_word_embeddings else self.lm_head
        return head(hidden_BxLxD).astype(jnp.float32)


def position_ids(attention_mask_BxL: jax.Array) -> jax.Array:
    """Tokens count from 0 wherever they start; padding has the position of the token before it, or 0.

    >>> position_ids(jnp.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])).tolist()
    [[0, 0, 0, 1, 2], [0, 1, 1, 1, 1]]
    """
    is_token = (attention_mask_BxL != 0).astype(jnp.int32)
    return jnp.maximum(jnp.cumsum(is_token, axis=-1) - 1, 0)
