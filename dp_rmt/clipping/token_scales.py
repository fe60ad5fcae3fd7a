"""Powers of two that move the size of a layer's input into its output gradient, for each token.

The gradient of a matrix is the sum over tokens t of ``x_t g_t``. Where ``x`` is 1e18 and ``g`` is 1e-19 these products
are of ordinary size, but the products ``g . g`` of the norm are not. In float32 they are zero, and an example whose
norm is zero passes unclipped. With s_t the power of two above the largest entry of ``x_t``,

    x_t g_t = (x_t / s_t) (s_t g_t)

holds to the last bit. The entries of ``x_t / s_t`` are below one, so ``s_t g_t`` is as large as the gradient. Where its
square vanishes, the gradient is below 1e-19 and does not matter. Where its square overflows, so does the gradient's
norm.

Axes are named by letters as in `dp_rmt.clipping.leaf_rules`. ``kept`` are the axes that tell tokens apart: those of the
batch, of shared indices, and of tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dp_rmt.random_matrix.units import unit_of

LARGEST_ORDINARY_NORM = 2.0**14
"""Tokens up to this norm need no scaling. Activations of transformers have norms of some thousands at most, and 1e-19
times this number does not matter beside any clip norm."""


def token_scales(axes: str, kept: str, x: jax.Array) -> jax.Array:
    """Returns the power of two s with ``s / 2 <= max |x_t| < s``; 1 for a token of zeros, NaN for one not finite.

    Near the ends of the range of ``x``, s is held back (to 2^125 in float32), so that ``1 / s`` is a normal number,
    too.

    >>> token_scales("bti", "bt", jnp.array([[[3.0, -5.0], [0.0, 0.25]]])).tolist()
    [[8.0, 0.5]]
    """
    largest = jnp.max(jnp.abs(x), axis=[i for i, a in enumerate(axes) if a not in kept], initial=0)
    largest = jnp.einsum(f"{''.join(a for a in axes if a in kept)}->{kept}", largest)
    largest = largest.astype(jnp.promote_types(x.dtype, jnp.float32))
    scales = jnp.where(largest == 0, 1.0, 2 * unit_of(largest))
    return jnp.where(jnp.isfinite(largest), scales, jnp.nan)


def are_ordinary(*token_norms: jax.Array) -> jax.Array:
    """Tells whether all these norms are finite, and small enough that nothing has to be scaled.

    Each norm is compared, not only the largest: the maximum over a mesh's devices leaves NaN out (jaxlib 0.10.2, CPU).
    """
    return functools.reduce(jnp.logical_and, (jnp.all(norms <= LARGEST_ORDINARY_NORM) for norms in token_norms))


def times(axes: str, a: jax.Array, kept: str, factors: jax.Array) -> jax.Array:
    """Multiplies an array by one factor for each token, in float32 or wider."""
    factors = jnp.einsum(f"{kept}->{''.join(letter for letter in axes if letter in kept)}", factors)
    factors = jnp.expand_dims(factors, [i for i, letter in enumerate(axes) if letter not in kept])
    return a.astype(jnp.promote_types(a.dtype, factors.dtype)) * factors
