"""Per-example squared gradient norms and weighted gradient sums of single parameters, from what a layer saw.

A layer that computes ``y`` from ``x`` gives a parameter the gradient ``sum_i sum_t f(x_it, g_it)`` with
``g = d loss / d y``, examples i and tokens t. Each example's norm and the sum over the examples follow from
``x`` and ``g``; no per-example gradient is kept (Goodfellow 2015; Li et al. 2022, section 4). Arrays only:
which layer has which parameters is `dp_rmt.ghost_clipping`'s business.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, Var
from jax.interpreters import ad, batching


@dataclasses.dataclass(frozen=True)
class LeafRule:
    """What ghost clipping needs to know about one parameter of a layer.

    Attributes:
      squared_norm: ``(x, g) -> (batch,)``, the squared l2 norm of each example's gradient, plus a bound of rounding.
      weighted_sum: ``(x, g, shape) -> shape``, the gradient summed over the examples; their weights are
        already in ``g``. Both are float32 or wider, whatever ``x`` and ``g`` are.
    """

    squared_norm: Callable[[jax.Array, jax.Array], jax.Array]
    weighted_sum: Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]


def matrix_squared_norm(x_BxTxI: jax.Array, g_BxTxO: jax.Array) -> jax.Array:
    """``||x_i^T g_i||^2``: the kernel of ``y = x W``.

    Directly, or as ``sum_ts (x_it . x_is)(g_it . g_is)`` (Li et al. 2022, equation 3), whichever needs fewer
    operations: ``T I O`` or ``T^2 (I + O)``. The direct form holds ``B I O`` numbers at once, the other ``2 B T^2``,
    and rounds by about ``eps (sqrt I + sqrt O) (sum_t |x_it| |g_it|)^2``, which is added: see `_with_rounding`.

    Args:
      x_BxTxI: the layer's input.
      g_BxTxO: the gradient of the losses with respect to its output.

    Returns:
      ``(batch,)``.

    >>> [round(float(x), 3) for x in matrix_squared_norm(jnp.array([[[1.0, 2.0]]]), jnp.array([[[3.0]]]))]
    [45.0]
    """
    tokens, (inputs, outputs) = x_BxTxI.shape[1], (x_BxTxI.shape[2], g_BxTxO.shape[2])
    if tokens * (inputs + outputs) <= inputs * outputs:
        products = _einsum("bti,bsi->bts", x_BxTxI, x_BxTxI) * _einsum("bto,bso->bts", g_BxTxO, g_BxTxO)
        squared = jnp.maximum(jnp.sum(products, axis=(1, 2)), 0.0)  # rounding can make it negative
    else:
        squared = jnp.sum(jnp.square(_einsum("bti,bto->bio", x_BxTxI, g_BxTxO)), axis=(1, 2))
    terms = math.sqrt(inputs) + math.sqrt(outputs)
    return _with_rounding(squared, jnp.sum(_norms(x_BxTxI) * _norms(g_BxTxO), axis=1), terms)


def matrix_weighted_sum(x_BxTxI: jax.Array, g_BxTxO: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``sum_i x_i^T g_i``, accumulated in float32 or wider; shape (I, O)."""
    return _einsum("bti,bto->io", x_BxTxI, g_BxTxO).reshape(shape)


def offset_squared_norm(x: jax.Array, g_BxTxO: jax.Array) -> jax.Array:
    """``||sum_t g_it||^2``: the bias of ``y = ... + b``; ``x`` plays no part."""
    squared = jnp.sum(jnp.square(jnp.sum(_wide(g_BxTxO), axis=1)), axis=1)
    return _with_rounding(squared, jnp.sum(_norms(g_BxTxO), axis=1))


