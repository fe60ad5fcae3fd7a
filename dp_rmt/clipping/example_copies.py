"""Parameters of which every example gets a copy, such as learned positions: where they meet the batch, and their rule.

In ``x + p``, with ``x`` (B, L, D) and ``p`` (1, L, D), each example sees p once. No layer could be intercepted there,
but the jaxpr of the losses shows it: p goes through operations that keep its entries, such as a slice, into one
operation that repeats it along the batch. Written as ``x + copies``, with ``copies`` (B, L, D), the gradient with
respect to the copy of example i is the gradient of example i, whatever follows, because no operation mixes examples.

A parameter that is used a second time, or inside a scan or a remat, has no such rule.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from dp_rmt.clipping.leaf_rules import Offset
from dp_rmt.clipping.products import is_wide_float
from dp_rmt.clipping.taps import tap

Steps = tuple[str, ...]
"""The operations that a parameter goes through, the one that repeats it last."""
_Known = dict[Var, tuple[int, Steps]]

_KEEP = {"transpose", "reshape", "squeeze", "copy", "sharding_constraint", "slice"}
_ELEMENTWISE = {"add", "add_any", "sub", "mul", "div", "max", "min"}
_CALLS = {"jit", "pjit", "closed_call", "core_call"}


def copied_leaves(jaxpr: Jaxpr, num_leaves: int, batch_size: int) -> dict[int, Steps]:
    """Finds the leaves that are used once, by an operation that gives every example a copy.

    Args:
      jaxpr: of the losses; its first inputs are the leaves.
      num_leaves: how many leaves there are.
      batch_size: how many examples, a size that no other axis has.

    Returns:
      By number of the leaf, what it goes through.
    """
    uses: list[list[Steps | None]] = [[] for _ in range(num_leaves)]
    known: _Known = {var: (leaf, ()) for leaf, var in enumerate(jaxpr.invars[:num_leaves])}
    for leaf, _ in _find(jaxpr, known, uses, batch_size).values():
        uses[leaf].append(None)  # it is a result
    return {leaf: found[0] for leaf, found in enumerate(uses) if len(found) == 1 and found[0] is not None}


def _find(jaxpr: Jaxpr, known: _Known, uses: list[list[Steps | None]], batch_size: int) -> dict[int, tuple[int, Steps]]:
    """Records what each leaf goes into. Returns which outputs are leaves, by number of the output."""
    for eqn in jaxpr.eqns:
        operands = {i: known[a] for i, a in enumerate(eqn.invars) if isinstance(a, Var) and a in known}
        name = eqn.primitive.name
        if not operands or name == "stop_gradient":
            continue
        if name in _CALLS:
            inner = _opened(eqn.params["jaxpr"])
            outs = _find(inner, {inner.invars[i]: what for i, what in operands.items()}, uses, batch_size)
            known.update({eqn.outvars[i]: what for i, what in outs.items()})
            continue
        ((place, (leaf, steps)), *more) = operands.items()
        if not more and _keeps_entries(eqn):
            known[eqn.outvars[0]] = leaf, (*steps, name)
        elif not more and _gives_copies(eqn, place, batch_size):
            uses[leaf].append((*steps, name))
        else:
            for other, _ in operands.values():
                uses[other].append(None)
    return {i: known[a] for i, a in enumerate(jaxpr.outvars) if isinstance(a, Var) and a in known}


def with_copies(
    losses: Callable[..., jax.Array],
    arguments: tuple[Any, ...],
    copied: Mapping[int, Steps],
    num_rows: int,
    weights_B: jax.Array,
) -> tuple[jax.Array, set[int]]:
    """Computes the losses with a tapped copy of some leaves for every example (`dp_rmt.clipping.taps.tap`).

    Args:
      losses: a function of the arguments.
      arguments: the parameters, whose leaves are numbered in tree order, and what follows them.
      copied: what each of those leaves goes through, from `copied_leaves`.
      num_rows: how many losses there are: one for each weight, or as many rows of a user for each.
      weights_B: of the taps, one for each example (or user).

    Returns:
      The losses, and the numbers of the leaves that were found where they were expected.
    """
    closed = jax.make_jaxpr(losses)(*arguments)
    seen: set[int] = set()
    evaluation = _Evaluation(copied, num_rows, weights_B, seen)
    known: _Known = {closed.jaxpr.invars[leaf]: (leaf, ()) for leaf in copied}
    (result,), _ = evaluation(closed.jaxpr, closed.consts, jax.tree.leaves(arguments), known)
    return result, seen


class _Evaluation:
    """Evaluates a jaxpr, and taps copies on the way."""

    def __init__(self, copied: Mapping[int, Steps], num_rows: int, weights_B: jax.Array, seen: set[int]) -> None:
        self.copied, self.num_rows, self.weights_B, self.seen = copied, num_rows, weights_B, seen

    def __call__(
        self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], known: _Known
    ) -> tuple[list[Any], dict[int, tuple[int, Steps]]]:
        values: dict[Var, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for eqn in jaxpr.eqns:
            operands = {i: known[a] for i, a in enumerate(eqn.invars) if isinstance(a, Var) and a in known}
            inputs = [read(atom) for atom in eqn.invars]
            with eqn.ctx.manager:
                outs = self._equation(eqn, inputs, operands, known)
            values.update(zip(eqn.outvars, outs, strict=True))
        found = {i: known[a] for i, a in enumerate(jaxpr.outvars) if isinstance(a, Var) and a in known}
        return [read(atom) for atom in jaxpr.outvars], found

    def _equation(self, eqn: Any, inputs: list[Any], operands: dict[int, tuple[int, Steps]], known: _Known) -> Any:
        name = eqn.primitive.name
        if operands and name in _CALLS:
            inner = eqn.params["jaxpr"]
            consts = inner.consts if isinstance(inner, ClosedJaxpr) else ()
            opened = _opened(inner)
            outs, found = self(opened, consts, inputs, {opened.invars[i]: what for i, what in operands.items()})
            known.update({eqn.outvars[i]: what for i, what in found.items()})
            return outs
        if len(operands) == 1:
            ((place, (leaf, steps)),) = operands.items()
            if self.copied[leaf] == (*steps, name) and _gives_copies(eqn, place, self.num_rows):
                self.seen.add(leaf)
                return [self._repeated(eqn, inputs, place)]
            if _keeps_entries(eqn):
                known[eqn.outvars[0]] = leaf, (*steps, name)
        outs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
        return outs if eqn.primitive.multiple_results else [outs]

    def _repeated(self, eqn: Any, inputs: list[Any], place: int) -> jax.Array:
        """The result of an operation that repeats a parameter, with a tapped copy in the parameter's place."""
        value, params = inputs[place], eqn.params
        if eqn.primitive.name == "tile":
            return self._copies(value)
        if eqn.primitive.name == "broadcast_in_dim":
            axes = tuple(params["broadcast_dimensions"])
            if axes[:1] != (0,):
                value, axes = value[None], (0, *axes)
            return jax.lax.broadcast_in_dim(self._copies(value), params["shape"], axes)
        inputs[place] = self._copies(value)
        result: jax.Array = eqn.primitive.bind(*inputs, **params)
        return result

    def _copies(self, value: jax.Array) -> jax.Array:
        """Tapped copies (B, ...) of a value (1, ...)."""
        axes = string.ascii_lowercase[1 : value.ndim]
        held = jax.lax.stop_gradient(value)
        copies = jnp.broadcast_to(held, (self.num_rows, *value.shape[1:]))
        nothing = jnp.zeros((self.num_rows, 0), value.dtype)  # the rule takes no input
        return tap({"copies": Offset(f"a{axes}", axes)}, {"copies": value[0]}, nothing, copies, self.weights_B)


def _keeps_entries(eqn: Any) -> bool:
    """Whether the result holds entries of the operand, each at most once, in a dtype that is wide enough for a norm."""
    name = eqn.primitive.name
    if name == "broadcast_in_dim":
        return bool(eqn.outvars[0].aval.size == eqn.invars[0].aval.size)
    return name in _KEEP or (name == "convert_element_type" and is_wide_float(eqn.params["new_dtype"]))


def _gives_copies(eqn: Any, place: int, batch_size: int) -> bool:
    """Whether the operation repeats this operand along the result's first axis, which is that of the examples."""
    name, shape, out = eqn.primitive.name, eqn.invars[place].aval.shape, eqn.outvars[0].aval.shape
    if not out or out[0] != batch_size:
        return False
    if name == "broadcast_in_dim":
        axes = eqn.params["broadcast_dimensions"]
        return 0 not in axes or shape[0] == 1
    if name == "tile":
        return shape[0] == 1 and all(reps == 1 for reps in eqn.params["reps"][1:])
    return name in _ELEMENTWISE and len(shape) == len(out) and shape[0] == 1


def _opened(jaxpr: Any) -> Jaxpr:
    opened: Jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return opened
