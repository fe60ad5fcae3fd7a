"""Per-example squared gradient norms and weighted gradient sums of single parameters, from what a layer saw.

A layer that computes ``y`` from ``x`` gives a parameter the gradient ``sum_i sum_t f(x_it, g_it)`` with
``g = d loss / d y``, examples i and tokens t. Each example's norm and the sum over the examples follow from ``x`` and
``g`` (Goodfellow 2015; Li et al. 2022, section 4). This module knows arrays only; `dp_rmt.clipping.layer_rules` knows
which layer has which parameters.

Axes are named by letters, as in einsum. The first axis of ``x`` and of ``g`` is the batch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

from dp_rmt.clipping.products import (
    einsum,
    norm_of_sum,
    sum_but_first,
    sum_of_squares,
    weighted_sum,
    wide,
    with_rounding,
    with_row_axis,
)
from dp_rmt.clipping.token_scales import times, token_scales


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

    def of_users(self) -> LeafRule:
        """Returns the rule for ``x`` and ``g`` with one more axis behind the first: the rows of each user.

        A user is to it what an example is to this rule, with as many times the tokens.
        """


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
        norms = jnp.sqrt(sum_of_squares(self.y_axes, tokens, g))
        return jnp.square(norm_of_sum(self._gradients(g), sum_but_first(norms), norms[0].size))

    def weighted_sum(self, x: jax.Array, g: jax.Array, weights_B: jax.Array) -> jax.Array:
        """See `LeafRule`; ``x`` plays no part."""
        return weighted_sum(self._gradients(g), weights_B)

    def of_users(self) -> Offset:
        """See `LeafRule`."""
        return Offset(with_row_axis(self.y_axes, self.y_axes), self.axes)

    def _gradients(self, g: jax.Array) -> jax.Array:
        return jnp.einsum(f"{self.y_axes}->{self.y_axes[0]}{self.axes}", wide(g))


@dataclasses.dataclass(frozen=True)
class Scale:
    """The rule of the scale s of ``y = s * x``, ``x`` normalised, along the last axis: ``sum_t g_it * x_it``."""

    def squared_norm(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """See `LeafRule`."""
        norms = jnp.sqrt(jnp.sum(jnp.square(wide(x) * wide(g)), axis=-1))
        return jnp.square(norm_of_sum(self._gradients(x, g), sum_but_first(norms), norms[0].size))

    def weighted_sum(self, x: jax.Array, g: jax.Array, weights_B: jax.Array) -> jax.Array:
        """See `LeafRule`."""
        return weighted_sum(self._gradients(x, g), weights_B)

    def of_users(self) -> Scale:
        """See `LeafRule`; all axes but the first and the last are tokens."""
        return self

    def _gradients(self, x: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.sum(wide(x) * wide(g), axis=range(1, x.ndim - 1))


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
        products = jnp.where(same_row, einsum("btd,bsd->bts", g_BxTxD, g_BxTxD), 0.0)
        norms = jnp.sqrt(sum_of_squares("btd", "bt", g_BxTxD))
        in_rows = sum_but_first(jnp.where(same_row, norms[:, :, None] * norms[:, None, :], 0.0))
        squared = jnp.maximum(sum_but_first(products), 0.0)
        return with_rounding(squared, jnp.sqrt(in_rows), math.sqrt(g.shape[-1]))

    def weighted_sum(self, x: jax.Array, g: jax.Array, weights_B: jax.Array) -> jax.Array:
        """See `LeafRule`."""
        finite = jnp.where(jnp.isfinite(g), wide(g), 0.0)
        rows = finite * weights_B.reshape(-1, *[1] * (g.ndim - 1)).astype(finite.dtype)
        return jnp.zeros((self.num_rows, g.shape[-1]), rows.dtype).at[x].add(rows, mode="drop")

    def of_users(self) -> Lookup:
        """See `LeafRule`; all axes but the first and the last are tokens."""
        return self


def tied_product(rows_BxTxD: jax.Array, rounding_BxT: jax.Array, g: jax.Array) -> jax.Array:
    """Returns ``2 <L_i, M_i>``, which a head M with a `Lookup` L's weights adds to ``||L_i||^2 + ||M_i||^2``.

    Args:
      rows_BxTxD: the rows of M_i at the ids of L_i.
      rounding_BxT: what rounding can take from the product with a row, in units of ``eps |g_it|``.
      g: the gradient with respect to the lookup's output.

    Returns:
      The products ``(batch,)``, with a bound of the rounding added.
    """
    g_BxTxD = wide(g).reshape(rows_BxTxD.shape)
    rounding = rounding_BxT * jnp.sqrt(sum_of_squares("btd", "bt", g_BxTxD))
    bound = jnp.finfo(rounding.dtype).eps * sum_but_first(rounding)
    return 2 * (sum_but_first(g_BxTxD * rows_BxTxD) + bound)


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
    x_norms_BxS = jnp.sqrt(sum_of_squares("bsd", "bs", times("bsd", x_BxSxD, "bs", 1 / scales_BxS)))
    sizes = einsum("bst,bs->bt", jnp.abs(times("bst", at_ids_BxSxT, "bs", scales_BxS)), x_norms_BxS)
    terms = math.sqrt(x_BxSxD.shape[1]) + math.sqrt(x_BxSxD.shape[2])
    return einsum("bst,bsd->btd", at_ids_BxSxT, x_BxSxD), terms * sizes
