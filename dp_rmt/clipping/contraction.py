"""The rule of a matrix, which is most of a model. Axes are named as in `dp_rmt.clipping.leaf_rules`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call

from dp_rmt.clipping.products import (
    count,
    einsum,
    norm_of_sum,
    sum_but_first,
    sum_of_squares,
    weighted_sum,
    wide_dtype,
    with_range_of_float32,
    with_rounding,
    with_row_axis,
)
from dp_rmt.clipping.token_scales import are_ordinary, times, token_scales


@dataclasses.dataclass(frozen=True)
class Contraction:
    """The rule of the matrix of ``y = einsum("x,w->y", x, W)``; a gradient is ``einsum("x,y->w", x_i, g_i)``.

    Axes of x and y that W lacks are tokens (t). Axes that y lacks are inputs (i), and axes that x lacks are outputs
    (o). Axes of all three are shared: there is a matrix for each of their indices.

    The squared norm is computed from the gradient itself, or as ``sum_ts (x_it . x_is)(g_it . g_is)`` (Li et al. 2022,
    equation 3). With T tokens the first form takes ``T I O`` operations and the second ``T^2 (I + O)``. If the
    gradients of the examples are kept, the first form is also most of the weighted sum. They are kept where that takes
    at most twice the memory of ``g``, ``I <= 2 T``. Elsewhere the form with fewer operations is taken.

    With ``size = sum_t |x_it| |g_it|`` the first form rounds the norm by ``eps sqrt T size``, the second the squared
    norm by ``eps (sqrt I + sqrt O) size^2``. Where gradients are not kept, ``g`` is rounded to its dtype after it
    is weighted, which can lengthen a weighted gradient by ``u size``, where u is that dtype's unit roundoff. All of
    this is added, so that what is clipped to C has at most norm C.

    The products ``x . x`` and ``g . g`` of the second form also lose what is below the smallest float. The norm loses
    at most ``1e-19 (sqrt O sum_t |x_it| + sqrt I sum_t |g_it|)``. Where a token's norm is above 2^14, the size of ``x``
    is first moved into ``g`` (`dp_rmt.clipping.token_scales`), for the norm and for the sum. Therefore the loss is
    below 1e-9 as long as ``T sqrt O`` and ``T sqrt I`` are below 5e5.

    >>> rule = Contraction("bti", "io", "bto")
    >>> [round(float(v), 3) for v in rule.squared_norm(jnp.array([[[1.0, 2.0]]]), jnp.array([[[3.0]]]))]
    [45.0]
    """

    x_axes: str
    w_axes: str
    y_axes: str

    @property
    def matrix_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of W that are inputs and those that are outputs, as negative numbers; shared ones are neither."""
        _, inputs, outputs, _ = self._axes()
        rows, cols = (tuple(self.w_axes.index(a) - len(self.w_axes) for a in side) for side in (inputs, outputs))
        return rows, cols

    @property
    def has_shared_axes(self) -> bool:
        """Whether there is a matrix for each index of an axis that x, W and y all have."""
        return bool(self._axes()[3])

    def squared_norm(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """See `LeafRule`."""
        tokens, inputs, outputs, _ = self._axes()
        num_tokens = count(tokens, self.x_axes, x)
        num_inputs, num_outputs = count(inputs, self.x_axes, x), count(outputs, self.y_axes, g)
        by_pairs = num_tokens * (num_inputs + num_outputs) <= num_inputs * num_outputs
        if by_pairs and not self.keeps_gradients(x):
            # These stand outside the choice, because layers that share their input (query, key and value) share the
            # products.
            of_x = self._products_of_pairs(self.x_axes, with_range_of_float32(x))
            ordinary = functools.partial(self._norm_by_pairs, of_x=of_x)
            norm, size = self.scaled_where_needed(self._norm_by_pairs, x, g, self.token_norms(x, g), ordinary=ordinary)
        else:
            size = self._size(x, g)
            norm = norm_of_sum(self._gradients(x, g), size, num_tokens)
        return jnp.square(norm + self.roundoff_of_sum(x, g) * size)

    def rounding_of_sum(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """How much longer than its gradient an example's part of the sum can be at a weight of one, (batch,)."""
        return self.roundoff_of_sum(x, g) * self._size(x, g)

    def roundoff_of_sum(self, x: jax.Array, g: jax.Array) -> float:
        """What the weighted sum rounds, relative to the sizes of its tokens: kept gradients are weighted in float32."""
        return 0.0 if self.keeps_gradients(x) else float(jnp.finfo(with_range_of_float32(g).dtype).eps) / 2

    def weighted_sum(self, x: jax.Array, g: jax.Array, weights_B: jax.Array) -> jax.Array:
        """See `LeafRule`."""
        if self.keeps_gradients(x):
            return weighted_sum(self._gradients(x, g), weights_B)
        residuals = (x, g, self.token_norms(x, g))
        # This is opaque to differentiation in the weights, which would otherwise keep copies of what follows.
        total: jax.Array = linear_call(self._weighted_contraction, _not_transposable, residuals, weights_B)
        return total

    def of_users(self) -> Contraction:
        """See `LeafRule`."""
        letters = self.x_axes + self.w_axes + self.y_axes
        x_axes, y_axes = (with_row_axis(axes, letters) for axes in (self.x_axes, self.y_axes))
        return Contraction(x_axes, self.w_axes, y_axes)

    def _weighted_contraction(self, residuals: tuple[Any, ...], weights_B: jax.Array) -> jax.Array:
        x, g, token_norms = residuals
        weights = weights_B.reshape(-1, *[1] * (g.ndim - 1)).astype(wide_dtype(g))

        def contracted(x: jax.Array, g: jax.Array, *token_norms: jax.Array) -> jax.Array:
            return einsum(f"{self.x_axes},{self.y_axes}->{self.w_axes}", x, (g * weights).astype(g.dtype))

        total: jax.Array = self.scaled_where_needed(contracted, x, g, token_norms, finite=True)
        return total

    def _products_of_pairs(self, axes: str, a: jax.Array) -> jax.Array:
        """The products ``a_it . a_is``, with the axes of the batch, of shared indices, and twice of the tokens."""
        # Otherwise the compiler takes constant factors out of the products, and multiplies them with each other to
        # zero.
        a = jax.lax.optimization_barrier(a)
        tokens, _, _, shared = self._axes()
        # Each token axis gets a copy, which its capital letter names.
        other = axes.translate(str.maketrans(tokens, tokens.upper()))
        return einsum(f"{axes},{other}->{self.x_axes[0]}{shared}{tokens}{tokens.upper()}", a, a)

    def _norm_by_pairs(
        self, x: jax.Array, g: jax.Array, x_norms: jax.Array, g_norms: jax.Array, of_x: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the squared norm from ``(x_it . x_is)(g_it . g_is)``, plus a bound of the rounding; and the size."""
        _, inputs, outputs, _ = self._axes()
        of_x = self._products_of_pairs(self.x_axes, x) if of_x is None else of_x
        of_g = self._products_of_pairs(self.y_axes, g)
        squared = jnp.maximum(sum_but_first(of_x * of_g), 0.0)  # rounding can make it negative
        num_inputs, num_outputs = count(inputs, self.x_axes, x), count(outputs, self.y_axes, g)
        size = self._sum_of_sizes(x_norms, g_norms)
        squared = with_rounding(squared, size, math.sqrt(num_inputs) + math.sqrt(num_outputs))
        return jnp.sqrt(squared), size

    def token_norms(self, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The norms ``|x_t|`` and ``|g_t|``, with the axes ``_kept()``."""
        kept = self._kept()
        return jnp.sqrt(sum_of_squares(self.x_axes, kept, x)), jnp.sqrt(sum_of_squares(self.y_axes, kept, g))

    def _size(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """The size ``sum_t |x_it| |g_it|``, (batch,). For several matrices it is the norm of their sizes."""
        sizes_B: jax.Array = self.scaled_where_needed(
            lambda x, g, *norms: self._sum_of_sizes(*norms), x, g, self.token_norms(x, g)
        )
        return sizes_B

    def _sum_of_sizes(self, x_norms: jax.Array, g_norms: jax.Array) -> jax.Array:
        _, _, _, shared = self._axes()
        sizes = jnp.sum(x_norms * g_norms, axis=range(1 + len(shared), x_norms.ndim))
        sizes_B: jax.Array = jnp.linalg.norm(sizes.reshape(len(sizes), -1), axis=1)
        return sizes_B

    def scaled_where_needed(
        self,
        function: Callable[..., Any],
        x: jax.Array,
        g: jax.Array,
        token_norms: tuple[jax.Array, jax.Array],
        *,
        finite: bool = False,
        ordinary: Callable[..., Any] | None = None,
    ) -> Any:
        """Computes ``function(x, g, *token_norms)``, or that of ``x / s`` and ``s g`` (`dp_rmt.clipping.token_scales`).

        It is a choice because the scaling takes a third of the time of a product, and hardly ever changes anything.

        Args:
          function: a function of ``x``, ``g`` and their token norms that depends on the products ``x_t g_t`` alone.
          x: the input.
          g: the output gradient.
          token_norms: the norms of both; they are not finite where the tokens are not.
          finite: whether what is not finite counts as zero.
          ordinary: a cheaper form of the function for the case that nothing is scaled; None for the function itself.
        """
        kept = self._kept()
        x, g = with_range_of_float32(x), with_range_of_float32(g)

        def scaled(x: jax.Array, g: jax.Array, *token_norms: jax.Array) -> Any:
            scales = token_scales(self.x_axes, kept, x)
            pair = [times(self.x_axes, x, kept, 1 / scales), times(self.y_axes, g, kept, scales)]
            if finite:
                pair = [jnp.where(jnp.isfinite(a), a, 0) for a in pair]
            x, g = (a.astype(old.dtype) for a, old in zip(pair, (x, g)))
            return function(x, g, *self.token_norms(x, g))

        return jax.lax.cond(are_ordinary(*token_norms), ordinary or function, scaled, x, g, *token_norms)

    def _kept(self) -> str:
        tokens, _, _, shared = self._axes()
        return self.x_axes[0] + shared + tokens

    def _gradients(self, x: jax.Array, g: jax.Array) -> jax.Array:
        return einsum(f"{self.x_axes},{self.y_axes}->{self.x_axes[0]}{self.w_axes}", x, g)

    def keeps_gradients(self, x: jax.Array) -> bool:
        """Whether each example's gradient is formed, and kept for the sum."""
        tokens, inputs, _, _ = self._axes()
        return count(inputs, self.x_axes, x) <= 2 * count(tokens, self.x_axes, x)

    def _axes(self) -> tuple[str, str, str, str]:
        """The letters of tokens, inputs, outputs and shared axes."""
        x, w, y = self.x_axes[1:], self.w_axes, self.y_axes
        return (
            "".join(a for a in x if a not in w),
            "".join(a for a in w if a not in y),
            "".join(a for a in w if a not in x),
            "".join(a for a in w if a in x and a in y),
        )


def _not_transposable(residuals: tuple[jax.Array, ...], cotangent: jax.Array) -> jax.Array:
    raise NotImplementedError("a clipped gradient cannot be differentiated with respect to its weights in reverse")
