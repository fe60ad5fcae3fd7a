"""Taps are identity functions on the outputs of layers, whose derivatives are norms and weighted sums by leaf rules.

`tap` is for a layer that uses its parameters alone. `tap_tied_lookup` and `tap_tied_head` are for a table that is both
an embedding and a head. All of them take ``weights_B`` and give it the squared norm of each example's gradient as its
"cotangent". An array of weights that is tapped by many layers receives the sum over the layers, because cotangents add
up.

In each tap the output ``y`` must have been computed with the parameters held constant, by `jax.lax.stop_gradient`.

There may be k times as many rows in ``x`` and ``y`` as there are weights. Then each k rows that follow each other are
those of one user, and "example" here means the user: an example with one more axis of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from dp_rmt.clipping.contraction import Contraction
from dp_rmt.clipping.coordinates import LeafMaps
from dp_rmt.clipping.leaf_rules import LeafRule, Lookup, head_rows, tied_product
from dp_rmt.clipping.leaf_uses import LeafWithoutRule
from dp_rmt.clipping.mapped_norms import squared_norm_of_mapped
from dp_rmt.clipping.products import with_range_of_float32

BIAS = "bias"
"""How layers with rules name what they add to a product."""

NORMS, SUMS = "squared_norm", "weighted_sum"
"""Names of scopes, by which a profile tells what clipping adds to a backward pass."""

HEAD = Contraction("bsd", "vd", "bsv")
"""The rule of a tied head, ``y = x E^T``."""


def tap(
    rules: Mapping[str, LeafRule],
    leaves: Mapping[str, jax.Array],
    x: jax.Array,
    y: jax.Array,
    weights_B: jax.Array,
    maps: Mapping[str, LeafMaps] | None = None,
) -> jax.Array:
    """Returns ``y`` unchanged, and gives ``leaves`` and ``weights_B`` their cotangents by the rules.

    The cotangent of a leaf is the sum of its per-example gradients, each times its weight. It is linear in
    ``weights_B``. The cotangent of ``weights_B`` is the squared norm of each example's gradient over the leaves that
    are differentiated.

    An example of weight zero contributes exactly zero to the sum. So does an example for which ``g`` holds only zeros
    and NaN. Those are the examples whose loss got the cotangent zero: finite derivatives keep it zero, and infinite
    ones make it NaN.

    Args:
      rules: one rule for each leaf.
      leaves: the parameters of the layer.
      x: what the rules take as ``x``, (batch, ...), or (batch * rows, ...).
      y: the output of the layer, as long.
      weights_B: (batch,), float32 or wider.
      maps: by leaf, the coordinates in which the norms of some gradients are taken, by `Contraction`. Where
        one has the bias in it, the bias has no norm of its own. The sums are not mapped.

    Returns:
      ``y``.
    """
    return _tap(tuple((name, rules[name]) for name in leaves), dict(leaves), x, y, weights_B, dict(maps or {}))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(
    static: tuple[Any, ...], leaves: dict[str, jax.Array], x: jax.Array, y: jax.Array, weights_B: jax.Array, maps: Any
) -> jax.Array:
    return y


def _tap_forward(
    static: tuple[Any, ...], leaves: dict[str, Any], x: Any, y: Any, weights_B: Any, maps: Any
) -> tuple[jax.Array, Any]:
    # Residuals are arrays, but their tree is static: () marks a differentiated leaf, and None marks a frozen one.
    marks = {name: () if leaf.perturbed else None for name, leaf in leaves.items()}
    trained = any(leaf.perturbed for leaf in leaves.values())
    held = jax.tree.map(lambda leaf: leaf.value, (x, maps)) if trained else (None, None)
    return y.value, (marks, *held, weights_B.value)


def _tap_backward(static: tuple[Any, ...], residuals: Any, g: Any) -> tuple[Any, ...]:
    marks, x, maps, weights_B = residuals
    if isinstance(g, SymbolicZero):
        return None, None, None, None, None
    if x is None:
        return None, None, g, None, None
    # See `dp_rmt.clipping.contraction.Contraction`. This is not done with x, of which a copy would be kept.
    g = jax.lax.optimization_barrier(g)
    sums: dict[str, Any] = dict.fromkeys(marks)
    squared_norms = jnp.zeros_like(weights_B)
    by_user = len(g) != len(weights_B)
    x_B, g_B = (_grouped(a, weights_B) for a in (x, g))
    for name, of_rows in static:
        if marks[name] is not None:
            rule = of_rows.of_users() if by_user else of_rows
            with jax.named_scope(SUMS):
                sums[name] = rule.weighted_sum(x_B, g_B, weights_B).astype(weights_B.dtype)
            with jax.named_scope(NORMS):
                if name in maps:
                    squared_norms += squared_norm_of_mapped(rule, x_B, g_B, maps[name]).astype(weights_B.dtype)
                elif not (name == BIAS and any(of_matrix.has_bias for of_matrix in maps.values())):
                    squared_norms += rule.squared_norm(x_B, g_B).astype(weights_B.dtype)
    return sums, None, g, squared_norms, None


def _grouped(a: jax.Array, weights_B: jax.Array) -> jax.Array:
    """The array as it is, or (users, rows, ...) where it has several rows for each weight."""
    rows = len(a) // len(weights_B)
    return a if rows == 1 else a.reshape(len(weights_B), rows, *a.shape[1:])


_tap.defvjp(_tap_forward, _tap_backward, symbolic_zeros=True)


def tap_frozen(leaves: Mapping[str, jax.Array], y: jax.Array, refusal: str) -> jax.Array:
    """Returns ``y`` unchanged, and refuses to be differentiated with respect to ``leaves``.

    Args:
      leaves: the parameters of a layer, all of which are frozen.
      y: the output of the layer.
      refusal: the message if a leaf is trained after all.

    Returns:
      ``y``.

    Raises:
      LeafWithoutRule: one of the leaves is differentiated.
    """
    return _tap_frozen(refusal, dict(leaves), y)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap_frozen(refusal: str, leaves: dict[str, jax.Array], y: jax.Array) -> jax.Array:
    return y


def _tap_frozen_forward(refusal: str, leaves: dict[str, Any], y: Any) -> tuple[jax.Array, None]:
    if any(leaf.perturbed for leaf in leaves.values()):
        raise LeafWithoutRule(refusal, has_layers=True)
    return y.value, None


def _tap_frozen_backward(refusal: str, residuals: None, g: Any) -> tuple[Any, ...]:
    return None, None if isinstance(g, SymbolicZero) else g


_tap_frozen.defvjp(_tap_frozen_forward, _tap_frozen_backward, symbolic_zeros=True)


# ---- A table that is both an embedding and a head -----------------------------------------------------------------

# ||L + M||^2 = ||L||^2 + ||M||^2 + 2 <L, M>, with the gradients L of the lookup and M of the head. The last term needs
# the rows of M at the ids. The head can compute them and the lookup needs them, in a backward pass that comes to the
# head first. The lookup therefore hands the head a ticket of zeros, and the head gives the rows back as the ticket's
# cotangent.


def tap_tied_lookup(
    table: jax.Array, ids: jax.Array, y: jax.Array, weights_B: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The `tap` of the lookup ``y = E[ids]`` in a table that `tap_tied_head` uses as well.

    Args:
      table: E, (rows, D).
      ids: (batch, ...), within the table.
      y: the output.
      weights_B: as in `tap`.

    Returns:
      ``y`` and the ticket for `tap_tied_head`.
    """
    tokens = ids.reshape(len(weights_B), -1).shape
    ticket = tuple(jnp.zeros(shape, weights_B.dtype) for shape in ((*tokens, y.shape[-1]), tokens, tokens[:1]))
    tapped: tuple[jax.Array, tuple[jax.Array, ...]] = _tied_lookup(table, ids, y, weights_B, ticket)
    return tapped


