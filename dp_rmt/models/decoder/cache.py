"""The keys and values of the tokens that a decoder has read. They are an argument and a result, never hidden state."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dp_rmt.models.decoder.config import DecoderConfig


class DecoderCache(NamedTuple):
    """What decoding needs of the tokens so far, in arrays of fixed shapes. Axis 1 of the first two is the batch.

    Attributes:
        keys: (layers, B, kv_heads, max_length, head_dim) in the compute dtype, rotated already. The slots come after
            the heads, so that a product over one head's slots reads memory in order, which is three times as fast on a
            CPU.
        values: as the keys.
        mask_BxS: (B, max_length) int32, 1 for a token and 0 for padding and for free slots.
        length: () int32, how many slots are filled, padding included. It is the same for all rows.
    """

    keys: jax.Array
    values: jax.Array
    mask_BxS: jax.Array
    length: jax.Array


def init_cache(config: DecoderConfig, batch_size: int, max_length: int) -> DecoderCache:
    """Makes an empty cache.

    Args:
        config: the decoder's configuration.
        batch_size: the number of rows.
        max_length: the number of slots, which padding takes too. Nothing checks at run time that what is appended fits,
            so the caller must give as many slots as it appends tokens.

    Returns:
        The cache.

    Raises:
        ValueError: the cache would hold more tokens than the model has positions, or than longrope's short factors are
            for: those of all tokens change with the first token beyond.
    """
    limit = config.max_position_embeddings
    if max_length > limit:
        raise ValueError(
            f"a cache of {max_length} tokens, but this model has positions for {limit}; "
            f"shorten the prompt, or generate fewer tokens"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "longrope" and max_length > scaling.original_max_position_embeddings:
        raise ValueError(
            f"a cache of {max_length} tokens, but with longrope what was read up to "
            f"{scaling.original_max_position_embeddings} tokens has to be read again beyond them; shorten the prompt, "
            "or generate fewer tokens"
        )
    shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
    return DecoderCache(
        jnp.zeros(shape, config.dtype),
        jnp.zeros(shape, config.dtype),
        jnp.zeros((batch_size, max_length), jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def append_mask(cache: DecoderCache, mask_BxT: jax.Array) -> jax.Array:
    """The mask of the cache, (B, max_length), with that of T new tokens behind the filled slots."""
    is_token = (mask_BxT != 0).astype(jnp.int32)
    return jax.lax.dynamic_update_slice(cache.mask_BxS, is_token, (0, cache.length))


def append_layer(
    slots: jax.Array, new_BxTxKxH: jax.Array, layer: jax.Array, length: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """Writes one layer's new keys, or values, behind the filled slots.

    Args:
        slots: (layers, B, kv_heads, max_length, head_dim).
        new_BxTxKxH: the keys, or values, of T new tokens.
        layer: () int32, which layer.
        length: () int32, how many slots are filled.

    Returns:
        The slots of all layers, and those of this layer, (B, max_length, kv_heads, head_dim).
    """
    new_1xBxKxTxH = jnp.swapaxes(new_BxTxKxH, 1, 2)[None].astype(slots.dtype)
    slots = jax.lax.dynamic_update_slice(slots, new_1xBxKxTxH, (layer, 0, 0, length, 0))
    return slots, jnp.swapaxes(jax.lax.dynamic_index_in_dim(slots, layer, keepdims=False), 1, 2)
