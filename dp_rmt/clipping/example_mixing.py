"""Checks the law that no operation mixes examples, by a data-flow analysis of a traced computation.

A clipped gradient bounds what one example adds to the sum only if the example enters nowhere else. If the loss of
example i also depends on example j, then j adds to the gradient of i, and no norm of j's gradient knows of it. Batch
normalisation, losses that are divided by the batch's number of tokens, and negatives taken from the batch all do that.

The losses are traced with a batch size that is a prime, of which no other axis is a multiple. Every array that depends
on the batch must keep exactly one axis that is a multiple of the prime, and each entry along it must belong to one
known example. A sum over the batch leaves no such axis; the scores of all pairs leave two. This test is blind to
operations that keep the axis and mix along it, such as a running sum, a sort, a contraction or an index. For those
`dp_rmt.clipping.batch_axis` has rules.

The analysis does not see everything. An operation without a rule, such as a kernel of one's own or a callback to the
host, is judged by the shapes of its results alone. A derivative that a user defines by `jax.custom_vjp` is trusted to
mix no more than its function does. Under `jax.shard_map` the mesh of the trace counts, and that mesh cannot divide a
prime batch.

These harmless computations are reported; the table says what to write instead:

| reported                                    | instead                                                  |
|---------------------------------------------|----------------------------------------------------------|
| `jax.lax.map(f, examples, batch_size=16)`   | `jax.vmap(f)(examples)` or `jax.lax.map(f, examples)`    |
| a loop until all examples have converged    | `jax.vmap` of a loop, or a fixed number of iterations    |
| convolution with a kernel for each example  | `jax.lax.map` over the examples                          |
| `x[order]` with an order that moves nothing | `x`; `jnp.take_along_axis` for one entry of each example |
| a table that happens to have 2 * 7919 rows  | one row more, or another prime                           |
"""

from __future__ import annotations

import dataclasses
import os
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any

from jax.extend.core import Jaxpr, Var
from jax.extend.source_info_util import summarize
from jax.interpreters.partial_eval import dce_jaxpr

from dp_rmt.clipping.batch_axis import OF_THE_ITERATION, Layout, MixingError, Value, after, batch_axes, only_axis, shown


def mixed_examples(jaxpr: Jaxpr, *, batch_size: int, depends_on_batch: Sequence[bool]) -> str | None:
    """Says where a computation lets one example influence what belongs to another, if it does.

    Args:
      jaxpr: what is computed, ``jax.make_jaxpr(losses)(params, batch).jaxpr``. What its results do not need, such as a
        metric that is thrown away, is ignored.
      batch_size: the size of the traced batch, a prime such as 7919 of which no other axis is a multiple.
      depends_on_batch: for each input of the jaxpr, whether it holds the batch (in its first axis).

    Returns:
      None, or one line that names the operation, the shapes of its operands, its line in the user's file, what is wrong
      with it and what to write instead.

    >>> import jax, jax.numpy as jnp
    >>> def report(losses):
    ...     jaxpr = jax.make_jaxpr(losses)(jnp.ones((7919, 3))).jaxpr
    ...     return mixed_examples(jaxpr, batch_size=7919, depends_on_batch=[True])
    >>> report(lambda x: jnp.sum(x, axis=1))
    >>> report(lambda x: jnp.sum(x - jnp.mean(x, axis=0), axis=1))
    'reduce_sum of (batch, 3) at ...'
    """
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    values = []
    for var, depends in zip(jaxpr.invars, depends_on_batch, strict=True):
        shape = getattr(var.aval, "shape", ())
        if depends and batch_axes(shape, batch_size) != [0]:
            return (
                f"an input that holds the batch has shape {shown(shape, batch_size)}: its first axis must be the batch "
                f"axis, and no other axis a multiple of {batch_size}"
            )
        values.append(Value(Layout(0) if depends else None))
    try:
        _Analysis(batch_size).walk(jaxpr, values)
    except _Report as report:
        return f"{report.operation} at {report.line or 'a line that is not in the trace'} {report.reason}"
    return None


