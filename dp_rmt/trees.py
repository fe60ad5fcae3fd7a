"""Leaves of any pytree, found by path and widened to float32; a leaf is an array, a number or a shape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dp_rmt.types import Params


def leaves_by_path(tree: Params) -> list[tuple[str, Any]]:
    """Lists all leaves with their paths, such as ``"encoder/layers/query/kernel"``.

    Boxes are left out of the names: the kernel of a Flax nnx layer is called ``kernel`` and not ``kernel/value``, and
    so is a partitioned kernel of Flax linen.

    Raises:
      ValueError: two leaves have the same path, as in ``{"a/b": x, "a": {"b": y}}``.
    """
    found = [(name_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    if len(dict(found)) < len(found):
        paths = [path for path, _ in found]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"two leaves have the path {twice[0]!r}: a key that has a slash in it must be renamed")
    return found


def name_of(path: Sequence[Any]) -> str:
    """Writes a key path of JAX as this library does, with slashes.

    >>> name_of([jax.tree_util.DictKey("query"), jax.tree_util.DictKey("kernel"), jax.tree_util.GetAttrKey("value")])
    'query/kernel'
    """
    # A box is an attribute called "value". A key called "value" is a layer of attention.
    is_boxed = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
    return jax.tree_util.keystr(tuple(path[:-1] if is_boxed else path), simple=True, separator="/")


def shape_and_dtype(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, a number or a shape."""
    return jax.ShapeDtypeStruct(getattr(leaf, "shape", ()), jnp.result_type(leaf))


def wide(leaf: Any) -> Any:
    """The leaf in float32 or wider: a shape stays a shape, all else becomes an array."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(dtype=wide_dtype(leaf))
    return jnp.asarray(leaf, wide_dtype(leaf))


def wide_dtype(leaf: Any) -> jnp.dtype:
    """float32, or the dtype of the leaf where that is wider."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def wide_zeros_like(tree: Params) -> Params:
    """Zeros of the tree's shapes and shardings, float32 or wider; each is a buffer of its own and can be donated."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, wide_dtype(leaf)), tree)


def is_known(number: Any) -> bool:
    """Whether a number can be checked now; inside `jax.jit` a number of `optax.inject_hyperparams` has no value yet."""
    return not isinstance(number, jax.core.Tracer)


def split_params(params: Mapping[str, Any], trainable: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits nested dicts of parameters by a regular expression over their paths.

    Args:
      params: nested dicts of arrays.
      trainable: a regular expression. A leaf is trained if the expression matches somewhere in its path, such as
        ``encoder/layers/query/kernel``.

    Returns:
      ``(trained, frozen)``, nested dicts that share no leaf and together hold all; see `merge_params`.

    Raises:
      ValueError: the expression is broken or matches nothing.

    >>> split_params({"head": {"kernel": 1}, "embedding": 2}, "head")
    ({'head': {'kernel': 1}}, {'embedding': 2})
    """
    try:
        pattern = re.compile(trainable)
    except re.error as error:
        raise ValueError(f"trainable={trainable!r} is not a regular expression: {error}") from error
    trained: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    paths = []
    for path, leaf in leaves_by_path(params):
        paths.append(path)
        target = trained if pattern.search(path) else frozen
        *parents, name = path.split("/")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[name] = leaf
    if not trained:
        raise ValueError(f"trainable={trainable!r} matches no parameter; there are {', '.join(sorted(paths))}")
    return trained, frozen


def merge_params(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Puts together what `split_params` took apart.

    >>> merge_params({"head": {"kernel": 1}}, {"head": {"bias": 2}, "embedding": 3})
    {'head': {'kernel': 1, 'bias': 2}, 'embedding': 3}
    """
    merged = dict(trained)
    for name, value in frozen.items():
        if name in merged and not (isinstance(value, Mapping) and isinstance(merged[name], Mapping)):
            raise ValueError(f"parameter {name!r} is both trained and frozen")
        merged[name] = merge_params(merged[name], value) if name in merged else value
    return merged


def _placeholder_of_optax() -> type:
    """The type that `optax.tree_map_params` calls ``init`` with, in the place of parameters."""
    seen: list[type] = []

    def init(params: Params) -> tuple[()]:
        seen.append(type(params))
        return ()

    optax.tree_map_params(init, lambda leaf: leaf, ())
    return seen[0]


OPTAX_PLACEHOLDER = _placeholder_of_optax()
