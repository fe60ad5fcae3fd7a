"""Gaussian noise that is correlated over the steps of a run, so that much of it cancels in the sum of the steps.

A matrix factorisation mechanism releases ``G + C^-1 Z`` for the gradients G of all steps (a row each) and independent
noise Z: that is ``C G + Z``, multiplied by the public ``C^-1``. Here the strategy matrix C is lower triangular,
Toeplitz and banded (BandMF: Choquette-Choo et al. 2023, arXiv 2306.08153). Examples take part at most once in as many
steps as it has bands (`dp_rmt.PoissonSampling` with `num_groups`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import signal

from dp_rmt.arguments import integer, real
from dp_rmt.extras import extra
from dp_rmt.noise_addition import GaussianNoiseState, add_gaussian_noise
from dp_rmt.trees import wide_zeros_like
from dp_rmt.types import Params


@dataclasses.dataclass(frozen=True)
class BandedToeplitz:
    """A strategy matrix: C is lower triangular with ``C[t, t - k] = c_k`` for k below its number of bands, else 0.

    Args:
      coefficients: ``(c_0, c_1, ...)``, finite, with c_0 above 0.

    Raises:
      ValueError: the coefficients are of another kind, or ``C^-1`` grows without bound with the number of steps.

    >>> BandedToeplitz((1.0, 0.5)).noising_coefficients(4)
    array([ 1.   , -0.5  ,  0.25 , -0.125])
    """

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        wanted = "be finite numbers, one or more, of which the first is above 0"
        given = tuple(real("coefficients", c, wanted, math.isfinite) for c in self.coefficients)
        if not given or given[0] <= 0:
            raise ValueError(f"coefficients must {wanted}, got {self.coefficients}")
        object.__setattr__(self, "coefficients", given)
        radius = np.abs(np.roots(given)).max(initial=0.0)
        if radius >= 1:
            raise ValueError(
                f"coefficients {given}: the noise of later steps would grow without bound, as {radius:.3g} to the "
                "power of the step. Let the coefficients fall, such as those of square_root(bands)"
            )

    @property
    def bands(self) -> int:
        """How many steps the gradient of one step counts in, b."""
        return len(self.coefficients)

    @property
    def column_norm(self) -> float:
        """``sqrt(sum_k c_k^2)``: how far one gradient of norm 1 moves ``C G``, at most."""
        return math.hypot(*self.coefficients)

    def noising_coefficients(self, num_steps: int) -> np.ndarray:
        """The first column of ``C^-1``, which is lower triangular and Toeplitz, too.

        Args:
          num_steps: how many coefficients, at least 1.

        Returns:
          float64 (num_steps,), the a_k of ``y_t = sum_k a_k z_(t - k)``.
        """
        impulse = np.zeros(integer("num_steps", num_steps, "be at least 1 and an integer", lambda n: n >= 1))
        impulse[0] = 1.0
        column: np.ndarray = signal.lfilter([1.0], self.coefficients, impulse)
        return column

    def prefix_sum_error(self, num_steps: int) -> float:
        """The root mean square, over steps t, of the noise in the sum of the first t gradients.

        It is in units of the noise multiplier: ``column_norm sqrt(mean_t sum_(i <= t) (sum_(k <= i) a_k)^2)``. For
        independent noise it is ``sqrt((num_steps + 1) / 2)``. Plain gradient descent stands at such a sum.

        Args:
          num_steps: of the run.

        >>> round(square_root(1).prefix_sum_error(31), 3), round(square_root(8).prefix_sum_error(31), 3)
        (4.0, 2.126)
        """
        in_sums = np.cumsum(self.noising_coefficients(num_steps))
        return self.column_norm * math.sqrt(float(np.mean(np.cumsum(in_sums**2))))


def square_root(bands: int) -> BandedToeplitz:
    """The square root of the matrix of prefix sums, cut to its first bands (Kalinin & Lampert 2024, arXiv 2405.13763).

    ``c_k = prod_(j = 1..k) (2 j - 1) / (2 j)``, the series of ``(1 - x)^(-1/2)``.

    Args:
      bands: at least 1; with 1 the noise is independent.

    Returns:
      A `BandedToeplitz`.

    >>> square_root(4).coefficients
    (1.0, 0.5, 0.375, 0.3125)
    """
    bands = integer("bands", bands, "be at least 1 and an integer", lambda n: n >= 1)
    factors = [(2 * k - 1) / (2 * k) for k in range(1, bands)]
    return BandedToeplitz(tuple(np.cumprod([1.0, *factors]).tolist()))


def optimised(bands: int, num_steps: int) -> BandedToeplitz:
    """The banded strategy with the least mean squared error of prefix sums, found by `jax_privacy` (extra "peers").

    It begins at `square_root` and descends by L-BFGS. The coefficients are rounded to six digits, so that another
    machine finds the same ones.

    Args:
      bands: at least 1.
      num_steps: of the run.

    Returns:
      A `BandedToeplitz`.

    Raises:
      ModuleNotFoundError: `jax_privacy` is not installed; the message says how to install it.
    """
    begin = square_root(bands)
    with extra("peers"):
        from jax_privacy.matrix_factorization import toeplitz

    found = toeplitz.optimize_banded_toeplitz(num_steps, bands, jnp.array(begin.coefficients))
    return BandedToeplitz(tuple(round(float(c), 6) for c in np.asarray(found / found[0])))


@dataclasses.dataclass(frozen=True)
class CorrelatedNoiseLevel:
    """The level of correlated noise, as an `optax.Schedule`: std of ONE entry of the noise at each step.

    ``s_t = std sqrt(sum_(k <= t) a_k^2)``, std times the norm of row t of ``C^-1``. Within a step the noise is white.
    All that is known of matrices with noise therefore holds at this level. What adds up gradients of several steps must
    ask for `of_decayed_sum`, because their noise is not independent.

    Args:
      std: of one entry of the independent noise Z.
      strategy: C.
      num_steps: of the run; later steps are given the level of the last.

    >>> level = CorrelatedNoiseLevel(2.0, BandedToeplitz((1.0, 0.5)), num_steps=10)
    >>> [round(float(level(step)), 3) for step in (0, 1, 9)]
    [2.0, 2.236, 2.309]
    """

    std: float
    strategy: BandedToeplitz
    num_steps: int

    def __call__(self, step: Any) -> jax.Array:
        """The std of one entry at a step, float32 scalar."""
        return self.of_decayed_sum(0.0)(step)

    def of_decayed_sum(self, decay: float) -> optax.Schedule:
        """The std of one entry of the noise in ``S_t = decay S_(t-1) + g_t``, from 0 at first.

        It is ``std sqrt(sum_(k <= t) d_k^2)``, with the a_k convolved with ``1, decay, decay^2, ...`` as d_k.

        Args:
          decay: in [0, 1), a number and not a traced value.

        Returns:
          ``step -> std``, float32 scalar.
        """
        known = real("decay of an average of correlated noise", decay, "be in [0, 1)", lambda x: 0 <= x < 1)
        levels = jnp.asarray(_levels(self.std, self.strategy, self.num_steps, known), jnp.float32)
        return lambda step: levels[jnp.clip(step, 0, self.num_steps - 1)]


@functools.lru_cache(maxsize=32)
def _levels(std: float, strategy: BandedToeplitz, num_steps: int, decay: float) -> np.ndarray:
    weights = signal.lfilter([1.0], [1.0, -decay], strategy.noising_coefficients(num_steps))
    levels: np.ndarray = std * np.sqrt(np.cumsum(weights**2))
    return levels


def std_in_decayed_sum(
    before: jax.Array, noise_std: float | optax.Schedule, decay: float, step: jax.Array
) -> jax.Array:
    """The std of one entry of the noise in ``S_t = decay S_(t-1) + g_t``, whether or not the noise is correlated.

    Args:
      before: the same for ``S_(t-1)``; 0 at first. Correlated noise does not look at it.
      noise_std: the level of one entry of g_t, a number, a schedule or a `CorrelatedNoiseLevel`.
      decay: in [0, 1).
      step: t, from 0.

    Returns:
      float32 scalar.
    """
    if isinstance(noise_std, CorrelatedNoiseLevel):
        return jnp.asarray(noise_std.of_decayed_sum(decay)(step))
    std = jnp.asarray(noise_std(step) if callable(noise_std) else noise_std, jnp.float32)
    return jnp.hypot(decay * before, std)  # squares of small levels would underflow


class CorrelatedNoiseState(NamedTuple):
    """State of `add_correlated_noise`. Whoever holds it can subtract the noise, so it is as secret as the data.

    Attributes:
      white: state of the independent noise z.
      earlier: the noise of the last steps in units of its std, the last first: one tree fewer than there are bands.
    """

    white: GaussianNoiseState
    earlier: tuple[Params, ...]


def add_correlated_noise(noise_std: float, strategy: BandedToeplitz, key: jax.Array) -> optax.GradientTransformation:
    """Adds the noise ``noise_std C^-1 Z`` of matrix factorisation mechanisms, row t at step t.

    The independent z_t of a step is that of `add_gaussian_noise`: a pure function of (key, t, leaf), the same on any
    mesh. From it follows

        y_t = (z_t - sum_(k = 1..b-1) c_k y_(t-k)) / c_0,

    since ``C y = z``. The state keeps the last b - 1 of the y, float32, so that a step costs one draw whatever its
    number is, and a resumed run goes on exactly. With one band this is `add_gaussian_noise`, bit for bit.

    Args:
      noise_std: standard deviation of one entry of Z. The guarantee of noise multiplier z for a `ClippedGradient` g
        holds with ``z * g.sensitivity() * strategy.column_norm`` where no example takes part twice in b steps.
      strategy: C.
      key: as of `add_gaussian_noise`.

    Returns:
      An `optax.GradientTransformation` with a `CorrelatedNoiseState`, which has b - 1 copies of the updates.

    Raises:
      ValueError: as of `add_gaussian_noise`.

    >>> noise = add_correlated_noise(1.0, square_root(2), jax.random.key(0))
    >>> _, state = noise.update(jnp.zeros(3), noise.init(jnp.zeros(3)))
    >>> len(state.earlier), int(state.white.step)
    (1, 1)
    """
    of_z = add_gaussian_noise(noise_std, key)  # checks the std
    unit = add_gaussian_noise(1.0, key)

    def init(params: Params) -> CorrelatedNoiseState:
        earlier = tuple(wide_zeros_like(params) for _ in range(strategy.bands - 1))
        return CorrelatedNoiseState(unit.init(params), earlier)

    def update(
        updates: Params, state: CorrelatedNoiseState, params: Params | None = None
    ) -> tuple[Params, CorrelatedNoiseState]:
        if strategy.bands == 1:
            noisy, white = of_z.update(updates, state.white, params)
            return noisy, CorrelatedNoiseState(white, ())
        z, white = unit.update(jax.tree.map(jnp.zeros_like, updates), state.white, params)
        zero = jnp.minimum(0, state.white.step)  # which the compiler cannot know
        y = jax.tree.map(lambda now, *past: _solved(now, past, strategy.coefficients, zero), z, *state.earlier)
        noisy = jax.tree.map(lambda leaf, noise: jnp.asarray(leaf, noise.dtype) + noise_std * noise, updates, y)
        return noisy, CorrelatedNoiseState(white, (y, *state.earlier[:-1]))

    return optax.GradientTransformation(init, update)


def _solved(
    z: jax.Array, earlier: tuple[jax.Array, ...], coefficients: tuple[float, ...], zero: jax.Array
) -> jax.Array:
    """``y_t`` of z_t and of the y before it, with the same bits in every program."""
    total = _rounded(z, zero)
    for c, y in zip(coefficients[1:], earlier, strict=True):
        total = total - _rounded(c * y, zero)
    return total / coefficients[0]


def _rounded(x: jax.Array, zero: jax.Array) -> jax.Array:
    """A number as it stands in memory.

    Compilers join a product with the sum that follows, and then round once in the place of twice. Whether they do so
    depends on what is computed together, and with it on the mesh. An integer zero that is added to the bits of the
    number, and that the compiler does not know to be zero, stands in between.
    """
    bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, bits) + zero.astype(bits), x.dtype)


def without_history(noise: Any) -> Any:
    """The state of a noise without its history, which before the first step is all zeros."""
    strip = lambda node: node._replace(earlier=()) if _is_correlated(node) else node  # noqa: E731
    return jax.tree.map(strip, noise, is_leaf=_is_correlated)


def with_history(noise: Any, template: Any) -> Any:
    """The state of a noise that `without_history` gave, with the history of another state."""
    return jax.tree.map(
        lambda node, other: node._replace(earlier=other.earlier) if _is_correlated(node) else node,
        noise,
        template,
        is_leaf=_is_correlated,
    )


def _is_correlated(node: Any) -> bool:
    return isinstance(node, CorrelatedNoiseState)
