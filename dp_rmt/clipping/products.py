"""Sums and products of per-example arrays in float32 at least, and bounds of what rounding takes from them."""

from __future__ import annotations

import math
import string

import jax
import jax.numpy as jnp


def is_wide_float(dtype: jax.typing.DTypeLike) -> bool:
    """Tells whether a dtype is real floating point of 32 bits or more."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32


def with_range_of_float32(a: jax.Array) -> jax.Array:
    """Returns an array as it is, or as float32 where its dtype has a smaller range.

    In float16 a weighted ``g`` below 6e-8 vanishes or is rounded to twice its size. bfloat16 has float32's range.
    """
    return a if jnp.finfo(a.dtype).minexp <= jnp.finfo(jnp.float32).minexp else a.astype(jnp.float32)


def weighted_sum(gradients: jax.Array, weights_B: jax.Array) -> jax.Array:
    """Adds up gradients (B, ...), each times its weight. What is not finite counts as zero."""
    # A weight of zero does not remove a NaN (0 * NaN = NaN), hence the selection before the product.
    finite = jnp.where(jnp.isfinite(gradients), gradients, 0.0)
    return jnp.einsum("b,b...->...", weights_B.astype(gradients.dtype), finite, precision="highest")


# If the tokens of an example cancel, its gradient is small against the `size` of what is added up, the sum of the norms
# of its tokens' gradients. Its norm may then round to nothing, and an example of any norm would pass unclipped. With a
# bound of the rounding (Higham & Mary 2019) such an example is clipped harder. Elsewhere the bound is small.


def norm_of_sum(gradients: jax.Array, size: jax.Array, terms: int) -> jax.Array:
    """The norm of each example's gradient, which is a sum of `terms` terms, plus ``eps sqrt terms size``."""
    norm = jnp.sqrt(sum_but_first(jnp.square(gradients)))
    return norm + jnp.finfo(norm.dtype).eps * math.sqrt(terms) * size


def with_rounding(squared: jax.Array, size: jax.Array, terms: float) -> jax.Array:
    """A squared norm, from products of pairs of tokens, plus ``eps terms size^2``."""
    return squared + jnp.finfo(squared.dtype).eps * terms * jnp.square(size)


def sum_of_squares(axes: str, kept: str, a: jax.Array) -> jax.Array:
    """Sums the squares over all axes but those that are kept, which come out in the order of `kept`."""
    return jnp.einsum(f"{axes}->{kept}", jnp.square(wide(a)))


def sum_but_first(a: jax.Array) -> jax.Array:
    """Sums over all axes but the first, which is the batch."""
    return jnp.sum(a, axis=range(1, a.ndim))


def count(letters: str, axes: str, a: jax.Array) -> int:
    """Counts the indices of some of an array's axes: the product of their sizes."""
    return math.prod(size for letter, size in zip(axes, a.shape, strict=True) if letter in letters)


def with_row_axis(axes: str, taken: str) -> str:
    """The axes with one more behind the first, named by the last letter whose upper and lower case are not taken.

    >>> with_row_axis("bti", "btiy")
    'bzti'
    """
    free = next(a for a in reversed(string.ascii_lowercase) if not {a, a.upper()} & {*taken})
    return f"{axes[0]}{free}{axes[1:]}"


def wide_dtype(a: jax.Array) -> jnp.dtype:
    """Returns an array's dtype, or float32 where that is wider."""
    return jnp.promote_types(a.dtype, jnp.float32)


def wide(a: jax.Array) -> jax.Array:
    """Returns an array in its `wide_dtype`."""
    return a.astype(wide_dtype(a))


def einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies as `jnp.einsum` does, and accumulates in float32 at least."""
    # Half-precision operands are multiplied exactly and accumulated in float32. Float32 operands are not cut to
    # tensor-float or bfloat16, as accelerators do by default, because the norm and the sum are the privacy guarantee.
    wide = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return jnp.einsum(subscripts, a, b, precision="highest", preferred_element_type=wide)
