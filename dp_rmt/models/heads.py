"""Encoders with a head: sequence classification and masked language modelling."""

from __future__ import annotations

import string
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dp_rmt.clipping.layer_rules import LAYER_RULES, LayerRule
from dp_rmt.clipping.leaf_rules import LeafRule, Offset
from dp_rmt.models.decoder.model import CausalLanguageModel
from dp_rmt.models.encoder import Encoder, EncoderConfig
from dp_rmt.models.layers import ACTIVATIONS, dense, layer_norm


class SequenceClassifier(nn.Module):
    """Maps a sequence to the logits W_c tanh(W_p h_0 + b_p) + b_c of its first token's hidden state h_0.

    The parts are called `pooler` and `classifier` for all architectures. RoBERTa's checkpoints call them
    `classifier.dense` and `classifier.out_proj`. DistilBERT has relu in the place of tanh. There is no dropout, so the
    loss of an example is a function.

    Attributes:
        config: the encoder's configuration.
        num_labels: number of logits; 1 for regression.
        fresh: which of these parts were drawn at random, because the file that was loaded lacks them. They train in
            every tuning, and go along with every adapter (`dp_rmt.models.tuning.trainable_pattern`).
        label_rows: for each logit its number in the file that was loaded, if that has the labels in another order; an
            adapter, which is put on that file, has them in the file's order.
    """

    config: EncoderConfig
    num_labels: int
    fresh: tuple[str, ...] = ()
    label_rows: tuple[int, ...] = ()

    def setup(self) -> None:
        self.encoder = Encoder(self.config)
        self.pooler = dense(self.config.hidden_size, dtype=self.config.dtype, name="pooler")
        self.classifier = dense(self.num_labels, dtype=jnp.dtype(jnp.float32), name="classifier")

    def __call__(
        self, input_ids_BxL: jax.Array, attention_mask_BxL: jax.Array, token_type_ids_BxL: jax.Array
    ) -> jax.Array:
        """Classifies each sequence on its own.

        Args:
            input_ids_BxL: token ids.
            attention_mask_BxL: 1 for a token, 0 for padding.
            token_type_ids_BxL: segment ids; all 0 for RoBERTa.

        Returns:
            (B, num_labels) float32 logits.
        """
        hidden_BxLxD = self.encoder(input_ids_BxL, attention_mask_BxL, token_type_ids_BxL)
        pool = ACTIVATIONS[self.config.family.pooler_act]
        return self.classifier(pool(self.pooler(hidden_BxLxD[:, 0])))


class MaskedLanguageModelHead(nn.Module):
    """The head LayerNorm(act(W h + b)), the bias of the word scores, and their matrix if that is not the embedding."""

    config: EncoderConfig

    def setup(self) -> None:
        config = self.config
        self.dense = dense(config.hidden_size, dtype=config.dtype, name="dense")
        self.layer_norm = layer_norm(eps=config.layer_norm_eps, name="layer_norm")
        if not config.tie_word_embeddings:
            self.decoder = dense(config.vocab_size, dtype=config.dtype, use_bias=False, name="decoder")
        self.bias = self.param("bias", nn.initializers.zeros, (config.vocab_size,), jnp.float32)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Transforms hidden states (..., D) to (..., D) in the compute dtype."""
        # transformers' RoBERTa head is exact gelu, whatever hidden_act says. BERT's head follows hidden_act.
        act = self.config.family.word_act or self.config.hidden_act
        return self.layer_norm(ACTIVATIONS[act](self.dense(hidden))).astype(self.config.dtype)

    def untied_word_logits(self, transformed: jax.Array) -> jax.Array:
        """The score of every word by a matrix of its own: (..., D) to (..., vocab)."""
        return self.decoder(transformed)

    def with_bias(self, word_logits: jax.Array) -> jax.Array:
        """Adds the bias of each word's score: (..., vocab) to float32 (..., vocab)."""
        return word_logits.astype(jnp.float32) + self.bias


def _bias_rule(module: MaskedLanguageModelHead, word_logits: jax.Array) -> dict[str, LeafRule]:
    axes = string.ascii_letters[: word_logits.ndim]
    return {"bias": Offset(axes, axes[-1])}


LAYER_RULES[MaskedLanguageModelHead, "with_bias"] = LayerRule(_bias_rule)


class MaskedLanguageModel(nn.Module):
    """Maps token ids to logits over the vocabulary, E LayerNorm(act(W h + b)) + c. E is the word embedding if tied.

    Attributes:
        config: the encoder's configuration.
        fresh: ("mlm_head",) if the head was drawn at random, as in `SequenceClassifier`.
    """

    config: EncoderConfig
    fresh: tuple[str, ...] = ()

    def setup(self) -> None:
        self.encoder = Encoder(self.config)
        self.mlm_head = MaskedLanguageModelHead(self.config)

    def __call__(
        self,
        input_ids_BxL: jax.Array,
        attention_mask_BxL: jax.Array,
        token_type_ids_BxL: jax.Array,
        positions_B: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts the words of each sequence on its own.

        Args:
            input_ids_BxL: token ids.
            attention_mask_BxL: 1 for a token, 0 for padding.
            token_type_ids_BxL: segment ids; all 0 for RoBERTa.
            positions_B: the one position to predict in each sequence; all positions if None.

        Returns:
            Float32 logits, (B, vocab) with positions and (B, L, vocab) without.
        """
        hidden = self.encoder(input_ids_BxL, attention_mask_BxL, token_type_ids_BxL)
        if positions_B is not None:
            hidden = jnp.take_along_axis(hidden, positions_B[:, None, None], axis=1)[:, 0]
        word_logits = self.encoder.word_logits if self.config.tie_word_embeddings else self.mlm_head.untied_word_logits
        return self.mlm_head.with_bias(word_logits(self.mlm_head(hidden)))


def init_params(
    module: SequenceClassifier | MaskedLanguageModel | CausalLanguageModel, key: jax.Array
) -> dict[str, Any]:
    """Makes random parameters for training from scratch: matrices N(0, 0.02^2), biases 0, normalisation scales 1.

    Args:
        module: the model.
        key: PRNG key.

    Returns:
        A nested dict of float32 arrays. Leaves under `encoder/layers` or `decoder/layers` are stacked, (layers, ...).
    """
    ids_BxL = jnp.zeros((1, 1), jnp.int32)
    token_type_ids = () if isinstance(module, CausalLanguageModel) else (ids_BxL,)
    return jax.jit(module.init)(key, ids_BxL, jnp.ones_like(ids_BxL), *token_type_ids)["params"]
