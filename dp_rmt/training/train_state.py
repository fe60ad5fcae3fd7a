"""What a training run carries from step to step, and the split into trained and frozen parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dp_rmt.baselines.filters import KalmanState, without_look_ahead
from dp_rmt.trees import leaves_by_path
from dp_rmt.types import Params


@dataclasses.dataclass(frozen=True)
class Transforms:
    """The three stages between a clipped gradient and a parameter update.

    Attributes:
      noise: `dp_rmt.add_gaussian_noise`; the boundary between private and public.
      denoise: `dp_rmt.denoise_matrices`, or `optax.identity()`.
      optimizer: any optax optimizer.
    """

    noise: optax.GradientTransformation
    denoise: optax.GradientTransformation
    optimizer: optax.GradientTransformation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree; everything that a checkpoint must hold besides the sampler's seed.

    Attributes:
      step: updates done, int32 scalar.
      params: trained parameters, float32.
      frozen: parameters that are never differentiated, clipped, noised or updated.
      noise: `GaussianNoiseState` (secret).
      denoise: state of the denoiser.
      optimizer: state of the optimizer.
    """

    step: jax.Array
    params: Params
    frozen: Params
    noise: Any
    denoise: Any
    optimizer: Any

    @classmethod
    def create(cls, transforms: Transforms, params: Params, frozen: Params) -> TrainState:
        """The state before the first step."""
        return cls(
            step=jnp.zeros([], jnp.int32),
            params=params,
            frozen=frozen,
            noise=transforms.noise.init(params),
            denoise=transforms.denoise.init(params),
            optimizer=transforms.optimizer.init(params),
        )


def published_params(state: TrainState) -> dict[str, Any]:
    """All parameters, trained and frozen, as they are evaluated and saved.

    They are the state's own, but for an optimizer that differentiates ahead of its iterate (`kalman_filter`): then
    those of the iterate.
    """
    params = state.params
    is_ahead = lambda node: isinstance(node, KalmanState)  # noqa: E731
    for node in filter(is_ahead, jax.tree.leaves(state.optimizer, is_leaf=is_ahead)):
        params = without_look_ahead(node, params)
    return merge_params(params, state.frozen)


def split_params(params: Mapping[str, Any], trainable: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits nested dicts of parameters by a regular expression over their paths.

    Args:
      params: nested dicts of arrays.
      trainable: a leaf is trained if this matches somewhere in its path, such as ``encoder/layers/query/kernel``.

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
