"""Decoders map token ids to hidden states, and to the logits of each next token."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dp_rmt.models.decoder.cache import DecoderCache, append_mask
from dp_rmt.models.decoder.config import DecoderConfig
from dp_rmt.models.decoder.layers import DecoderLayer, PerLayer, Shared, View
from dp_rmt.models.decoder.norms import normalisation
from dp_rmt.models.decoder.positions import position_ids, rotary_embedding, visible_keys
from dp_rmt.models.layers import dense, embedding, stacked


class Decoder(nn.Module):
    """Maps token ids to normalised hidden states. The layers are one scanned stack with leaves (layers, ...)."""

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        self.word_embeddings = embedding(
            config.vocab_size, config.hidden_size, dtype=config.dtype, name="word_embeddings"
        )
        if config.learned_positions:
            self.position_embeddings = embedding(
                config.max_position_embeddings, config.hidden_size, dtype=config.dtype, name="position_embeddings"
            )
        stack = stacked(DecoderLayer, length=config.num_layers, remat=config.remat, in_axes=(0, nn.broadcast))
        self.layers = stack(config)
        self.final_norm = normalisation(config, name="final_norm")

    def __call__(
        self, input_ids_BxT: jax.Array, attention_mask_BxT: jax.Array, cache: DecoderCache | None = None
    ) -> tuple[jax.Array, DecoderCache | None]:
        """Reads each sequence on its own, from its first token on.

        Args:
            input_ids_BxT: token ids.
            attention_mask_BxT: 1 for a token, 0 for padding, on either side.
            cache: the tokens before these; None if these are the first.

        Returns:
            Hidden states (B, T, D) in the compute dtype, which mean nothing at padding; and the cache with these tokens
            appended, or None.

        Raises:
            ValueError: the sequences are longer than the model's positions, or than the cache.
        """
        config, num_tokens = self.config, input_ids_BxT.shape[-1]
        _check_length(num_tokens, config, cache)
        mask_BxS = attention_mask_BxT if cache is None else append_mask(cache, attention_mask_BxT)
        first = 0 if cache is None else cache.length
        positions_BxT = jax.lax.dynamic_slice_in_dim(position_ids(mask_BxS), first, num_tokens, axis=1)
        slots = None if cache is None else (cache.keys, cache.values)
        (hidden_BxTxD, slots), _ = self.layers(
            (self._embed(input_ids_BxT, positions_BxT), slots),
            PerLayer(jnp.arange(config.num_layers), jnp.array(config.layer_is_sliding)),
            _shared(config, mask_BxS, first, positions_BxT),
        )
        if cache is not None and slots is not None:
            cache = DecoderCache(slots[0], slots[1], mask_BxS, cache.length + num_tokens)
        return self.final_norm(hidden_BxTxD), cache

    def _embed(self, input_ids_BxT: jax.Array, positions_BxT: jax.Array) -> jax.Array:
        config = self.config
        hidden_BxTxD = self.word_embeddings(input_ids_BxT)
        if config.scale_embedding:  # by a number of the compute dtype, as in transformers
            hidden_BxTxD *= jnp.asarray(math.sqrt(config.hidden_size), config.dtype)
        if config.learned_positions:
            hidden_BxTxD += self.position_embeddings(positions_BxT)
        return hidden_BxTxD

    def word_logits(self, hidden: jax.Array) -> jax.Array:
        """The score of every word, h E^T with the word embedding E: (..., D) to (..., vocab)."""
        return self.word_embeddings.attend(hidden)


class CausalLanguageModel(nn.Module):
    """Maps token ids to the logits W^T h of the token after each; W is the word embedding if tied.

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

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array,
        cache: DecoderCache | None = None,
        *,
        last_only: bool = False,
    ) -> Any:
        """Predicts, at each token, the next one.

        Args:
            input_ids_BxT: token ids.
            attention_mask_BxT: 1 for a token, 0 for padding, on either side.
            cache: the tokens before these, from `init_cache` or an earlier call.
            last_only: predict at the last of the T tokens only, which is all that a prompt (padded on the left) needs.

        Returns:
            Float32 logits, (B, T, vocab), or (B, 1, vocab) with `last_only`. With a cache, these and the cache with the
            T tokens appended. Each logit is a product in the compute dtype, which is summed in float32 and rounded once
            to the compute dtype, as in transformers.

        Raises:
            ValueError: there are more tokens than the model has positions, or than the cache has slots.
        """
        hidden_BxTxD, new_cache = self.decoder(input_ids_BxT, attention_mask_BxT, cache)
        if last_only:
            hidden_BxTxD = hidden_BxTxD[:, -1:]
        head = self.decoder.word_logits if self.config.tie_word_embeddings else self.lm_head
        logits_BxTxV = head(hidden_BxTxD).astype(jnp.float32)
        if self.config.logits_softcap is not None:
            logits_BxTxV = self.config.logits_softcap * jnp.tanh(logits_BxTxV / self.config.logits_softcap)
        return logits_BxTxV if cache is None else (logits_BxTxV, new_cache)


def _shared(config: DecoderConfig, mask_BxS: jax.Array, first: jax.Array | int, positions_BxT: jax.Array) -> Shared:
    """Makes what all layers get; if all layers are of one kind, that is its view alone."""

    def view(is_sliding: bool) -> View:
        window = config.sliding_window if is_sliding else None
        mask_Bx1xTxS = visible_keys(mask_BxS, first, positions_BxT.shape[1], window=window)
        if config.learned_positions:
            return View(mask_Bx1xTxS, None)
        local = config.local_rope_theta if is_sliding else None
        rotary = rotary_embedding(
            positions_BxT,
            head_dim=config.rotary_dim or config.head_dim,
            theta=config.rope_theta if local is None else local,
            scaling=config.rope_scaling if local is None else None,
        )
        return View(mask_Bx1xTxS, rotary)

    kinds = sorted(set(config.layer_is_sliding))
    return Shared(view(kinds[0]), view(kinds[1]) if len(kinds) > 1 else None, first)


def _check_length(num_tokens: int, config: DecoderConfig, cache: DecoderCache | None) -> None:
    limit = config.max_position_embeddings
    if num_tokens > limit:
        raise ValueError(
            f"sequences of {num_tokens} tokens, but this model has positions for {limit}; "
            f"tokenise with a maximum length of {limit} or less"
        )
    if cache is not None and num_tokens > cache.mask_BxS.shape[-1]:
        raise ValueError(
            f"{num_tokens} tokens for a cache of {cache.mask_BxS.shape[-1]}; give init_cache a larger max_length"
        )
