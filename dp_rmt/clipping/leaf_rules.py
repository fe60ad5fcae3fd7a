"""Per-example squared gradient norms and weighted gradient sums of single parameters, from what a layer saw.

A layer that computes ``y`` from ``x`` gives a parameter the gradient ``sum_i sum_t f(x_it, g_it)`` with
``g = d loss / d y``, examples i and tokens t. Each example's norm and the sum over the examples follow from ``x`` and
``g`` (Goodfellow 2015; Li et al. 2022, section 4). This module knows arrays only; `dp_rmt.clipping.layer_rules` knows
which layer has which parameters.

Axes are named by letters, as in einsum. The first axis of ``x`` and of ``g`` is the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call

from dp_rmt.clipping.token_scales import are_ordinary, times, token_scales


class LeafRule(Protocol):
    """The rule of one parameter of a layer, for clipping without per-example gradients. Rules are hashable."""

    def squared_norm(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """Returns the squared l2 norm (batch,) of each example's gradient, plus a bound of what rounding takes from it.

        The norm is not finite where the gradient is not. It is float32 or wider, whatever ``x`` and ``g`` are.
        """

    def weighted_sum(self, x: jax.Array, g: jax.Array, weights_B: jax.Array) -> jax.Array:
        """Returns the examples' gradients summed, each times its weight, in the leaf's shape; linear in the weights.

        An example of weight zero contributes exactly zero, whatever its ``x`` and ``g`` are. The sum is float32 or
        wider.
        """


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

    def squared_norm(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """See `LeafRule`."""
        tokens, inputs, outputs, _ = self._axes()
        num_tokens = _count(tokens, self.x_axes, x)
        num_inputs, num_outputs = _count(inputs, self.x_axes, x), _count(outputs, self.y_axes, g)
        by_pairs = num_tokens * (num_inputs + num_outputs) <= num_inputs * num_outputs
        if by_pairs and not self._keeps_gradients(x):
            # These stand outside the choice, because layers that share their input (query, key and value) share the
            # products.
            of_x = self._products_of_pairs(self.x_axes, with_range_of_float32(x))
            ordinary = functools.partial(self._norm_by_pairs, of_x=of_x)
            norm, size = self._choose(self._norm_by_pairs, x, g, self._token_norms(x, g), ordinary=ordinary)
        else:
            size = self._size(x, g)
            norm = _norm_of_sum(self._gradients(x, g), size, num_tokens)
        return jnp.square(norm + self._roundoff_of_sum(x, g) * size)

    def rounding_of_sum(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """How much longer than its gradient an example's part of the sum can be at a weight of one, (batch,)."""
        return self._roundoff_of_sum(x, g) * self._size(x, g)

    def _roundoff_of_sum(self, x: jax.Array, g: jax.Array) -> float:
        # Gradients that are kept are weighted in float32.
        return 0.0 if self._keeps_gradients(x) else float(jnp.finfo(with_range_of_float32(g).dtype).eps) / 2

    def weighted_sum(self, x: jax.Array, g: jax.Array, weights_B: jax.Array) -> jax.Array:
        """See `LeafRule`."""
        if self._keeps_gradients(x):
            return _weighted_sum(self._gradients(x, g), weights_B)
        residuals = (x, g, self._token_norms(x, g))
        # This is opaque to differentiation in the weights, which would otherwise keep copies of what follows.
        total: jax.Array = linear_call(self._weighted_contraction, _not_transposable, residuals, weights_B)
        return total

    def _weighted_contraction(self, residuals: tuple[Any, ...], weights_B: jax.Array) -> jax.Array:
        x, g, token_norms = residuals
        weights = weights_B.reshape(-1, *[1] * (g.ndim - 1)).astype(_wide_dtype(g))

        def contracted(x: jax.Array, g: jax.Array, *token_norms: jax.Array) -> jax.Array:
            return _einsum(f"{self.x_axes},{self.y_axes}->{self.w_axes}", x, (g * weights).astype(g.dtype))

        total: jax.Array = self._choose(contracted, x, g, token_norms, finite=True)
        return total

    def _products_of_pairs(self, axes: str, a: jax.Array) -> jax.Array:
        """The products ``a_it . a_is``, with the axes of the batch, of shared indices, and twice of the tokens."""
        # Otherwise the compiler takes constant factors out of the products, and multiplies them with each other to
        # zero.
        a = jax.lax.optimization_barrier(a)
        tokens, _, _, shared = self._axes()
        # Each token axis gets a copy, which its capital letter names.
        other = axes.translate(str.maketrans(tokens, tokens.upper()))
        return _einsum(f"{axes},{other}->{self.x_axes[0]}{shared}{tokens}{tokens.upper()}", a, a)

    def _norm_by_pairs(
        self, x: jax.Array, g: jax.Array, x_norms: jax.Array, g_norms: jax.Array, of_x: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the squared norm from ``(x_it . x_is)(g_it . g_is)``, plus a bound of the rounding; and the size."""
        _, inputs, outputs, _ = self._axes()
        of_x = self._products_of_pairs(self.x_axes, x) if of_x is None else of_x
        of_g = self._products_of_pairs(self.y_axes, g)
        squared = jnp.maximum(_sum_but_first(of_x * of_g), 0.0)  # rounding can make it negative
        num_inputs, num_outputs = _count(inputs, self.x_axes, x), _count(outputs, self.y_axes, g)
        size = self._sum_of_sizes(x_norms, g_norms)
        squared = _with_rounding(squared, size, math.sqrt(num_inputs) + math.sqrt(num_outputs))
        return jnp.sqrt(squared), size

    def _token_norms(self, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The norms ``|x_t|`` and ``|g_t|``, with the axes ``_kept()``."""
        kept = self._kept()
        return jnp.sqrt(_sum_of_squares(self.x_axes, kept, x)), jnp.sqrt(_sum_of_squares(self.y_axes, kept, g))

    def _size(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """The size ``sum_t |x_it| |g_it|``, (batch,). For several matrices it is the norm of their sizes."""
        sizes_B: jax.Array = self._choose(
            lambda x, g, *norms: self._sum_of_sizes(*norms), x, g, self._token_norms(x, g)
        )
        return sizes_B

    def _sum_of_sizes(self, x_norms: jax.Array, g_norms: jax.Array) -> jax.Array:
        _, _, _, shared = self._axes()
        sizes = jnp.sum(x_norms * g_norms, axis=range(1 + len(shared), x_norms.ndim))
        sizes_B: jax.Array = jnp.linalg.norm(sizes.reshape(len(sizes), -1), axis=1)
        return sizes_B

    def _choose(
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
            return function(x, g, *self._token_norms(x, g))

        return jax.lax.cond(are_ordinary(*token_norms), ordinary or function, scaled, x, g, *token_norms)

    def _kept(self) -> str:
        tokens, _, _, shared = self._axes()
        return self.x_axes[0] + shared + tokens

    def _gradients(self, x: jax.Array, g: jax.Array) -> jax.Array:
        return _einsum(f"{self.x_axes},{self.y_axes}->{self.x_axes[0]}{self.w_axes}", x, g)

    def _keeps_gradients(self, x: jax.Array) -> bool:
        tokens, inputs, _, _ = self._axes()
        return _count(inputs, self.x_axes, x) <= 2 * _count(tokens, self.x_axes, x)

    def _axes(self) -> tuple[str, str, str, str]:
        """The letters of tokens, inputs, outputs and shared axes."""
        x, w, y = self.x_axes[1:], self.w_axes, self.y_axes
        return (
            "".join(a for a in x if a not in w),
            "".join(a for a in w if a not in y),
            "".join(a for a in w if a not in x),
            "".join(a for a in w if a in x and a in y),
        )


@dataclasses.dataclass(frozen=True)
class Offset:
    """The rule of the bias of ``y = ... + b``. An example's gradient is ``sum_t g_it``.

    Attributes:
      y_axes: the axes of the output.
      axes: those axes of the output that the bias has.
    """

    y_axes: str
    axes: str

    def squared_norm(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """See `LeafRule`; ``x`` plays no part."""
        tokens = "".join(a for a in self.y_axes if a not in self.axes)  # this includes the batch, which is first
        norms = jnp.sqrt(_sum_of_squares(self.y_axes, tokens, g))
        return jnp.square(_norm_of_sum(self._gradients(g), _sum_but_first(norms), norms[0].size))

    def weighted_sum(self, x: jax.Array, g: jax.Array, weights_B: jax.Array) -> jax.Array:
        """See `LeafRule`; ``x`` plays no part."""
        return _weighted_sum(self._gradients(g), weights_B)

    def _gradients(self, g: jax.Array) -> jax.Array:
        return jnp.einsum(f"{self.y_axes}->{self.y_axes[0]}{self.axes}", _wide(g))


@dataclasses.dataclass(frozen=True)
class Scale:
    """The rule of the scale s of ``y = s * x``, ``x`` normalised, along the last axis: ``sum_t g_it * x_it``."""

    def squared_norm(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """See `LeafRule`."""
        norms = jnp.sqrt(jnp.sum(jnp.square(_wide(x) * _wide(g)), axis=-1))
        return jnp.square(_norm_of_sum(self._gradients(x, g), _sum_but_first(norms), norms[0].size))

    def weighted_sum(self, x: jax.Array, g: jax.Array, weights_B: jax.Array) -> jax.Array:
        """See `LeafRule`."""
        return _weighted_sum(self._gradients(x, g), weights_B)

    def _gradients(self, x: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.sum(_wide(x) * _wide(g), axis=range(1, x.ndim - 1))


@dataclasses.dataclass(frozen=True)
class Lookup:
    """The rule of the table of ``y = E[ids]``: ``sum_ts [id_it = id_is] (g_it . g_is)``, as equal ids share a row.

    ``x`` holds the ids, which must lie within the table.
    """

    num_rows: int

    def squared_norm(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """See `LeafRule`."""
        ids_BxT, g_BxTxD = x.reshape(len(x), -1), g.reshape(len(x), -1, g.shape[-1])
        same_row = ids_BxT[:, :, None] == ids_BxT[:, None, :]
        # It is a selection and not a product with the mask, so two tokens in different rows never meet.
        products = jnp.where(same_row, _einsum("btd,bsd->bts", g_BxTxD, g_BxTxD), 0.0)
        norms = jnp.sqrt(_sum_of_squares("btd", "bt", g_BxTxD))
        in_rows = _sum_but_first(jnp.where(same_row, norms[:, :, None] * norms[:, None, :], 0.0))
        squared = jnp.maximum(_sum_but_first(products), 0.0)
        return _with_rounding(squared, jnp.sqrt(in_rows), math.sqrt(g.shape[-1]))

    def weighted_sum(self, x: jax.Array, g: jax.Array, weights_B: jax.Array) -> jax.Array:
        """See `LeafRule`."""
        finite = jnp.where(jnp.isfinite(g), _wide(g), 0.0)
        rows = finite * weights_B.reshape(-1, *[1] * (g.ndim - 1)).astype(finite.dtype)
        return jnp.zeros((self.num_rows, g.shape[-1]), rows.dtype).at[x].add(rows, mode="drop")


def tied_product(rows_BxTxD: jax.Array, rounding_BxT: jax.Array, g: jax.Array) -> jax.Array:
    """Returns ``2 <L_i, M_i>``, which a head M with a `Lookup` L's weights adds to ``||L_i||^2 + ||M_i||^2``.

    Args:
      rows_BxTxD: the rows of M_i at the ids of L_i.
      rounding_BxT: what rounding can take from the product with a row, in units of ``eps |g_it|``.
      g: the gradient with respect to the lookup's output.

    Returns:
      The products ``(batch,)``, with a bound of the rounding added.
    """
    g_BxTxD = _wide(g).reshape(rows_BxTxD.shape)
    rounding = rounding_BxT * jnp.sqrt(_sum_of_squares("btd", "bt", g_BxTxD))
    bound = jnp.finfo(rounding.dtype).eps * _sum_but_first(rounding)
    return 2 * (_sum_but_first(g_BxTxD * rows_BxTxD) + bound)


def head_rows(ids_BxT: jax.Array, x_BxSxD: jax.Array, g_BxSxV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes rows ``M_i[id_it] = sum_s g_is[id_it] x_is`` of the gradient of ``y = x E^T``, and their rounding.

    Args:
      ids_BxT: the wanted rows of each example.
      x_BxSxD: the head's input.
      g_BxSxV: the gradient with respect to its output.

    Returns:
      ``(B, T, D)`` and ``(B, T)``: ``(sqrt S + sqrt D) sum_s |g_is[id_it]| |x_is|``, as `tied_product` takes them.
    """
    at_ids_BxSxT = jnp.take_along_axis(g_BxSxV, ids_BxT[:, None, :], axis=2)
    scales_BxS = token_scales("bsd", "bs", x_BxSxD)
    x_norms_BxS = jnp.sqrt(_sum_of_squares("bsd", "bs", times("bsd", x_BxSxD, "bs", 1 / scales_BxS)))
    sizes = _einsum("bst,bs->bt", jnp.abs(times("bst", at_ids_BxSxT, "bs", scales_BxS)), x_norms_BxS)
    terms = math.sqrt(x_BxSxD.shape[1]) + math.sqrt(x_BxSxD.shape[2])
    return _einsum("bst,bsd->btd", at_ids_BxSxT, x_BxSxD), terms * sizes


def is_wide_float(dtype: jax.typing.DTypeLike) -> bool:
    """Tells whether a dtype is real floating point of 32 bits or more."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32


def with_range_of_float32(a: jax.Array) -> jax.Array:
    """Returns an array as it is, or as float32 where its dtype has a smaller range.

    In float16 a weighted ``g`` below 6e-8 vanishes or is rounded to twice its size. bfloat16 has float32's range.
    """
    return a if jnp.finfo(a.dtype).minexp <= jnp.finfo(jnp.float32).minexp else a.astype(jnp.float32)


def _weighted_sum(gradients: jax.Array, weights_B: jax.Array) -> jax.Array:
    # A weight of zero does not remove a NaN (0 * NaN = NaN), hence the selection before the product.
    finite = jnp.where(jnp.isfinite(gradients), gradients, 0.0)
    return jnp.einsum("b,b...->...", weights_B.astype(gradients.dtype), finite, precision="highest")


def _not_transposable(residuals: tuple[jax.Array, ...], cotangent: jax.Array) -> jax.Array:
    raise NotImplementedError("a clipped gradient cannot be differentiated with respect to its weights in reverse")


# If the tokens of an example cancel, its gradient is small against the `size` of what is added up, the sum of the norms
# of its tokens' gradients. Its norm may then round to nothing, and an example of any norm would pass unclipped. With a
# bound of the rounding (Higham & Mary 2019) such an example is clipped harder. Elsewhere the bound is small.


def _norm_of_sum(gradients: jax.Array, size: jax.Array, terms: int) -> jax.Array:
    """The norm of each example's gradient, which is a sum of `terms` terms, plus ``eps sqrt terms size``."""
    norm = jnp.sqrt(_sum_but_first(jnp.square(gradients)))
    return norm + jnp.finfo(norm.dtype).eps * math.sqrt(terms) * size


def _with_rounding(squared: jax.Array, size: jax.Array, terms: float) -> jax.Array:
    """A squared norm, from products of pairs of tokens, plus ``eps terms size^2``."""
    return squared + jnp.finfo(squared.dtype).eps * terms * jnp.square(size)


def _sum_of_squares(axes: str, kept: str, a: jax.Array) -> jax.Array:
    return jnp.einsum(f"{axes}->{kept}", jnp.square(_wide(a)))


def _sum_but_first(a: jax.Array) -> jax.Array:
    return jnp.sum(a, axis=range(1, a.ndim))


def _count(letters: str, axes: str, a: jax.Array) -> int:
    return math.prod(size for letter, size in zip(axes, a.shape, strict=True) if letter in letters)


def _wide_dtype(a: jax.Array) -> jnp.dtype:
    return jnp.promote_types(a.dtype, jnp.float32)


def _wide(a: jax.Array) -> jax.Array:
    return a.astype(_wide_dtype(a))


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # Half-precision operands are multiplied exactly and accumulated in float32. Float32 operands are not cut to
    # tensor-float or bfloat16, as accelerators do by default, because the norm and the sum are the privacy guarantee.
    wide = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return jnp.einsum(subscripts, a, b, precision="highest", preferred_element_type=wide)