class _Report(Exception):
    """What `mixed_examples` returns. The line is empty if the operation lies within a library's jitted function."""

    def __init__(self, operation: str, line: str, reason: str) -> None:
        self.operation, self.line, self.reason = operation, line, reason


@dataclasses.dataclass(frozen=True)
class _Analysis:
    """The analysis, which goes through a jaxpr forwards."""

    batch: int
    bound: frozenset[str] = frozenset()  # the device axes that a shard_map within the losses has introduced

    def walk(self, jaxpr: Any, values: Sequence[Value]) -> list[Value]:
        """Says what is known of the outputs of a jaxpr, given what is known of its inputs."""
        jaxpr = _opened(jaxpr)
        known = dict(zip(jaxpr.invars, values, strict=True))

        def lookup(atoms: Iterable[Any]) -> list[Value]:
            return [known.get(atom, Value()) if isinstance(atom, Var) else Value() for atom in atoms]

        for eqn in jaxpr.eqns:
            operands = lookup(eqn.invars)
            try:
                outs = self.equation(eqn, operands)
                for var, out in zip(eqn.outvars, outs):
                    if out.layout is not None and out.layout != OF_THE_ITERATION:
                        only_axis(_shape(var), self.batch)
            except MixingError as error:
                raise _Report(self.operation(eqn, operands), _line(eqn), str(error)) from None
            except _Report as report:
                report.line = report.line or _line(eqn)
                raise
            known.update(zip(eqn.outvars, outs, strict=True))
        return lookup(jaxpr.outvars)

    def equation(self, eqn: Any, values: list[Value]) -> list[Value]:
        name, params = eqn.primitive.name, eqn.params
        if name in ("optimization_barrier", "device_put"):  # they take many arrays at once
            return values
        if name == "custom_linear_solve":
            skipped = sum(params["const_lengths"][:2])
            matrices, rest = values[skipped : skipped + params["const_lengths"].solve], sum(params["const_lengths"])
            return self.walk(params["jaxprs"].solve, matrices + values[rest:])
        if name in ("cond", "while", "scan"):
            return {"cond": self.cond, "while": self.while_loop, "scan": self.scan}[name](eqn, values)
        if name == "shard_map":
            inside = dataclasses.replace(self, bound=self.bound | set(params["mesh"].axis_names))
            return inside.walk(params["jaxpr"], values)
        for body in (_opened(params[key]) for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params):
            # A body with other inputs, such as the combiner of a reduction or a kernel, is not called with the
            # operands.
            if body is not None and [_shape(v) for v in body.invars] == [_shape(v) for v in eqn.invars]:
                return self.walk(body, values)
        axes = params.get("axes", params.get("axis_name", ()))
        names = {axis for axis in (axes if isinstance(axes, tuple) else (axes,)) if isinstance(axis, str)}
        if names - self.bound and name not in ("pvary", "pcast") and any(v.layout is not None for v in values):
            raise MixingError(f"reads from the other devices along {sorted(names)}, whose examples are others")
        return after(eqn, values, self.batch)

    def cond(self, eqn: Any, values: list[Value]) -> list[Value]:
        outs = [self.walk(branch, values[1:]) for branch in eqn.params["branches"]]
        # A predicate is a scalar. If it depends on the batch, it is that of one iteration of a loop over the examples.
        return [reduce(_joined, out, values[0]) for out in zip(*outs)]

    def while_loop(self, eqn: Any, values: list[Value]) -> list[Value]:
        num_test, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        test_consts, body_consts = values[:num_test], values[num_test : num_test + num_body]

        def step(carry: list[Value]) -> list[Value]:
            outs = self.walk(eqn.params["body_jaxpr"], body_consts + carry)
            (runs_on,) = self.walk(eqn.params["cond_jaxpr"], test_consts + carry)
            if runs_on.layout is None or runs_on.layout == OF_THE_ITERATION:
                return [_joined(out, runs_on) for out in outs]
            # Under jax.vmap each example has its own predicate, and the example's entries of the carry stop with it.
            axes = [only_axis(_shape(var), self.batch) for var in eqn.outvars]
            return [_joined(out, Value(runs_on.layout._replace(axis=axis))) for out, axis in zip(outs, axes)]

        return _fixed_point(step, values[num_test + num_body :])

    def scan(self, eqn: Any, values: list[Value]) -> list[Value]:
        body = _opened(eqn.params["jaxpr"])
        # The operands are constants, carry, and what is scanned over. They are told apart by rank, since the names of
        # the parameters change with JAX.
        num_carry = sum(len(_shape(a)) == len(_shape(b)) for a, b in zip(eqn.outvars, body.outvars))
        num_scanned = sum(len(_shape(a)) > len(_shape(b)) for a, b in zip(eqn.invars, body.invars))
        num_consts = len(values) - num_carry - num_scanned
        consts, scanned = values[:num_consts], values[num_consts + num_carry :]
        over_batch = {v.layout.inner for v in scanned if v.layout is not None and v.layout.axis == 0}
        if len(over_batch) > 1:
            raise MixingError("runs over axes that were merged in different orders")

        def outs(carry: list[Value]) -> list[Value]:
            return self.walk(body, [*consts, *carry, *[_slice_of(v) for v in scanned]])

        def step(carry: list[Value]) -> list[Value]:
            new = outs(carry)[:num_carry]
            if over_batch and any(v.layout == OF_THE_ITERATION for v in new):
                raise MixingError("carries something from one example to the next: use jax.vmap over the examples")
            return new

        carry = _fixed_point(step, values[num_consts : num_consts + num_carry])
        return carry + [_stacked(v, *over_batch) for v in outs(carry)[num_carry:]]

    def operation(self, eqn: Any, values: Sequence[Value]) -> str:
        """The operation and the shapes of what depends on the batch, in words."""
        shapes = [shown(_shape(a), self.batch) for a, value in zip(eqn.invars, values) if value.layout is not None]
        return f"{eqn.primitive.name} of {' and '.join(shapes[:3])}{' and others' * (len(shapes) > 3)}"


