"""Layers of a Llama-type decoder: rotary embedding, causal attention, gated feed-forward part.

Nothing here mixes examples, and no token's output depends on a later token.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dp_rmt.models.decoder_cache import append_layer
from dp_rmt.models.decoder_config import DecoderConfig
from dp_rmt.models.decoder_positions import rotate
from dp_rmt.models.layers import ACTIVATIONS, dense


def rms_norm(config: DecoderConfig, *, name: str) -> nn.RMSNorm:
    """x / sqrt(mean(x^2) + eps) * scale, float32 inside and the compute dtype outside (Zhang & Sennrich 2019)."""
    return nn.RMSNorm(epsilon=config.rms_norm_eps, dtype=config.dtype, param_dtype=jnp.float32, name=name)


class Shared(NamedTuple):
    """What all layers get: `visible_keys`, `rotary_embedding`, and how many slots of the cache are filled."""

    mask_Bx1xTxS: jax.Array
    rotary: tuple[jax.Array, jax.Array]
    length: jax.Array | None


Slots = tuple[jax.Array, jax.Array] | None
"""Keys and values of all layers, (layers, B, max_length, kv_heads, head_dim) each; None without a cache."""


class CausalSelfAttention(nn.Module):
    """Grouped-query attention softmax(Q K^T / sqrt(H) + causal mask) V W_o (Ainslie et al. 2023).

    The projections are plain matrices, so that each is one matrix to clip and to denoise.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, hidden_BxLxD: jax.Array, slots: Slots, layer: jax.Array, shared: Shared
    ) -> tuple[jax.Array, Slots]:
        """Maps hidden states (B, L, D) to (B, L, D), and writes this layer's keys and values into the slots."""
        config = self.config
        project = partial(dense, dtype=config.dtype, use_bias=config.attention_bias, lora=config.lora)

        def heads(count: int, name: str) -> jax.Array:
            projected = project(count * config.head_dim, name=name)(hidden_BxLxD)
            return projected.reshape(*hidden_BxLxD.shape[:2], count, config.head_dim)

        query = rotate(heads(config.num_heads, "query"), shared.rotary)
        key = rotate(heads(config.num_kv_heads, "key"), shared.rotary)
        value = heads(config.num_kv_heads, "value")
        if slots is not None:
            keys, key = append_layer(slots[0], key, layer, shared.length)
            values, value = append_layer(slots[1], value, layer, shared.length)
            slots = keys, values
        # Scores and softmax are float32 inside.
        mixed = jax.nn.dot_product_attention(query, key, value, mask=shared.mask_Bx1xTxS)
        return project(config.hidden_size, name="output")(mixed.reshape(*hidden_BxLxD.shape[:2], -1)), slots


class DecoderLayer(nn.Module):
    """One pre-norm layer: x += attention(norm(x)); x += W_down(act(W_gate n) * W_up n) with n = norm(x).

    Returns `((hidden, slots), None)`, the form of a scan body.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Slots], layer: jax.Array, shared: Shared
    ) -> tuple[tuple[jax.Array, Slots], None]:
        """Maps hidden states (B, L, D) to hidden states (B, L, D); `layer` is the layer's number."""
        hidden_BxLxD, slots = carry
        config = self.config
        project = partial(dense, dtype=config.dtype, use_bias=False, lora=config.lora)
        normalised = rms_norm(config, name="attention_norm")(hidden_BxLxD)
        attended, slots = CausalSelfAttention(config, name="attention")(normalised, slots, layer, shared)
        hidden_BxLxD += attended
        normalised = rms_norm(config, name="mlp_norm")(hidden_BxLxD)
        gate = ACTIVATIONS[config.hidden_act](project(config.intermediate_size, name="gate")(normalised))
        up = project(config.intermediate_size, name="up")(normalised)
        return (hidden_BxLxD + project(config.hidden_size, name="down")(gate * up), slots), None
