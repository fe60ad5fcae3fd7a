"""Powers of two as units. In units of a matrix's own largest entry, no square underflows or overflows.

A product with a power of two is exact, so a homogeneous function gives the same digits at every scale. Therefore `Y
2^k` with noise `s 2^k` has the singular values, gates and blends of `Y` with `s`, from the smallest to the largest
numbers that a dtype has.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

_LARGEST_RATIO = 2.0**40


def unit_of(magnitudes: ArrayLike) -> jax.Array:
    """Returns the power of two u with `1 <= x / u < 2` for each x; u is 1 where x is 0 or not finite.

    Both u and 1 / u are normal numbers. Therefore x / u is a little smaller or larger near the ends of the dtype's
    range.

    Args:
      magnitudes: x >= 0, of any shape, floating.

    Returns:
      u, of the same shape and dtype.

    >>> print(unit_of([0.3, 4.0, 0.0]))
    [0.25 4.   1.  ]
    """
    magnitudes = jnp.asarray(magnitudes)
    info = jnp.finfo(magnitudes.dtype)
    # Only the bits of the exponent are used, because functions such as exp2 are rounded on some devices.
    integer = jnp.dtype(f"uint{info.bits}")
    exponent_bits = integer.type(((1 << info.nexp) - 1) << info.nmant)
    bits = jax.lax.bitcast_convert_type(magnitudes, integer) & exponent_bits
    unit = jax.lax.bitcast_convert_type(bits, magnitudes.dtype)
    smallest = 4 * info.tiny
    return jnp.where(unit == 0, 1.0, jnp.where(jnp.isfinite(unit), jnp.clip(unit, smallest, 1 / smallest), 1.0))


def largest_entry(matrices: jax.Array) -> jax.Array:
    """The largest absolute value (...) in each matrix (..., rows, cols); infinite where an entry is not finite."""
    magnitudes = jnp.where(jnp.isfinite(matrices), jnp.abs(matrices), jnp.inf)
    return jnp.max(magnitudes, axis=(-2, -1), initial=0.0)


def in_units(length: ArrayLike, unit: jax.Array) -> jax.Array:
    """Expresses a length that goes with matrices, such as a noise level or a cut, in their units, at most 2^40.

    A length of 2^40 units is larger than a whole matrix with entries of about 1, and a larger one would overflow.

    Args:
      length: not negative, any shape that goes with `unit`.
      unit: of `unit_of`.

    Returns:
      `length / unit`, the dtype of `unit`.

    >>> print(in_units(3.0, jnp.array([0.5, 2.0**-100])))
    [6.0000000e+00 1.0995116e+12]
    """
    # Not a constant of the program: XLA turns (c / u)^2 into c^2 / u^2, and either square may leave the range.
    length = jax.lax.optimization_barrier(jnp.asarray(length, unit.dtype))
    return jnp.minimum(length * (1 / unit), _LARGEST_RATIO)
