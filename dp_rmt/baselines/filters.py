"""Filters of noisy updates over the steps of a run. They remove privacy noise in another way, at no cost of privacy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import signal

from dp_rmt.trees import is_known, wide, wide_zeros_like
from dp_rmt.types import Params

_CHECKED_STEPS = 1000


class LowPassState(NamedTuple):
    """State of `low_pass_filter`; K is the larger of the orders of numerator and denominator.

    Attributes:
      delays: K trees like the updates; they are what past steps contribute to the next K outputs.
      constant_delays: (K,), the same for a constant input of 1.
    """

    delays: tuple[Params, ...]
    constant_delays: jax.Array


def low_pass_filter(
    numerator: Sequence[float] = (1 / 11, 1 / 11), denominator: Sequence[float] = (1.0, -9 / 11)
) -> optax.GradientTransformation:
    """A linear recursive filter with bias correction (DOPPLER: Zhang et al. 2024, arXiv 2408.13460).

    With numerator b, denominator a and noisy gradients g,

        m_t = -sum_{k>=1} a_k m_{t-k} + sum_{k>=0} b_k g_{t-k},     output  m_t / c_t,

    where c_t is what the same recursion gives for g = 1 from zero initial values. The weights of the gradients thus add
    up to 1 at every step. The default is the first-order Butterworth filter with cut-off tan(w / 2) = 1 / 10, which
    leaves 1 / 11 of the variance of white noise. The exponential average with bias correction, ``optax.ema(decay)``, is
    ``low_pass_filter((1 - decay,), (1, -decay))``.

    The state keeps max(len(numerator), len(denominator)) - 1 copies of the updates (one by default), in float32 at
    least. Placed after `add_gaussian_noise` it is post-processing. An adaptive optimizer behind it sees filtered
    gradients in both moments.

    Args:
      numerator: ``(b_0, b_1, ...)``, b_0 not 0.
      denominator: ``(1, a_1, ...)``, as SciPy's filter design returns it, with all poles inside the unit circle.

    Returns:
      An `optax.GradientTransformation` with a `LowPassState`.

    Raises:
      ValueError: the filter is unstable, or its bias correction would divide by zero or by a negative number.

    >>> average = low_pass_filter()
    >>> updates, state = average.update(jnp.array([11.0]), average.init(jnp.zeros(1)))
    >>> print(updates)  # of one gradient, the average is that gradient
    [11.]
    """
    b, a = _checked(numerator, denominator)
    order = len(b) - 1

    def init(params: Params) -> LowPassState:
        return LowPassState(tuple(wide_zeros_like(params) for _ in range(order)), jnp.zeros(order))

    def update(updates: Params, state: LowPassState, params: Params | None = None):
        del params
        correction, constant_delays = _filter_step(b, a, jnp.ones([]), tuple(state.constant_delays))
        leaves, structure = jax.tree.flatten(updates)
        filtered, delays = [], []
        for x, *past in zip(leaves, *(jax.tree.leaves(delay) for delay in state.delays), strict=True):
            y, after = _filter_step(b, a, wide(x), tuple(past))
            filtered.append(y / correction.astype(y.dtype))
            delays.append(after)
        return jax.tree.unflatten(structure, filtered), LowPassState(
            tuple(jax.tree.unflatten(structure, [after[k] for after in delays]) for k in range(order)),
            jnp.asarray(constant_delays, state.constant_delays.dtype).reshape(order),
        )

    return optax.GradientTransformation(init, update)


class KalmanState(NamedTuple):
    """State of `kalman_filter`.

    Attributes:
      step: number of updates so far, int32 scalar.
      estimate: g_t, the filtered gradient.
      look_ahead: ``gamma (x_t - x_{t-1})``, by which the parameters of the loop are ahead of the iterate.
      optimizer: state of the inner optimizer.
    """

    step: jax.Array
    estimate: Params
    look_ahead: Params
    optimizer: optax.OptState


def kalman_filter(optimizer: optax.GradientTransformation, *, kappa: float = 0.7) -> optax.GradientTransformation:
    """Simplified Kalman filter around an optimizer, one gradient a step (DiSK: Zhang et al. 2025, arXiv 2410.03883).

    DiSK predicts how the last step ``d_{t-1} = x_t - x_{t-1}`` changed the gradient, ``g_{t-1} + H d_{t-1}``, and
    corrects the prediction with gain kappa. H d is a difference of two gradients of the same batch:

        r_t = c grad f(x_t + gamma d_{t-1}) + (1 - c) grad f(x_t) + noise,      c = (1 - kappa) / (kappa gamma),
        g_t = (1 - kappa) g_{t-1} + kappa r_t,      g_0 = r_0,      x_{t+1} = x_t + optimizer(g_t).

    This function is the case gamma = (1 - kappa) / kappa, c = 1, which the authors' code treats as well. The only
    gradient is then that at the point ahead. As in Nesterov's method the loop's parameters are kept at that point,
    ``y_t = x_t + gamma d_{t-1}``, so that the loop differentiates where it always does, and the update returned is
    ``y_{t+1} - y_t``; `without_look_ahead` gives x_t. Every step is the Gaussian mechanism at a point known from
    earlier outputs, so the accounting is that of DP-SGD.

    The point ahead is what distinguishes the method. With gradients at x_t the recursion is the exponential average of
    weight kappa, and with the noisy ``r_t - r_{t-1}`` in the place of H d it gives back r_t. The filter leaves
    ``kappa / (2 - kappa)`` of the variance of white noise, 0.54 by default, and does not lag on a quadratic function.

    Args:
      optimizer: turns filtered gradients into steps; it includes the learning rate and weight decay.
      kappa: the gain, in (0, 1]; 1 is the optimizer alone. The authors' default is 0.7 with gamma = 0.5 (here 0.43).

    Returns:
      An `optax.GradientTransformation` with a `KalmanState`, which has two copies of the updates beside the optimizer's
      state.

    Raises:
      ValueError: kappa is not in (0, 1].

    >>> filtered = kalman_filter(optax.sgd(0.25), kappa=0.5)
    >>> params = jnp.array([1.0])
    >>> updates, state = filtered.update(params, filtered.init(params), params)
    >>> print(without_look_ahead(state, params + updates))  # the first step is the optimizer's own
    [0.75]
    """
    if is_known(kappa) and not 0 < kappa <= 1:
        raise ValueError(f"kappa must be above 0 and at most 1, got {kappa}; 1 trusts every new gradient alone")
    gamma = (1 - kappa) / kappa

    def init(params: Params) -> KalmanState:
        return KalmanState(
            jnp.zeros([], jnp.int32),
            wide_zeros_like(params),
            wide_zeros_like(params),
            optimizer.init(jax.tree.map(wide, params)),  # the optimizer is given steps in float32
        )

    inside = optax.with_extra_args_support(optimizer)

    def update(updates: Params, state: KalmanState, params: Params | None = None, **extra_args: Any):
        gain = jnp.where(state.step == 0, 1.0, kappa)
        estimate = jax.tree.map(
            lambda g, r: g + gain.astype(g.dtype) * (jnp.asarray(r, g.dtype) - g), state.estimate, updates
        )
        iterate = None if params is None else without_look_ahead(state, params)
        steps, inner = inside.update(estimate, state.optimizer, iterate, **extra_args)
        look_ahead = jax.tree.map(lambda d: gamma * wide(d), steps)
        changes = jax.tree.map(lambda d, new, old: d + (new - old), steps, look_ahead, state.look_ahead)
        return changes, KalmanState(state.step + 1, estimate, look_ahead, inner)

    return optax.GradientTransformation(init, update)


def without_look_ahead(state: optax.OptState, params: Params) -> Params:
    """Computes the iterate x_t of `kalman_filter`, to evaluate and publish, from the parameters that the loop holds.

    Args:
      state: a `KalmanState`, or the state of several transformations, one of which is the filter (`optax.chain`).
      params: y_t.

    Returns:
      x_t. It is the parameters themselves if the state has no filter.
    """
    is_ahead = lambda node: isinstance(node, KalmanState)  # noqa: E731
    for node in filter(is_ahead, jax.tree.leaves(state, is_leaf=is_ahead)):
        params = jax.tree.map(lambda y, ahead: (y - ahead).astype(jnp.result_type(y)), params, node.look_ahead)
    return params


def _filter_step(
    b: np.ndarray, a: np.ndarray, x: jax.Array, delays: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Computes one output and the next delays in the transposed direct form II, which needs the fewest delays."""
    y = float(b[0]) * x + (delays[0] if delays else 0.0)
    rest: tuple[jax.Array | float, ...] = (*delays[1:], 0.0)
    return y, tuple(float(b[k]) * x - float(a[k]) * y + rest[k - 1] for k in range(1, len(b)))


def _checked(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns numerator and denominator with one length, or raises ValueError."""
    b, a = np.array(numerator, np.float64), np.array(denominator, np.float64)
    given = f"numerator {list(numerator)}, denominator {list(denominator)}"
    if b.size == 0 or a.size == 0 or not (np.isfinite(b).all() and np.isfinite(a).all()) or a[0] != 1:
        raise ValueError(f"low_pass_filter: {given}: give finite coefficients, the denominator's first being 1")
    radius = np.abs(np.roots(a)).max(initial=0.0)
    if radius >= 1:
        raise ValueError(
            f"low_pass_filter: {given}: the filter is unstable, it has a pole at distance {radius:.3g} from 0; "
            "all must be nearer than 1"
        )
    response = signal.lfilter(b, a, np.ones(_CHECKED_STEPS))
    if response.min() <= 0:
        raise ValueError(
            f"low_pass_filter: {given}: the response to a constant 1 is {response.min():.3g} at step "
            f"{response.argmin()}; the bias correction divides by it, so it must stay above 0"
        )
    length = max(b.size, a.size)
    return np.pad(b, (0, length - b.size)), np.pad(a, (0, length - a.size))
