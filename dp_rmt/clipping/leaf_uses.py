"""Finds where the parameters of a model go: what in a jaxpr uses each of them, and how many times.

The law that every trainable parameter is counted exactly once in a per-example norm is checked on the jaxpr of the
losses, in which `mark` shows where a parameter meets its rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, Var
from jax.interpreters import ad, batching

from dp_rmt.clipping.products import is_wide_float

# This primitive marks where leaves meet their rules, in a jaxpr that is only looked at. Under jax.vmap a layer is one
# equation but many uses of its leaves, so it gets another name there. The same holds where the losses contain a
# derivative.
_mark = Primitive("ghost_clipping_rule")
_mark.def_abstract_eval(lambda y, *leaves, layer, problem: y)
batching.primitive_batchers[_mark] = lambda args, axes, *, layer, problem: (
    _mark.bind(*args, layer=layer, problem=f"{problem} inside a vmap"),
    axes[0],
)
ad.primitive_jvps[_mark] = lambda primals, tangents, *, layer, problem: (
    _mark.bind(*primals, layer=layer, problem=f"{problem} inside a derivative"),
    tangents[0],
)

# After the first operations a leaf is still that leaf, each entry once. The second ones run a jaxpr.
_RELABELLING = {"transpose", "reshape", "squeeze", "copy", "sharding_constraint"}
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"}


class LeafWithoutRule(ValueError):
    """No rule counts a leaf of the parameters exactly once; `clipped_grad` can.

    Attributes:
      has_layers: whether the losses have layers with rules at all.
    """

    def __init__(self, message: str, *, has_layers: bool) -> None:
        super().__init__(message)
        self.has_layers = has_layers


class Use(NamedTuple):
    """A use of a leaf: what uses it, and where."""

    by: str  # the layer of a `mark` and its problem, or a description of anything else
    scope: tuple[int, ...] = ()  # the calls and loops around it, the outermost first

    def is_visible_from(self, other: Use) -> bool:
        """Tells whether a value computed here can be handed to the other use, being in the same scope or inside it."""
        return other.scope[: len(self.scope)] == self.scope


def mark(layer: str, leaves: Mapping[str, Any], y: jax.Array, *, problem: str | None = None) -> jax.Array:
    """Returns ``y`` unchanged, and tells `uses_of_leaves` that ``layer`` uses ``leaves``, and the problem with that."""
    said = "" if problem is None else f" {problem}"
    marked: jax.Array = _mark.bind(y, *jax.tree.leaves(leaves), layer=layer, problem=said)
    return marked


def uses_of_leaves(jaxpr: Jaxpr, num_leaves: int) -> list[list[Use]]:
    """Follows the first inputs of a jaxpr to whatever uses them.

    Args:
      jaxpr: what is computed.
      num_leaves: how many of its inputs to follow.

    Returns:
      The uses of each of these inputs. A use is the layer of a `mark`, once for every iteration of a loop, or a
      description of anything else except `jax.lax.stop_gradient`.
    """
    uses: list[list[Use]] = [[] for _ in range(num_leaves)]
    outs = _follow(jaxpr, [*range(num_leaves), *[None] * (len(jaxpr.invars) - num_leaves)], uses, repeats=1, scope=())
    for leaf in outs:
        if leaf is not None:
            uses[leaf].append(Use("the result, as it is"))
    return uses


def bytes_of_marked_outputs(jaxpr: Jaxpr) -> int:
    """The size of the outputs of all layers that a `mark` shows, once for every iteration of a loop."""
    outputs: list[tuple[Any, int]] = [(eqn.outvars[0].aval, repeats) for eqn, repeats in _marks(jaxpr, 1)]
    return sum(repeats * output.size * output.dtype.itemsize for output, repeats in outputs)


def calls_of_layers(jaxpr: Jaxpr) -> Counter[str]:
    """How often each layer is called, with whatever parameters, by the name that it is marked with."""
    calls: Counter[str] = Counter()
    for eqn, repeats in _marks(jaxpr, 1):
        calls[eqn.params["layer"]] += repeats
    return calls


def _marks(jaxpr: Jaxpr, repeats: int) -> Iterator[tuple[Any, int]]:
    """Goes through all marks, and says how often each is run."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is _mark:
            yield eqn, repeats
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: isinstance(p, ClosedJaxpr | Jaxpr)):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                body = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                yield from _marks(body, repeats * eqn.params.get("length", 1))


def _follow(
    jaxpr: Jaxpr, sources: Sequence[int | None], uses: list[list[Use]], *, repeats: int, scope: tuple[int, ...]
) -> list[int | None]:
    """Records in ``uses`` what each leaf goes into, and returns which leaf, if any, each output is.

    Args:
      jaxpr: what is computed.
      sources: for each input, the index of the leaf that it is, or None.
      uses: for each leaf, the layers or the operations that use it.
      repeats: how many times the jaxpr runs with the same leaves.
      scope: the calls and loops around the jaxpr.
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
                uses[leaf] += [Use(eqn.params["layer"] + eqn.params["problem"], scope)] * repeats
        elif name in _RELABELLING or (name == "convert_element_type" and is_wide_float(eqn.params["new_dtype"])):
            leaf_of[eqn.outvars[0]] = used[0]
        elif name in _CALLS:
            inner = eqn.params["jaxpr"]
            inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
            outs = _follow(inner, leaves, uses, repeats=repeats, scope=(*scope, id(eqn)))
            leaf_of.update({var: leaf for var, leaf in zip(eqn.outvars, outs) if leaf is not None})
        elif name == "scan":
            _follow_scan(eqn, leaves, uses, repeats=repeats, scope=scope)
        else:
            for leaf in used:
                uses[leaf].append(Use(f"the operation {name}", scope))
    return lookup(jaxpr.outvars)


def _follow_scan(
    eqn: Any, leaves: list[int | None], uses: list[list[Use]], *, repeats: int, scope: tuple[int, ...]
) -> None:
    body = eqn.params["jaxpr"]
    body = body.jaxpr if isinstance(body, ClosedJaxpr) else body
    # The operands are constants, carry, and what is scanned over. They are told apart by rank, since names change with
    # JAX.
    carry = sum(outer.aval.ndim == inner.aval.ndim for outer, inner in zip(eqn.outvars, body.outvars))
    scanned = sum(outer.aval.ndim > inner.aval.ndim for outer, inner in zip(eqn.invars, body.invars))
    consts = len(leaves) - carry - scanned
    # What is scanned over is used once, one slice in each iteration. A constant of the loop is used in every iteration.
    shared: list[int | None] = [*leaves[:consts], *[None] * (len(leaves) - consts)]
    sliced: list[int | None] = [*[None] * (consts + carry), *leaves[consts + carry :]]
    inside = (*scope, id(eqn))
    outs = _follow(body, shared, uses, repeats=repeats * eqn.params["length"], scope=inside)
    outs += _follow(body, sliced, uses, repeats=repeats, scope=inside)
    for leaf in leaves[consts : consts + carry] + outs:
        if leaf is not None:
            uses[leaf].append(Use("the carry or the output of a scan", scope))
