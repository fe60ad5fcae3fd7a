"""Layers of a decoder: causal attention and the feed-forward part, with the features of every family.

Nothing here mixes examples, and no token's output depends on a later token.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dp_rmt.models.activations import divided_by_example
from dp_rmt.models.decoder.cache import append_layer
from dp_rmt.models.decoder.config import DecoderConfig
from dp_rmt.models.decoder.norms import normalisation
from dp_rmt.models.decoder.positions import rotate
from dp_rmt.models.layers import ACTIVATIONS, dense


class View(NamedTuple):
    """What a query sees, and from where: `visible_keys`, and `rotary_embedding` or None for learned positions."""

    mask_Bx1xTxS: jax.Array
    rotary: tuple[jax.Array, jax.Array] | None


class Shared(NamedTuple):
    """What all layers get: the view of most layers; the view of the sliding layers, if only some slide; and how many
    slots of the cache are filled (0 without a cache)."""

    view: View
    sliding_view: View | None
    length: jax.Array | int


class PerLayer(NamedTuple):
    """What differs between layers: arrays with one entry for each layer, which are scanned with the layers."""

    number: jax.Array
    is_sliding: jax.Array


Slots = tuple[jax.Array, jax.Array] | None
"""Keys and values of all layers, (layers, B, kv_heads, max_length, head_dim) each; None without a cache."""


def attend(
    query_BxTxNxH: jax.Array,
    key_BxSxKxH: jax.Array,
    value_BxSxKxH: jax.Array,
    mask_Bx1xTxS: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    flash: bool = False,
) -> jax.Array:
    """Computes softmax(scale Q K^T) V over the keys that the mask shows; K heads of keys serve G = N / K queries each.

    With a soft cap c, scores s become c tanh(s / c). Scores and softmax are float32 inside, or wider.

    The heads come before the tokens in all products, so that none of the large arrays, (B, K, G, T, S), is ever
    transposed. `jax.nn.dot_product_attention`, which has G last, takes 1.6 times as long on a CPU.

    With `flash`, cuDNN does all of it in one kernel, without these arrays (Dao et al. 2022) and without a soft cap.

    Returns:
        (B, T, N, H) in the dtype of the values.

    Raises:
        ValueError: `flash` is set and there is no GPU.
    """
    if flash:
        if jax.default_backend() != "gpu":
            raise ValueError(
                f"flash_attention is cuDNN's, for NVIDIA GPUs, but JAX computes on {jax.default_backend()!r}; "
                "switch it off"
            )
        return jax.nn.dot_product_attention(
            query_BxTxNxH, key_BxSxKxH, value_BxSxKxH, mask=mask_Bx1xTxS, scale=scale, implementation="cudnn"
        )
    batch, tokens, heads, width = query_BxTxNxH.shape
    groups = heads // key_BxSxKxH.shape[2]
    query_BxKxGxTxH = query_BxTxNxH.reshape(batch, tokens, -1, groups, width).transpose(0, 2, 3, 1, 4)
    key_BxKxSxH, value_BxKxSxH = (x.transpose(0, 2, 1, 3) for x in (key_BxSxKxH, value_BxSxKxH))
    # Otherwise the backward pass of bfloat16 would multiply in float32.
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if query_BxTxNxH.dtype == jnp.bfloat16 else None
    wide = jnp.promote_types(query_BxTxNxH.dtype, jnp.float32)
    scores = scale * jnp.einsum(
        "bkgth,bksh->bkgts", query_BxKxGxTxH, key_BxKxSxH, precision=precision, preferred_element_type=wide
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    hidden_Bx1x1xTxS = jnp.where(mask_Bx1xTxS, 0, jnp.finfo(wide).min)[:, None].astype(wide)
    weights = jax.nn.softmax(scores + hidden_Bx1x1xTxS).astype(value_BxSxKxH.dtype)
    mixed_BxKxGxTxH = jnp.einsum("bkgts,bksh->bkgth", weights, value_BxKxSxH)
    return mixed_BxKxGxTxH.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, width)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention softmax(Q K^T / sqrt(H) + causal mask) V W_o (Ainslie et al. 2023).

    The projections are plain matrices, so that each is one matrix to clip and to denoise.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, hidden_BxTxD: jax.Array, slots: Slots, layer: PerLayer, shared: Shared
    ) -> tuple[jax.Array, Slots]:
        """Maps hidden states (B, T, D) to (B, T, D), and writes this layer's keys and values into the slots."""
        config, view = self.config, shared.view
        if shared.sliding_view is not None:
            view = jax.tree.map(partial(jnp.where, layer.is_sliding), shared.sliding_view, view)
        project = partial(dense, dtype=config.dtype, lora=config.lora)

        def heads(count: int, name: str) -> jax.Array:
            projected = project(count * config.head_dim, use_bias=config.attention_bias, name=name)(hidden_BxTxD)
            return projected.reshape(*hidden_BxTxD.shape[:2], count, config.head_dim)

        def placed(x_BxTxNxH: jax.Array, name: str) -> jax.Array:
            if config.qk_norm:
                x_BxTxNxH = normalisation(config, name=f"{name}_norm")(x_BxTxNxH)
            return x_BxTxNxH if view.rotary is None else rotate(x_BxTxNxH, view.rotary)

        query = placed(heads(config.num_heads, "query"), "query")
        key = placed(heads(config.num_kv_heads, "key"), "key")
        value = heads(config.num_kv_heads, "value")
        if slots is not None:
            keys, key = append_layer(slots[0], key, layer.number, shared.length)
            values, value = append_layer(slots[1], value, layer.number, shared.length)
            slots = keys, values
        scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        mixed = attend(
            query,
            key,
            value,
            view.mask_Bx1xTxS,
            scale=scale,
            softcap=config.attention_softcap,
            flash=config.flash_attention and slots is None,  # one query at a time is nothing to fuse
        )
        output = project(config.hidden_size, use_bias=config.output_bias, name="output")
        return output(mixed.reshape(*hidden_BxTxD.shape[:2], -1)), slots


