"""The average of a run's iterates, which is published in the place of the last one."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dp_rmt.baselines.filters import KalmanState
from dp_rmt.trees import is_known, wide, wide_zeros_like
from dp_rmt.types import Params


class AverageState(NamedTuple):
    """State of `average_iterates`.

    Attributes:
      total_weight: ``1 + decay + ... + decay^(t-1)``, float32 scalar; 0 before the first update.
      average: the bias-corrected average of the iterates, in float32 at least; zeros before the first update.
    """

    total_weight: jax.Array
    average: Params


def average_iterates(decay: float) -> optax.GradientTransformation:
    """The exponential average of the iterates, kept beside them (Polyak & Juditsky 1992; De et al. 2022, 2204.13650).

    With ``x_t = params_t + updates_t``, the parameters after step t, in float32 at least,

        a_t = decay a_(t-1) + (1 - decay) x_t,      a_0 = 0,      average  a_t / (1 - decay^t).

    The updates pass unchanged, so this is the LAST stage of an optimizer: ``optax.chain(optax.adam(rate),
    average_iterates(0.9))``. The run goes on from the iterate; `averaged_params` gives the average, which is what
    `dp_rmt.training.train_state.Transforms.published` evaluates and saves. The average itself is kept, by the equal
    recursion ``(1 - w_t) average + w_t x_t`` with ``w_t = (1 - decay) / (1 - decay^t) = 1 / (1 + decay + ... +
    decay^(t-1))``, which has no difference of near numbers: after one step it is x_1 to the last bit, and x_t if decay
    is 0.

    The optimizer of a `dp_rmt.baselines.filters.kalman_filter` is averaged INSIDE the filter,
    ``kalman_filter(optax.chain(optax.adam(rate), average_iterates(0.9)))``: there params are the filter's iterates, and
    outside they are the points ahead of them.

    Formal guarantee: an average of iterates is computed from the iterates alone, which are computed from noisy
    gradients. It is post-processing and costs no privacy, whether the iterates are published beside it or not.

    Args:
      decay: the weight of all that was before, at least 0 and below 1; the average is over about 1 / (1 - decay) steps.

    Returns:
      An `optax.GradientTransformation` with an `AverageState`, which has one copy of the parameters.

    Raises:
      ValueError: decay is not in [0, 1); ``update`` raises it if it is not given the parameters.

    >>> optimizer = optax.chain(optax.sgd(1.0), average_iterates(0.5))
    >>> params = jnp.zeros(1)
    >>> state = optimizer.init(params)
    >>> for _ in range(2):
    ...     updates, state = optimizer.update(jnp.array([-3.0]), state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(params, averaged_params(state, params))  # (3 / 4 + 6 / 2) / (1 - 1 / 4)
    [6.] [5.]
    """
    if is_known(decay) and not 0 <= decay < 1:
        raise ValueError(
            f"average_iterates: decay must be at least 0 and below 1, got {decay}; 0 is the last iterate, and 1 would "
            "give it no weight"
        )

    def init(params: Params) -> AverageState:
        return AverageState(jnp.zeros([], jnp.float32), wide_zeros_like(params))

    def update(updates: Params, state: AverageState, params: Params | None = None):
        if params is None:
            raise ValueError(
                "average_iterates averages the parameters, and its update was not given them: call "
                "update(updates, state, params)"
            )
        total = 1 + decay * state.total_weight

        def average(before: jax.Array, param: jax.Array, update: jax.Array) -> jax.Array:
            weight = (1 / total).astype(before.dtype)
            return (1 - weight) * before + weight * (wide(param) + wide(update))

        return updates, AverageState(total, jax.tree.map(average, state.average, params, updates))

    return optax.GradientTransformation(init, update)


def averaged_params(state: optax.OptState, params: Params) -> Params:
    """Takes the average of the iterates, to evaluate and publish, out of the state of an optimizer.

    Args:
      state: an `AverageState`, or the state of transformations of any depth, one of which is `average_iterates`.
      params: the iterate.

    Returns:
      The average, in the dtypes of the iterate. Before the first update it is the iterate.

    Raises:
      ValueError: there is no average or more than one, or it is one of the points ahead of a Kalman filter's iterates.
    """
    found = _states(state, AverageState)
    if len(found) != 1:
        raise ValueError(
            f"averaged_params: the state of the optimizer has {len(found)} averages, not one: let average_iterates be "
            "the last stage of the optimizer, optax.chain(..., average_iterates(decay))"
        )
    filters = _states(state, KalmanState)
    if filters and not any(_states(kept.optimizer, AverageState) for kept in filters):
        raise ValueError(
            "averaged_params: the average is of the points where a Kalman filter differentiates, and they are ahead of "
            "its iterates: average inside the filter, kalman_filter(optax.chain(..., average_iterates(decay)))"
        )
    (kept,) = found
    return jax.tree.map(
        lambda x, mean: jnp.where(kept.total_weight == 0, x, mean.astype(jnp.result_type(x))), params, kept.average
    )


def _states(tree: optax.OptState, kind: type) -> list:
    is_kind = lambda node: isinstance(node, kind)  # noqa: E731
    return [node for node in jax.tree.leaves(tree, is_leaf=is_kind) if is_kind(node)]
