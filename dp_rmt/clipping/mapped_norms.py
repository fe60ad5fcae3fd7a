"""The norm of a matrix's gradient in other coordinates, ``||F G H||``, without the mapped gradient.

With ``F = a (I - U U^T)`` also ``F^2 = a^2 (I - U' U'^T)``, where U' has the same directions (`AxisMap.squared_basis`).
Hence ``||F x^T g||^2 = a^2 (||x^T g||^2 - ||(x U')^T g||^2)``: two norms of the same kind, the second of an input with
as many entries as U has columns. The sum of clipped gradients is mapped once, when it is complete.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dp_rmt.clipping.contraction import Contraction
from dp_rmt.clipping.coordinates import AxisMap, LeafMaps
from dp_rmt.clipping.products import (
    einsum,
    sum_but_first,
    sum_of_squares,
    wide_dtype,
    with_range_of_float32,
    with_rounding,
)

_PLAIN = Contraction("bti", "io", "bto")


def squared_norm_of_mapped(rule: Contraction, x: jax.Array, g: jax.Array, maps: LeafMaps) -> jax.Array:
    """The squared norm (batch,) of each example's mapped gradient, plus a bound of what rounding takes from it.

    With ``maps.has_bias`` it is that of matrix and bias together: the bias is the weight of one more input, which is 1.

    The difference of two squares is small against them where a map damps most of an input. The bound is therefore one
    of the unmapped size: with ``size = sum_t |x_t| |g_t|`` and T tokens it is ``n eps (2 sqrt T + sqrt I + sqrt O)
    (a b size)^2`` for n squares. What rounding adds to the weighted sum is mapped with the sum, so that it is counted
    with ``sum_t |F x_t| b |g_t|``.

    Args:
      rule: of a matrix with axes of inputs and of outputs alone.
      x: what the layer saw, as the rule takes it.
      g: the gradient with respect to its output.
      maps: of the inputs, of the outputs, or of both.

    Returns:
      The squared norms, float32 or wider; not finite where the gradient is not.
    """
    x_BxTxI, g_BxTxO = as_tokens(rule, x, g)
    if maps.has_bias:
        x_BxTxI = with_ones(x_BxTxI)
    norm, size = _PLAIN.scaled_where_needed(
        lambda x, g, *norms: _norm_and_size(x, g, *norms, maps=maps),
        x_BxTxI,
        g_BxTxO,
        _PLAIN.token_norms(x_BxTxI, g_BxTxO),
    )
    return jnp.square(norm + _PLAIN.roundoff_of_sum(x_BxTxI, g_BxTxO) * size)


def _norm_and_size(
    x: jax.Array, g: jax.Array, x_norms: jax.Array, g_norms: jax.Array, *, maps: LeafMaps
) -> tuple[jax.Array, jax.Array]:
    (a, xs), (b, gs) = _parts(x, maps.rows), _parts(g, maps.cols)
    if _PLAIN.keeps_gradients(x):
        squares = [
            sign * other * sum_but_first(jnp.square(einsum("bti,bto->bio", part, of_g)))
            for sign, part in xs
            for other, of_g in gs
        ]
        squared = sum(squares[1:], start=squares[0])
    else:
        squared = sum_but_first(_gram(xs) * _gram(gs))
    terms = 2 * math.sqrt(x.shape[1]) + math.sqrt(x.shape[2]) + math.sqrt(g.shape[2])
    unmapped = a * b * sum_but_first(x_norms * g_norms)
    squared = with_rounding(jnp.maximum(squared, 0.0) * jnp.square(a * b), unmapped, len(xs) * len(gs) * terms)
    eps = jnp.finfo(squared.dtype).eps
    mapped_norms = a * jnp.sqrt(
        jnp.maximum(_token_squares(xs), 0.0) + 2 * eps * math.sqrt(x.shape[2]) * jnp.square(x_norms)
    )
    return jnp.sqrt(squared), sum_but_first(mapped_norms * b * g_norms)


_Part = tuple[int, jax.Array]


def _parts(side: jax.Array, axis_map: AxisMap | None) -> tuple[jax.Array | float, list[_Part]]:
    """The scale of a side's map, and what its squared norm is a signed sum of."""
    if axis_map is None:
        return 1.0, [(1, side)]
    return axis_map.scale, [(1, side), (-1, einsum("bti,ik->btk", side, axis_map.squared_basis(wide_dtype(side))))]


def _gram(parts: list[_Part]) -> jax.Array:
    """The products of pairs of tokens, (B, T, T)."""
    products = [sign * einsum("bti,bsi->bts", part, part) for sign, part in parts]
    return sum(products[1:], start=products[0])


def _token_squares(parts: list[_Part]) -> jax.Array:
    squares = [sign * sum_of_squares("bti", "bt", part) for sign, part in parts]
    return sum(squares[1:], start=squares[0])


def as_tokens(rule: Contraction, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Input (B, T, I) and output gradient (B, T, O), with the tokens in the same order."""
    rows, cols = ("".join(rule.w_axes[axis] for axis in side) for side in rule.matrix_axes)
    tokens = "".join(letter for letter in rule.x_axes[1:] if letter not in rule.w_axes)

    def flat(axes: str, side: str, a: jax.Array) -> jax.Array:
        ordered = jnp.transpose(a, [axes.index(letter) for letter in axes[0] + tokens + side])
        return ordered.reshape(len(a), -1, math.prod(ordered.shape[1 + len(tokens) :]))

    return with_range_of_float32(flat(rule.x_axes, rows, x)), with_range_of_float32(flat(rule.y_axes, cols, g))


def with_ones(x_BxTxI: jax.Array) -> jax.Array:
    """The inputs with one more, which is 1 and whose weight is the bias."""
    return jnp.concatenate([x_BxTxI, jnp.ones_like(x_BxTxI[..., :1])], axis=-1)
