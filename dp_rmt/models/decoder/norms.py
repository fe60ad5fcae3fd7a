"""Normalisation in decoders, with float32 inside and the compute dtype outside."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dp_rmt.clipping.layer_rules import LAYER_RULES, LayerRule
from dp_rmt.clipping.leaf_rules import Scale
from dp_rmt.models.decoder.config import DecoderConfig


class RMSNormAroundOne(nn.Module):
    """Gemma's normalisation x / sqrt(mean(x^2) + eps) * (1 + scale); its files hold what is added to one.

    Attributes:
        epsilon: eps.
        dtype: dtype of the result.
    """

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return (self.normalise(x) * (1 + scale)).astype(self.dtype)

    def normalise(self, x: jax.Array) -> jax.Array:
        """Normalises without the scale, in float32 or wider."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)


LAYER_RULES[RMSNormAroundOne, "__call__"] = LayerRule(
    lambda module, x: {"scale": Scale()}, rule_input=lambda module, x, y: module.normalise(x)
)


def normalisation(config: DecoderConfig, *, name: str) -> nn.RMSNorm | RMSNormAroundOne | nn.LayerNorm:
    """Makes the family's kind of normalisation of the last axis, see `DecoderConfig.norm`."""
    if config.norm == "rms_norm_around_one":
        return RMSNormAroundOne(config.rms_norm_eps, config.dtype, name=name)
    if config.norm == "layer_norm":
        return nn.LayerNorm(
            config.rms_norm_eps, dtype=config.dtype, param_dtype=jnp.float32, use_fast_variance=False, name=name
        )
    return nn.RMSNorm(config.rms_norm_eps, dtype=config.dtype, param_dtype=jnp.float32, name=name)
