"""Follows the batch axis of arrays through one operation, and checks that each entry still belongs to one example.

`dp_rmt.clipping.example_mixing` walks a computation with these rules. The batch size is a prime that no other axis is a
multiple of. Reshaping and concatenating make axes that hold several batches, so a `Layout` says to whom an entry
belongs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Layout(NamedTuple):
    """Entry i along ``axis`` belongs to example ``(i // inner) % batch``."""

    axis: int
    inner: int = 1


OF_THE_ITERATION = Layout(-1)
"""The layout in the body of a loop over the examples: every entry belongs to the example of the iteration."""


class Value(NamedTuple):
    """What is known of an array. If the layout is None, the batch has no influence on it."""

    layout: Layout | None = None
    counts: int | None = None  # the axis, one that may hold the batch, along which each entry is its own position
    never: bool = False  # False everywhere
    columns: tuple[int | None, ...] = ()  # `counts` of each column, in an array of index vectors


class MixingError(Exception):
    """The entries of an operation's result do not belong to one example each; the message says why."""


def batch_axes(shape: Sequence[int], batch: int) -> list[int]:
    """The axes that can hold the batch: those whose size is a multiple of it."""
    return [axis for axis, size in enumerate(shape) if size and size % batch == 0]


def shown(shape: Sequence[int], batch: int) -> str:
    """A shape in words.

    >>> shown((7919, 3, 2 * 7919), 7919)
    '(batch, 3, 2*batch)'
    """
    names = [str(n) if n == 0 or n % batch else "batch" if n == batch else f"{n // batch}*batch" for n in shape]
    return f"({', '.join(names)})"


def only_axis(shape: Sequence[int], batch: int) -> int:
    """The axis that holds the batch in an array that depends on it; raises MixingError unless there is exactly one."""
    axes = batch_axes(shape, batch)
    if not axes:
        raise MixingError(
            f"has a result of shape {shown(shape, batch)}, which belongs to no single example: compute it for each "
            "example on its own (write the loss of one example and jax.vmap it)"
        )
    if len(axes) > 1:
        raise MixingError(
            f"has a result of shape {shown(shape, batch)}, which sets examples against each other: compare each "
            f"example only with itself and with parameters (or avoid sizes that are multiples of {batch})"
        )
    return axes[0]


def after(eqn: Any, values: Sequence[Value], batch: int) -> list[Value]:
    """Says what is known of the results of an operation that is neither a call nor a loop.

    Args:
      eqn: the equation of a jaxpr.
      values: one value for each operand.
      batch: the batch size.

    Returns:
      One value for each result.

    Raises:
      MixingError: one example influences what belongs to another example, or to none.
    """
    outs = _positions(eqn, values, batch)
    operands = [(atom.aval.shape, v.layout) for atom, v in zip(eqn.invars, values) if v.layout is not None]
    if not operands:
        return outs
    if any(hasattr(atom.aval, "inner_aval") for atom in eqn.invars):
        raise MixingError("writes to or reads from a mutable array, which cannot be followed: return values instead")
    in_loop = [layout == OF_THE_ITERATION for _, layout in operands]
    if all(in_loop):
        return [out._replace(layout=OF_THE_ITERATION) for out in outs]
    if any(in_loop):
        raise MixingError("combines the example of one iteration of a loop with all examples of the batch")
    name = "scatter" if eqn.primitive.name.startswith("scatter") else eqn.primitive.name  # scatter-add, ...
    if name in _RULES_OF_ONE:
        inner = _RULES_OF_ONE[name](eqn, operands[0][1], batch)
    else:
        inner = _RULES.get(name, _acts_along)(eqn, values, batch)
    layouts = [_by_shape(var.aval.shape, operands, batch, inner) for var in eqn.outvars]
    return [out._replace(layout=layout) for out, layout in zip(outs, layouts)]


def _by_shape(shape: Sequence[int], operands: list[tuple[Any, Layout]], batch: int, inner: int | None) -> Layout | None:
    """The rule for all operations: exactly one batch axis remains, with the layout of the operands."""
    if 0 in shape:  # it belongs to nobody
        return None
    axis = only_axis(shape, batch)
    inners = {layout.inner for old, layout in operands if old[layout.axis] == shape[axis]}
    if inner is None and len(inners) == 1:
        (inner,) = inners
    if inner is None or shape[axis] % (batch * inner):
        raise MixingError("merges axes in different orders, so that entries of different examples meet")
    return Layout(axis, inner)


# ---- Operations for which the shape of the result does not tell -----------------------------------------------------
# Each rule raises MixingError or returns the `inner` of the results' layouts. None means the `inner` of the operands
# whose batch axis has the same size.

_OF_MATRICES = {
    *("cholesky", "eig", "eigh", "geqrf", "hessenberg", "householder_product", "lu", "ormqr", "qr", "schur", "svd"),
    *("triangular_solve", "tridiagonal", "tridiagonal_solve"),
}


def _axes_acted_along(eqn: Any, operand: int) -> set[int]:
    """The axes of an operand along which entries meet or move although the axis remains."""
    name, params, shapes = eqn.primitive.name, eqn.params, [atom.aval.shape for atom in eqn.invars]
    axes = range(len(shapes[operand]))
    if "window_dimensions" in params:  # pooling
        windows = zip(params["window_dimensions"], params["window_strides"], params["padding"])
        return {axis for axis, (size, stride, pad) in enumerate(windows) if (size, stride, *pad) != (1, 1, 0, 0)}
    if name == "conv_general_dilated":
        kept = operand == 0 and params["batch_group_count"] == 1
        return {*axes} - ({params["dimension_numbers"].lhs_spec[0]} if kept else set())
    if name == "dot_general":
        return set(params["dimension_numbers"][0][operand])
    if name == "fft":
        return set(axes[len(axes) - len(params["fft_lengths"]) :])
    if name in _OF_MATRICES:  # all axes but the last two are independent; vectors have one axis less
        return set(axes[max(map(len, shapes)) - 2 :])
    if name == "rev":
        return set(params["dimensions"])
    if name in ("sort", "approx_top_k", "top_k") or name.startswith("cum"):
        along = {"sort": "dimension", "approx_top_k": "reduction_dimension"}.get(name, "axis")
        return {axes[params.get(along, -1)]}
    if name == "pad":
        return {axis for axis, config in enumerate(params["padding_config"]) if any(config)}
    if (name, operand) in (("dynamic_slice", 0), ("dynamic_update_slice", 1)):
        part = params["slice_sizes"] if operand == 0 else shapes[1]
        return {axis for axis in axes if part[axis] != shapes[0][axis]}
    return set()


def _acts_along(eqn: Any, values: Sequence[Value], batch: int) -> int | None:
    for operand, value in enumerate(values):
        if value.layout is not None and value.layout.axis in _axes_acted_along(eqn, operand):
            raise MixingError(
                f"acts along the batch axis, number {value.layout.axis}: act along another, or take it all"
            )
    return None


def _random_bits(eqn: Any, layout: Layout, batch: int) -> int | None:
    kind = eqn.invars[0].aval.dtype.name
    if kind != "key<fry>":
        raise MixingError(
            f"of a {kind} for each example draws the bits of all from the key of the first: use threefry keys, "
            "jax.random.key(seed, impl='threefry2x32')"
        )
    return layout.inner


def _reshape(eqn: Any, layout: Layout, batch: int) -> int | None:
    new = eqn.outvars[0].aval.shape
    moved = _reshaped(eqn.invars[0].aval.shape, new, layout, batch)
    if moved is None:
        raise MixingError(
            f"to {shown(new, batch)} lets entries of different examples take turns: keep the order of the axes, and "
            "change it with jnp.transpose"
        )
    return moved.inner


def _reshaped(old: Sequence[int], new: Sequence[int], layout: Layout, batch: int) -> Layout | None:
    # In row-major order, `stride` consecutive entries belong to one example.
    stride = layout.inner * math.prod(old[layout.axis + 1 :])
    for axis in batch_axes(new, batch):
        below = math.prod(new[axis + 1 :])
        if below and stride % below == 0 and (below * new[axis]) % (stride * batch) == 0:
            return Layout(axis, stride // below)
    return None


def _slice(eqn: Any, layout: Layout, batch: int) -> int | None:
    (axis, inner), old = layout, eqn.invars[0].aval.shape
    start, limit = eqn.params["start_indices"][axis], eqn.params["limit_indices"][axis]
    stride = (eqn.params["strides"] or (1,) * len(old))[axis]
    if stride == 1 and start % (batch * inner) == limit % (batch * inner) == 0:
        return inner
    if inner % stride == 0 and start < stride and eqn.outvars[0].aval.shape[axis] * stride == old[axis]:
        return inner // stride
    raise MixingError("takes a part of the batch axis, whose entries then do not line up with the examples: take all")


def _concatenate(eqn: Any, values: Sequence[Value], batch: int) -> int | None:
    layouts = {v.layout for v in values if v.layout is not None}
    if len(layouts) > 1:
        raise MixingError("joins arrays whose axes were merged in different orders")
    (axis, inner), along = layouts.pop(), eqn.params["dimension"]
    if axis == along and any(atom.aval.shape[along] % (batch * inner) for atom in eqn.invars):
        raise MixingError("joins parts of batches along the batch axis: join whole batches")
    return inner


_BY_POSITION = (
    "picks entries by their position along the batch axis: for x[jnp.arange(batch), i] with other indices, write "
    "jnp.take_along_axis(x, i[:, None], axis=1), and do not shuffle within the loss"
)


def _gather(eqn: Any, values: Sequence[Value], batch: int) -> int | None:
    layout, shape, numbers = values[0].layout, eqn.invars[0].aval.shape, eqn.params["dimension_numbers"]
    if layout is None or layout.axis in numbers.operand_batching_dims:
        return None
    size = shape[layout.axis]
    whole = eqn.params["slice_sizes"][layout.axis] == size
    if not whole and not _own_position(layout.axis, size, numbers.start_index_map, eqn.invars[1].aval.shape, values[1]):
        raise MixingError(_BY_POSITION)
    return None


def _scatter(eqn: Any, values: Sequence[Value], batch: int) -> int | None:
    shape, numbers = eqn.outvars[0].aval.shape, eqn.params["dimension_numbers"]
    axis, indices, updates = only_axis(shape, batch), values[1].layout, values[2].layout
    others = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    if (indices is None and updates is None) or axis in numbers.operand_batching_dims:
        return None
    if axis in others:
        indexed = numbers.scatter_dims_to_operand_dims
        in_place = _own_position(axis, shape[axis], indexed, eqn.invars[1].aval.shape, values[1])
    else:
        window = numbers.update_window_dims[[k for k in range(len(shape)) if k not in others].index(axis)]
        in_place = indices is None and eqn.invars[2].aval.shape[window] == shape[axis]
    if not in_place:
        raise MixingError(_BY_POSITION)
    return None


def _own_position(axis: int, size: int, indexed: Sequence[int], shape: Sequence[int], indices: Value) -> bool:
    """Tells whether each index vector holds its own position for ``axis``, along an axis of the indices."""
    return any(d == axis and c is not None and shape[c] == size for d, c in zip(indexed, indices.columns))


_RULES_OF_ONE: dict[str, Callable[[Any, Layout, int], int | None]] = {
    "random_bits": _random_bits,
    "reshape": _reshape,
    "slice": _slice,
    # These are whole batches, or what is known from their sizes.
    "split": lambda eqn, layout, batch: layout.inner,
    "tile": lambda eqn, layout, batch: layout.inner,
}
_RULES: dict[str, Callable[[Any, Sequence[Value], int], int | None]] = {
    "concatenate": _concatenate,
    "gather": _gather,
    "scatter": _scatter,
}


# ---- jnp.arange(batch) as an index ----------------------------------------------------------------------------------

_WIDE_INTEGERS = (np.int32, np.int64, np.uint32)  # in narrower integers positions wrap around


def _positions(eqn: Any, values: Sequence[Value], batch: int) -> list[Value]:
    """Follows ``jnp.arange(batch)`` through what NumPy indexing makes of it; layouts are not filled in."""
    name, params, known = eqn.primitive.name, eqn.params, Value()
    first = values[0] if values else Value()
    if (
        name == "iota"
        and params["dimension"] in batch_axes(params["shape"], batch)
        and params["dtype"] in _WIDE_INTEGERS
    ):
        known = Value(counts=params["dimension"])
    elif name == "lt" and first.counts is not None:  # negative indices count from the end
        known = Value(never=bool(np.array_equal(getattr(eqn.invars[1], "val", 1), 0)))
    elif name == "select_n" and first.never:
        known = values[1]
    elif name == "concatenate" and params["dimension"] == eqn.outvars[0].aval.ndim - 1:
        widths = [atom.aval.shape[-1] for atom in eqn.invars]
        known = Value(columns=tuple(c for v, n in zip(values, widths) for c in [v.counts if n == 1 else None] * n))
    elif first.counts is not None and name in ("broadcast_in_dim", "reshape", "squeeze", "convert_element_type"):
        old, new, axis = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape, None
        if name == "broadcast_in_dim":
            axis = params["broadcast_dimensions"][first.counts]
        elif eqn.outvars[0].aval.dtype in _WIDE_INTEGERS:
            place = old[first.counts], math.prod(old[first.counts + 1 :])
            axis = next((k for k, size in enumerate(new) if (size, math.prod(new[k + 1 :])) == place), None)
        known = Value(counts=axis, columns=(axis,) if new[-1] == 1 else ())
    return [known, *[Value()] * (len(eqn.outvars) - 1)] if eqn.outvars else []