class DecoderLayer(nn.Module):
    """A pre-norm layer: x += attention(norm(x)), then x += W_down(act(W_gate n) * W_up n) with n = norm(x).

    `DecoderConfig` describes the variants. The layer returns `((hidden, slots), None)`, the form of a scan body.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Slots], layer: PerLayer, shared: Shared
    ) -> tuple[tuple[jax.Array, Slots], None]:
        """Maps hidden states (B, T, D) to hidden states (B, T, D)."""
        config, (hidden_BxTxD, slots) = self.config, carry
        hidden_BxTxD = divided_by_example(hidden_BxTxD)
        norm = partial(normalisation, config)
        attention = CausalSelfAttention(config, name="attention")
        attended, slots = attention(norm(name="attention_norm")(hidden_BxTxD), slots, layer, shared)
        if config.sandwich_norms:
            attended = norm(name="attention_output_norm")(attended)
        summed = hidden_BxTxD + attended
        fed = self._feed_forward(norm(name="mlp_norm")(hidden_BxTxD if config.parallel_residual else summed))
        if config.sandwich_norms:
            fed = norm(name="mlp_output_norm")(fed)
        return (summed + fed, slots), None

    def _feed_forward(self, normalised_BxTxD: jax.Array) -> jax.Array:
        config, act = self.config, ACTIVATIONS[self.config.hidden_act]
        project = partial(dense, dtype=config.dtype, use_bias=config.mlp_bias, lora=config.lora)
        up = project(config.intermediate_size, name="up")
        if config.gated:
            inner = act(project(config.intermediate_size, name="gate")(normalised_BxTxD)) * up(normalised_BxTxD)
        else:
            inner = act(up(normalised_BxTxD))
        return project(config.hidden_size, name="down")(inner)