@jax.custom_vjp
def _tied_lookup(table: jax.Array, ids: jax.Array, y: jax.Array, weights_B: jax.Array, ticket: Any) -> Any:
    return y, ticket


def _tied_lookup_forward(table: Any, ids: Any, y: Any, weights_B: Any, ticket: Any) -> Any:
    rows_of_table = jnp.empty((len(table.value), 0)) if table.perturbed else None
    return (y.value, jax.tree.map(lambda t: t.value, ticket)), (rows_of_table, ids.value, weights_B.value)


def _tied_lookup_backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    rows_of_table, ids, weights_B = residuals
    g, (rows_BxTxD, rounding_BxT, rounding_of_head_B) = cotangents
    if rows_of_table is None or isinstance(g, SymbolicZero):
        return None, None, None if isinstance(g, SymbolicZero) else g, None, None
    rule = Lookup(len(rows_of_table))
    g = jax.lax.optimization_barrier(g)
    ids_B, g_B = _grouped(ids, weights_B), _grouped(g, weights_B)
    squared_norms = rule.squared_norm(ids_B, g_B)
    if not isinstance(rows_BxTxD, SymbolicZero):  # otherwise no head has taken the ticket
        # What rounding adds to the head's part of the sum may point along the lookup's.
        squared_norms += tied_product(rows_BxTxD, rounding_BxT, g_B) + 2 * jnp.sqrt(squared_norms) * rounding_of_head_B
    total = rule.weighted_sum(ids_B, g_B, weights_B).astype(weights_B.dtype)
    return total, None, g, squared_norms.astype(weights_B.dtype), None


