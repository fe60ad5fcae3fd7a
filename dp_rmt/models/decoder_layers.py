"""Layers of a Llama-type decoder: rotary embedding, causal attention, gated feed-forward part.

Nothing here mixes examples, and no token's output depends on a later token.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dp_rmt.models.decoder_config import DecoderConfig
from dp_rmt.models.layers import ACTIVATIONS, dense


def rms_norm(config: DecoderConfig, *, name: str) -> nn.RMSNorm:
    """x / sqrt(mean(x^2) + eps) * scale, float32 inside and the compute dtype outside (Zhang & Sennrich 2019)."""
    return nn.RMSNorm(epsilon=config.rms_norm_eps, dtype=config.dtype, param_dtype=jnp.float32, name=name)


def rotary_embedding(positions_BxL: jax.Array, *, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles p theta^(-2 k / head_dim), k < head_dim / 2 (Su et al. 2021).

    Args:
        positions_BxL: position p of each token.
        head_dim: width of a head.
        theta: base of the wavelengths.

    Returns:
        Two float32 arrays (B, L, 1, head_dim / 2); the axis of length 1 is that of the heads.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    angles = positions_BxL[..., None, None].astype(jnp.float32) * (1 / np.float32(theta) ** exponents)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxLxNxH: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (x_k, x_{k + H/2}) of a head by its angle, in float32: the layout of transformers' Llama."""
    cos, sin = rotary
    first, second = jnp.split(x_BxLxNxH, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxLxNxH.dtype)


def visible_keys(attention_mask_BxL: jax.Array) -> jax.Array:
    """(B, 1, L, L) mask of the keys that a query may see, on top of causality: every token, and itself.

    Without itself, padding before the first token would have no key, and the softmax would spread its weights over
    all keys, later ones included.
    """
    is_token = (attention_mask_BxL != 0)[:, None, None, :]
    return is_token | jnp.eye(attention_mask_BxL.shape[-1], dtype=bool)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention softmax(Q K^T / sqrt(H) + causal mask) V W_o (Ainslie et al. 2023).

    The projections are plain matrices, so that each is one matrix to clip and to denoise.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, hidden_BxLxD: jax.Array, mask_Bx1xLxL: jax.Array, rotary: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        """Maps hidden states (B, L, D) to (B, L, D); see `visible_keys` and `rotary_embedding`."""
        config = self.config
        project = partial(dense, dtype=config.dtype, use_bias=config.attention_bias, lora=config.lora)

        def heads(count: int, name: str) -> jax.Array:
            projected = project(count * config.head_dim, name=name)(hidden_BxLxD)
            return projected.reshape(*hidden_BxLxD.shape[:2], count, config.head_dim)

        query = rotate(heads(config.num_heads, "query"), rotary)
        key = rotate(heads(config.num_kv_heads, "key"), rotary)
        value = heads(config.num_kv_heads, "value")
        # Scores and softmax are float32 inside.
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask_Bx1xLxL, is_causal=True)
        return project(config.hidden_size, name="output")(mixed.reshape(*hidden_BxLxD.shape[:2], -1))


class DecoderLayer(nn.Module):
    """One pre-norm layer: x += attention(norm(x)); x += W_down(act(W_gate n) * W_up n) with n = norm(x).

    Returns `(hidden, None)`, the form of a scan body.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, hidden_BxLxD: jax.Array, mask_Bx1xLxL: jax.Array, rotary: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        """Maps hidden states (B, L, D) to hidden states (B, L, D)."""
        config = self.config
        project = partial(dense, dtype=config.dtype, use_bias=False, lora=config.lora)
        normalised = rms_norm(config, name="attention_norm")(hidden_BxLxD)
        hidden_BxLxD += CausalSelfAttention(config, name="attention")(normalised, mask_Bx1xLxL, rotary)
        normalised = rms_norm(config, name="mlp_norm")(hidden_BxLxD)
        gate = ACTIVATIONS[config.hidden_act](project(config.intermediate_size, name="gate")(normalised))
        up = project(config.intermediate_size, name="up")(normalised)
        return hidden_BxLxD + project(config.hidden_size, name="down")(gate * up), None