def offset_weighted_sum(x: jax.Array, g_BxTxO: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``sum_it g_it``; ``x`` plays no part."""
    return jnp.sum(_wide(g_BxTxO), axis=(0, 1)).reshape(shape)


def scale_squared_norm(x_BxTxD: jax.Array, g_BxTxD: jax.Array) -> jax.Array:
    """``||sum_t g_it * x_it||^2``: the scale of ``y = s * x`` (``x`` is normalised in a layer norm)."""
    squared = jnp.sum(jnp.square(_einsum("btd,btd->bd", x_BxTxD, g_BxTxD)), axis=1)
    return _with_rounding(squared, jnp.sum(_norms(_wide(x_BxTxD) * _wide(g_BxTxD)), axis=1))


def scale_weighted_sum(x_BxTxD: jax.Array, g_BxTxD: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``sum_it g_it * x_it``."""
    return _einsum("btd,btd->d", x_BxTxD, g_BxTxD).reshape(shape)


def lookup_squared_norm(ids_BxT: jax.Array, g_BxTxD: jax.Array) -> jax.Array:
    """``sum_ts [id_it = id_is] (g_it . g_is)``: the table of ``y = E[ids]``; equal ids share a row."""
    same_row = ids_BxT[:, :, None] == ids_BxT[:, None, :]
    # A selection, not a product with the mask: two tokens in different rows never meet.
    products = jnp.where(same_row, _einsum("btd,bsd->bts", g_BxTxD, g_BxTxD), 0.0)
    squared = jnp.maximum(jnp.sum(products, axis=(1, 2)), 0.0)
    norms = _norms(g_BxTxD)
    in_rows = jnp.sum(jnp.where(same_row, norms[:, :, None] * norms[:, None, :], 0.0), axis=(1, 2))
    return _with_rounding(squared, jnp.sqrt(in_rows), math.sqrt(g_BxTxD.shape[-1]))


def lookup_weighted_sum(ids_BxT: jax.Array, g_BxTxD: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Adds every ``g_it`` to row ``id_it`` of a table of zeros; ids must lie within the table."""
    return jnp.zeros(shape, _wide(g_BxTxD).dtype).at[ids_BxT].add(_wide(g_BxTxD), mode="drop")


MATRIX = LeafRule(matrix_squared_norm, matrix_weighted_sum)
OFFSET = LeafRule(offset_squared_norm, offset_weighted_sum)
SCALE = LeafRule(scale_squared_norm, scale_weighted_sum)
LOOKUP = LeafRule(lookup_squared_norm, lookup_weighted_sum)


def tap(
    rules: Mapping[str, LeafRule],
    leaves: Mapping[str, jax.Array],
    x: jax.Array,
    y: jax.Array,
    probe_B: jax.Array,
) -> jax.Array:
    """Returns ``y`` unchanged, and gives ``leaves`` and ``probe_B`` their cotangents by the rules.

    The cotangent of a leaf is its gradient summed over the examples. The cotangent of the probe is the
    squared norm of each example's gradient over the leaves that are differentiated. One probe tapped by many
    layers receives the sum over the layers, because that is what a cotangent does.

    ``y`` must have been computed with ``leaves`` held constant, by `jax.lax.stop_gradient`.

    An example for which ``g`` holds only zeros and NaN contributes exactly zero to the sum. That is every
    example whose loss got the cotangent zero: finite derivatives keep it zero, infinite ones make it NaN.

    Args:
      rules: one rule per leaf.
      leaves: the parameters of the layer.
      x: what the rules take as ``x``: (batch, ..., features), or integers (batch, ...).
      y: the output of the layer, (batch, ..., features).
      probe_B: (batch,), float32 or wider; its value is not used.

    Returns:
      ``y``.
    """
    return _tap(
        tuple((name, rules[name], v.shape, v.dtype) for name, v in leaves.items()),
        dict(leaves),
        x,
        y,
        probe_B,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(
    static: tuple, leaves: dict[str, jax.Array], x: jax.Array, y: jax.Array, probe_B: jax.Array
) -> jax.Array:
    return y


def _tap_forward(
    static: tuple, leaves: dict[str, Any], x: Any, y: Any, probe_B: Any
) -> tuple[jax.Array, Any]:
    trained = [leaf for leaf in static if leaves[leaf[0]].perturbed]
    # Residuals are arrays, but their tree is static: () marks a differentiated leaf, None a frozen one.
    marks = {name: () if leaf.perturbed else None for name, leaf in leaves.items()}
    return y.value, (marks, x.value if trained else None, probe_B.value)


def _tap_backward(static: tuple, residuals: Any, g: Any) -> tuple:
    marks, x, probe_B = residuals
    if isinstance(g, SymbolicZero):
        return None, None, None, None
    if x is None:
        return None, None, g, None
    x_BxTxI, g_BxTxO = _tokens(x, 0 if jnp.issubdtype(x.dtype, jnp.integer) else 1), _tokens(g, 1)
    trained = [leaf for leaf in static if marks[leaf[0]] is not None]
    squared_norms = sum(rule.squared_norm(x_BxTxI, g_BxTxO) for _, rule, _, _ in trained)
    # See `tap`: 0 * NaN and 0 * inf must be zero. A finite norm says that all that went into it is finite.
    x_BxTxI, g_BxTxO = (jnp.where(jnp.isfinite(a), a, 0) for a in (x_BxTxI, g_BxTxO))
    sums: dict[str, Any] = dict.fromkeys(marks)
    for name, rule, shape, dtype in trained:
        sums[name] = rule.weighted_sum(x_BxTxI, g_BxTxO, shape).astype(dtype)
    return sums, None, g, jnp.asarray(squared_norms, probe_B.dtype)


_tap.defvjp(_tap_forward, _tap_backward, symbolic_zeros=True)


def _tokens(a: jax.Array, feature_axes: int) -> jax.Array:
    """(B, ..., D) to (B, T, D): the axes between the batch and the features are tokens."""
    last = a.ndim - feature_axes
    return a.reshape(a.shape[0], math.prod(a.shape[1:last]), *a.shape[last:])


def _with_rounding(squared: jax.Array, size: jax.Array, terms: float = 1.0) -> jax.Array:
    """A squared norm plus ``eps terms size^2``, a bound of what rounding takes from it (Higham & Mary 2019).

    Where the tokens of an example cancel, its gradient is small against the ``size`` of what is added up, the sum of
    the norms of its tokens' gradients. Its norm may then round to nothing, and an example of any norm would pass
    unclipped. With the bound such an example is clipped harder. Elsewhere it changes a norm by some 1e-5 of itself.
    """
    return squared + jnp.finfo(squared.dtype).eps * terms * jnp.square(size)


def _norms(a: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(_wide(a)), axis=-1))


def _wide(a: jax.Array) -> jax.Array:
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # Half-precision operands are multiplied exactly and accumulated in float32; float32 ones are not cut to
    # tensor-float or bfloat16, as accelerators do by default: the norm and the sum are the privacy guarantee.
    wide = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return jnp.einsum(subscripts, a, b, precision="highest", preferred_element_type=wide)


# ---- Where leaves go --------------------------------------------------------------------------------------

# Marks, in a jaxpr that is only looked at, where leaves meet their rules. Under jax.vmap a layer is one
# equation but many uses of its leaves, hence another name; so also where the losses contain a derivative.
_mark = Primitive("ghost_clipping_rule")
_mark.def_abstract_eval(lambda y, *leaves, layer: y)
batching.primitive_batchers[_mark] = lambda args, axes, *, layer: (
    _mark.bind(*args, layer=f"{layer} inside a vmap"),
    axes[0],
)
ad.primitive_jvps[_mark] = lambda primals, tangents, *, layer: (
    _mark.bind(*primals, layer=f"{layer} inside a derivative"),
    tangents[0],
)

# Operations after which a leaf is still that leaf, each entry once; operations that run a jaxpr.
_RELABELLING = {"transpose", "reshape", "squeeze", "copy", "sharding_constraint"}
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"}


def mark(layer: str, leaves: Mapping[str, jax.Array], y: jax.Array) -> jax.Array:
    """Returns ``y`` unchanged; tells `uses_of_leaves` that ``layer`` uses ``leaves``."""
    return _mark.bind(y, *leaves.values(), layer=layer)


def uses_of_leaves(jaxpr: Jaxpr, num_leaves: int) -> list[list[str]]:
    """Follows the first inputs of a jaxpr to whatever uses them.

    Args:
      jaxpr: what is computed.
      num_leaves: how many of its inputs to follow.

    Returns:
      What uses each of these inputs: the layer of a `mark`, once for every iteration of a loop, or a
      description of anything else save `jax.lax.stop_gradient`.
    """
    uses: list[list[str]] = [[] for _ in range(num_leaves)]
    outs = _follow(jaxpr, [*range(num_leaves), *[None] * (len(jaxpr.invars) - num_leaves)], uses, repeats=1)
    for leaf in outs:
        if leaf is not None:
            uses[leaf].append("the result, as it is")
    return uses


def _follow(
    jaxpr: Jaxpr, sources: Sequence[int | None], uses: list[list[str]], *, repeats: int
) -> list[int | None]:
    """Records in ``uses`` what each leaf goes into; returns which leaf, if any, each output is.

    Args:
      jaxpr: what is computed.
      sources: for each input, the index of the leaf that it is, or None.
      uses: for each leaf, the layers or the operations that use it.
      repeats: how many times the jaxpr runs with the same leaves.
    """
    leaf_of = {var: leaf for var, leaf in zip(jaxpr.invars, sources) if leaf is not None}

    def lookup(atoms: Sequence[Any]) -> list[int | None]:
        return [leaf_of.get(atom) if isinstance(atom, Var) else None for atom in atoms]

    for eqn in jaxpr.eqns:
        leaves = lookup(eqn.invars)
        used = [leaf for leaf in leaves if leaf is not None]
        name = eqn.primitive.name
        if not used or name == "stop_gradient":
            continue
        if eqn.primitive is _mark:
            for leaf in used:
                uses[leaf] += [eqn.params["layer"]] * repeats
        elif name in _RELABELLING or (
            name == "convert_element_type" and is_wide_float(eqn.params["new_dtype"])
        ):
            leaf_of[eqn.outvars[0]] = used[0]
        elif name in _CALLS:
            inner = eqn.params["jaxpr"]
            inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
            outs = _follow(inner, leaves, uses, repeats=repeats)
            leaf_of.update({var: leaf for var, leaf in zip(eqn.outvars, outs) if leaf is not None})
        elif name == "scan":
            _follow_scan(eqn, leaves, uses, repeats=repeats)
        else:
            for leaf in used:
                uses[leaf].append(f"the operation {name}")
    return lookup(jaxpr.outvars)


def _follow_scan(eqn: Any, leaves: list[int | None], uses: list[list[str]], *, repeats: int) -> None:
    body = eqn.params["jaxpr"]
    body = body.jaxpr if isinstance(body, ClosedJaxpr) else body
    # Operands are constants, carry, and what is scanned over; the counts by rank, since their names change with JAX.
    carry = sum(outer.aval.ndim == inner.aval.ndim for outer, inner in zip(eqn.outvars, body.outvars))
    scanned = sum(outer.aval.ndim > inner.aval.ndim for outer, inner in zip(eqn.invars, body.invars))
    consts = len(leaves) - carry - scanned
    # What is scanned over is used once, a slice per iteration; a constant of the loop in every iteration.
    shared: list[int | None] = [*leaves[:consts], *[None] * (len(leaves) - consts)]
    sliced: list[int | None] = [*[None] * (consts + carry), *leaves[consts + carry :]]
    outs = _follow(body, shared, uses, repeats=repeats * eqn.params["length"]) + _follow(
        body, sliced, uses, repeats=repeats
    )
    for leaf in leaves[consts : consts + carry] + outs:
        if leaf is not None:
            uses[leaf].append("the carry or the output of a scan")


def is_wide_float(dtype: Any) -> bool:
    """Whether a dtype is real floating point of 32 bits or more."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32
