"""Checks what a clipped gradient is called with: leaves that share their leading axis, and a mask of the padding.

The loss would broadcast an array of another length without a complaint. One row of it would then belong to all
examples, and no clip norm would bound what it adds. These checks find what is wrong before the loss is traced.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dp_rmt.types import Batch


def num_examples(batch: Batch) -> int:
    """The length of the leading axis that all leaves of a batch share.

    Args:
      batch: a pytree of arrays (batch, ...), which may be typed PRNG keys.

    Returns:
      The number of examples in the batch, padding included.

    Raises:
      ValueError: the batch has no leaves, a leaf is not an array or has no axis, or leaves differ in their leading
        axis.

    >>> num_examples({"x": jnp.ones((8, 3)), "y": jnp.ones(8)})
    8
    >>> num_examples({"x": jnp.ones((8, 3)), "y": jnp.ones(1)})
    Traceback (most recent call last):
    ValueError: batch['y'] has shape (1,), but 8 examples are in batch['x'] of shape (8, 3): ...
    """
    leaves = [(f"batch{jax.tree_util.keystr(path)}", leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(batch)]
    if not leaves:
        raise ValueError(f"the batch {batch!r} has no arrays: give at least one whose first axis is the examples")
    for name, leaf in leaves:
        if getattr(leaf, "shape", ()) == ():
            what = "no axis" if hasattr(leaf, "shape") else f"type {type(leaf).__name__}"
            raise ValueError(
                f"{name} has {what}, but every leaf of a batch is an array whose first axis is the examples: give each "
                "example its own (jnp.full(batch_size, value)), or close over what all examples share"
            )
    # The length that most leaves have is taken as the right one; of several such lengths, the longest.
    lengths: list[int] = [leaf.shape[0] for _, leaf in leaves]
    size = max(lengths, key=lambda length: (lengths.count(length), length))
    agreeing = next(f"{name} of shape {leaf.shape}" for name, leaf in leaves if leaf.shape[0] == size)
    for name, leaf in leaves:
        if leaf.shape[0] != size:
            raise ValueError(
                f"{name} has shape {leaf.shape}, but {size} examples are in {agreeing}: every leaf of a batch must "
                "have the examples as its first axis. The loss would broadcast it, and one example could then change "
                "the gradients of all; close over what all examples share"
            )
    return size


def users_and_rows(batch: Batch) -> tuple[int, int]:
    """The two leading axes that all leaves of a batch of users share: users, and the rows of each.

    Args:
      batch: a pytree of arrays (users, rows, ...).

    Returns:
      The number of users in the batch and the rows that each has room for, padding included.

    Raises:
      ValueError: as in `num_examples`, for either axis.

    >>> users_and_rows({"x": jnp.ones((8, 2, 3)), "y": jnp.ones((8, 2))})
    (8, 2)
    """
    num_users = num_examples(batch)
    rows = {
        f"batch{jax.tree_util.keystr(path)} of shape {leaf.shape}": leaf.shape[1] if leaf.ndim > 1 else 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    if len(sizes := {*rows.values()}) > 1 or any(leaf.ndim < 2 for leaf in jax.tree.leaves(batch)):
        raise ValueError(
            f"{'; '.join(rows)}: every leaf of a batch of users has the users as its first axis and the rows of each "
            "user as its second, of one length; gather the batch by the indices (users, rows) of UserSampling"
        )
    return num_users, sizes.pop()


def row_weights(is_padding_row: jax.Array) -> jax.Array:
    """What each row of a user counts in the user's mean: 1 over the user's rows, and 0 for padding.

    >>> row_weights(jnp.array([[False, False, True], [True, True, True]])).tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    """
    count = jnp.sum(~is_padding_row, axis=1, keepdims=True)
    return jnp.where(is_padding_row, 0.0, 1.0 / jnp.maximum(count, 1))


def padding_mask(is_padding_example: Any, *shape: int) -> jax.Array:
    """Checks the mask of a batch's padding and returns it.

    Args:
      is_padding_example: boolean (batch,), True for padding; None if no row can be padding.
      *shape: the number of examples in the batch; or of users, and of rows of each.

    Returns:
      The mask, boolean of that shape.

    Raises:
      ValueError: the mask is not boolean, or has another shape.

    >>> padding_mask(None, 2).tolist()
    [False, False]
    """
    if is_padding_example is None:
        return jnp.zeros(shape, bool)
    mask = jnp.asarray(is_padding_example)
    if mask.dtype != bool:
        raise ValueError(
            f"is_padding_example must be boolean, True for padding, got {mask.dtype} of shape {mask.shape}: give "
            "`indices < 0` for the indices of PoissonSampling, or None where no row can be padding"
        )
    if mask.shape != shape:
        entries = f"{shape[0]} examples" if len(shape) == 1 else f"{shape[1]} rows of each of {shape[0]} users"
        raise ValueError(
            f"is_padding_example must have one entry for each of the {entries} of the batch, got shape {mask.shape}"
        )
    return mask
