"""Type aliases that every floor shares, and a check of the numbers that they may hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Params = Any
"""A pytree of arrays: the parameters that are trained, or anything shaped like them (gradients, updates)."""

Batch = Any
"""A pytree of arrays that share their leading axis, the examples of one batch."""

PerExampleLosses = Callable[[Params, Batch], jax.Array]
"""``(params, batch) -> (batch,)``: one loss per example; no example may influence another's loss."""

Unit = Literal["example", "user"]
"""Whose gradient is clipped as one, and whose privacy that is: a row's, or that of a user with several rows."""


def check_leaves_are_real(tree: Params, name: str) -> None:
    """Raises ValueError, naming the leaf, unless all leaves are real floating point of 16 bits or more.

    Norms and noise of real numbers would count the two coordinates of a complex entry as one. Integers have no
    gradient. JAX has no rules of promotion for arithmetic with 8-bit floats.

    Args:
      tree: parameters or updates.
      name: what the message calls the tree.

    >>> check_leaves_are_real({"w": jnp.ones(2, jnp.bfloat16)}, "params")
    >>> check_leaves_are_real({"w": jnp.ones(2, jnp.complex64)}, "params")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: params['w'] is complex64, but clipping and noise are for real floating-point numbers of 16 bits ...
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not (jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is {dtype}, but clipping and noise are for real floating-point "
                "numbers of 16 bits or more. Take real and imaginary parts as two leaves, and close over integers and "
                "flags instead of training them"
            )
