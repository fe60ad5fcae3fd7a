"""Floating-point operations of the matrix products of a program, counted in its jaxpr.

XLA's `cost_analysis` counts the body of a loop once, however often it runs; the layers of a scanned model, and
microbatches, are such bodies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval


def matrix_flops(jaxpr: ClosedJaxpr, *, while_trips: int = 1) -> int:
    """Twice the multiply-adds of all `dot_general` whose results are used.

    Args:
      jaxpr: the program, as ``jax.make_jaxpr`` or ``jax.jit(f).trace(...).jaxpr`` gives it.
      while_trips: how often the body of a `while` loop runs; a jaxpr tells that of a `scan` only.

    Returns:
      The number of operations. Of the branches of a `cond`, the most expensive counts.

    >>> import jax, jax.numpy as jnp
    >>> matrix_flops(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5))))
    60
    """
    live, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _count(live, while_trips)


def _count(jaxpr: Jaxpr, while_trips: int) -> int:
    return sum(_count_equation(equation, while_trips) for equation in jaxpr.eqns)


def _count_equation(equation: JaxprEqn, while_trips: int) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        operand, product = _shape(equation.invars[0]), _shape(equation.outvars[0])
        return 2 * math.prod(product) * math.prod(operand[axis] for axis in contracted)
    inner = [_count(jaxpr, while_trips) for jaxpr in _jaxprs(list(equation.params.values()))]
    if name == "cond":
        return max(inner)
    trips: dict[str, int] = {"while": while_trips, "scan": equation.params.get("length", 1)}
    return sum(inner) * trips.get(name, 1)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)