_tied_lookup.defvjp(_tied_lookup_forward, _tied_lookup_backward, symbolic_zeros=True)


def tap_tied_head(
    table: jax.Array, ids: jax.Array, ticket: Any, x: jax.Array, y: jax.Array, weights_B: jax.Array
) -> jax.Array:
    """The `tap` of the head ``y = x E^T`` with a table that `tap_tied_lookup` uses as well.

    Args:
      table: E, (rows, D).
      ids: the ids of the lookup.
      ticket: the ticket of the lookup.
      x: the input, (batch, ..., D).
      y: the output, (batch, ..., rows).
      weights_B: as in `tap`.

    Returns:
      ``y``.
    """
    tapped: jax.Array = _tied_head(table, ids.reshape(len(weights_B), -1), ticket, x, y, weights_B)
    return tapped


@jax.custom_vjp
def _tied_head(table: jax.Array, ids: jax.Array, ticket: Any, x: jax.Array, y: jax.Array, weights_B: jax.Array) -> Any:
    return y


def _tied_head_forward(table: Any, ids: Any, ticket: Any, x: Any, y: Any, weights_B: Any) -> Any:
    return y.value, (ids.value, x.value, weights_B.value) if table.perturbed else None


def _tied_head_backward(residuals: Any, g: Any) -> tuple[Any, ...]:
    if residuals is None or isinstance(g, SymbolicZero):
        return None, None, None, None, None if isinstance(g, SymbolicZero) else g, None
    ids_BxT, x, weights_B = residuals
    g = jax.lax.optimization_barrier(g)
    x_BxSxD = with_range_of_float32(x.reshape(len(weights_B), -1, x.shape[-1]))
    # Logits are wider than what they are computed from. Their gradient is taken as narrow as that, here and in the sum.
    g_BxSxV = g.reshape(*x_BxSxD.shape[:2], -1).astype(x_BxSxD.dtype)
    total = HEAD.weighted_sum(x_BxSxD, g_BxSxV, weights_B).astype(weights_B.dtype)
    for_lookup = (*head_rows(ids_BxT, x_BxSxD, g_BxSxV), HEAD.rounding_of_sum(x_BxSxD, g_BxSxV))
    ticket = tuple(a.astype(weights_B.dtype) for a in for_lookup)
    return total, None, ticket, None, g, HEAD.squared_norm(x_BxSxD, g_BxSxV).astype(weights_B.dtype)


_tied_head.defvjp(_tied_head_forward, _tied_head_backward, symbolic_zeros=True)