def _slice_of(value: Value) -> Value:
    """What is known of one iteration's part of what is scanned over."""
    if value.layout is None or value.layout == OF_THE_ITERATION:
        return Value(value.layout)
    axis, inner = value.layout
    return Value(OF_THE_ITERATION if axis == 0 else Layout(axis - 1, inner))


def _stacked(value: Value, inner: int | None = None) -> Value:
    """What is known of all iterations' results. `inner` is that of the layout of a loop over the examples."""
    if value.layout is None:
        return Value()
    if value.layout == OF_THE_ITERATION:
        return Value(value.layout if inner is None else Layout(0, inner))
    return Value(value.layout._replace(axis=value.layout.axis + 1))


def _fixed_point(step: Callable[[list[Value]], list[Value]], start: list[Value]) -> list[Value]:
    """What is known of the carry of a loop, whatever the number of iterations is."""
    carry = [Value(v.layout) for v in start]
    while (new := [_joined(old, out) for old, out in zip(carry, step(carry))]) != carry:
        carry = new
    return carry


def _joined(a: Value, b: Value) -> Value:
    """What is known of an array that is one of two."""
    if a.layout is not None and b.layout is not None and a.layout != b.layout:
        raise MixingError("gives an array whose batch axis is here in one place and there in another")
    return Value(b.layout if a.layout is None else a.layout)


# If the path of a frame starts with one of these, the line is not the user's.
_LIBRARIES = (
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
    *{sysconfig.get_path(k) for k in ("purelib", "platlib", "stdlib")},
)


def _line(eqn: Any) -> str:
    frames = summarize(eqn.source_info, num_frames=1000).split("\n")  # the innermost last
    return next((frame for frame in reversed(frames) if not frame.startswith(_LIBRARIES)), "")


def _shape(atom: Any) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())


def _opened(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)  # of a ClosedJaxpr
