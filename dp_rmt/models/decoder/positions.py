"""Where tokens stand: positions from the mask, rotary embeddings, and the keys that a query may see."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dp_rmt.models.decoder.rope_scaling import RopeScaling


def position_ids(attention_mask_BxL: jax.Array) -> jax.Array:
    """Counts tokens from 0 wherever they start; padding has the position of the token before it, or 0.

    >>> position_ids(jnp.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])).tolist()
    [[0, 0, 0, 1, 2], [0, 1, 1, 1, 1]]
    """
    is_token = (attention_mask_BxL != 0).astype(jnp.int32)
    return jnp.maximum(jnp.cumsum(is_token, axis=-1) - 1, 0)


def rotary_embedding(
    positions_BxL: jax.Array, *, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes cosine and sine of the angles p theta^(-2 k / head_dim), k < head_dim / 2 (Su et al. 2021).

    Args:
        positions_BxL: position p of each token.
        head_dim: width of a head, or of that part of it that is turned.
        theta: base of the wavelengths.
        scaling: how the wavelengths are stretched.

    Returns:
        Two float32 arrays (B, L, 1, head_dim / 2); the axis of length 1 is that of the heads. yarn and longrope have
        them times a constant.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: np.ndarray | jax.Array = 1 / np.float32(theta) ** exponents
    if scaling is not None:
        short, long = scaling.frequencies(np.asarray(frequencies), theta)
        # By the row's own length, as if it were alone: transformers goes by the longest row of a batch, so that one
        # example would change the gradient of another.
        is_long_Bx1 = jnp.max(positions_BxL, axis=1, keepdims=True) >= scaling.original_max_position_embeddings
        frequencies = short if short is long else jnp.where(is_long_Bx1[..., None, None], long, short)
    angles = positions_BxL[..., None, None].astype(jnp.float32) * frequencies
    if scaling is None or scaling.attention_factor == 1:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * scaling.attention_factor, jnp.sin(angles) * scaling.attention_factor


def rotate(x_BxLxNxH: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns pairs (x_k, x_{k + R/2}) of each head's first R entries, in float32, in the layout of transformers.

    R is twice the number of angles. The entries behind the first R stay as they are.
    """
    cos, sin = rotary
    half = cos.shape[-1]
    first, second, rest = jnp.split(x_BxLxNxH, (half, 2 * half), axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned.astype(x_BxLxNxH.dtype)


def visible_keys(
    mask_BxS: jax.Array, first_query: jax.Array | int, num_queries: int, *, window: int | None = None
) -> jax.Array:
    """Makes the mask (B, 1, T, S) of the keys that each of T queries may see: tokens up to it, and itself.

    If a query could not see itself, padding before the first token would have no key, and the softmax would spread its
    weights over all keys, including later ones.

    Args:
        mask_BxS: 1 where a key is a token.
        first_query: the number of the key that is the first query's own, of the S keys.
        num_queries: T.
        window: how many of the last tokens are seen, itself included; padding between them does not count.
    """
    query_Tx1 = first_query + jnp.arange(num_queries)[:, None]
    key_1xS = jnp.arange(mask_BxS.shape[-1])[None]
    visible_BxTxS = (mask_BxS != 0)[:, None, :] & (key_1xS <= query_Tx1)
    if window is not None:
        positions_BxS = position_ids(mask_BxS)
        queries_BxT = jax.lax.dynamic_slice_in_dim(positions_BxS, first_query, num_queries, axis=1)
        visible_BxTxS &= queries_BxT[:, :, None] - positions_BxS[:, None, :] < window
    return (visible_BxTxS | (key_1xS == query_Tx1))[:, None]
