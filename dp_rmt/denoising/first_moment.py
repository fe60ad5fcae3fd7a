"""Adam whose first moment is denoised at its own, lower noise level."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from dp_rmt.correlated_noise import CorrelatedNoiseLevel
from dp_rmt.denoising import matrix_view
from dp_rmt.denoising.gates import Gate
from dp_rmt.denoising.gradient import DenoiseState, TreeDenoiser, check_noise_std
from dp_rmt.denoising.joins import JoinRule
from dp_rmt.denoising.matrix_denoiser import AT_THE_EDGE, Backend, BelowEdge, Blend, MatrixDenoiser, Rescale, Shrinker
from dp_rmt.denoising.second_moment import noise_in_average, without_noise
from dp_rmt.random_matrix.units import in_units, unit_of
from dp_rmt.trees import is_known, leaves_by_path, wide, wide_zeros_like
from dp_rmt.types import Params

SecondMoment = Literal["noisy", "denoised"]

_ORDINARY = (2.0**-30, 2.0**30)


class DenoisedAdamState(NamedTuple):
    """State of `scale_by_denoised_adam`.

    Attributes:
      step: number of updates so far, int32 scalar.
      mu: exponential average of the updates; the noise is still in it.
      nu: exponential average of the squares of the updates, or of the denoised moments.
      mu_variance: variance of the noise in one entry of mu, float32 scalar.
      nu_offset: expectation of what the noise adds to one entry of nu, float32 scalar.
      unit: the power of two that is the unit of all moments, float32 scalar. It is 1, unless the noise level of the
        first step is below 2^-30 or above 2^30.
      denoise: `DenoiseState` of the denoiser, with its diagnostics.
    """

    step: jax.Array
    mu: Params
    nu: Params
    mu_variance: jax.Array
    nu_offset: jax.Array
    unit: jax.Array
    denoise: DenoiseState


def scale_by_denoised_adam(
    noise_std: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    second_moment: SecondMoment = "noisy",
    noise_correction: float | None = None,
    shrinker: Shrinker = "frobenius",
    gate: Gate = AT_THE_EDGE,
    rescale: Rescale = "noisy_norm",
    below_edge: BelowEdge = "drop",
    blend: Blend = "none",
    svd: Backend = "exact",
    matrix_rule: matrix_view.MatrixRule | None = None,
    join: JoinRule | None = None,
    sharding: jax.sharding.NamedSharding | None = None,
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015) with a denoised first moment: ``D(m^) / (sqrt(max(v^, s^2)) + eps)``.

    The noise in ``m_t = b1 m_(t-1) + (1 - b1) g_t`` is Gaussian and independent from entry to entry, with the variance
    ``w_t = b1^2 w_(t-1) + (1 - b1)^2 s_t^2``. Therefore ``m^_t = m_t / (1 - b1^t)`` is a matrix with noise of std
    ``sqrt(w_t) / (1 - b1^t)``. For a constant s this std is ``s sqrt((1 - b1)(1 - b1^(2t)) / (1 + b1)) / (1 - b1^t)``,
    about s / 4.4 for b1 = 0.9. A signal far below the edge in one gradient stands above it in their average. D is
    `dp_rmt.denoise_matrices` at that level; mu itself keeps its noise. Correlated noise says its variance in the
    average itself (`dp_rmt.correlated_noise.CorrelatedNoiseLevel`).

    The second moment is held to at least s^2, which is what noise alone contributes to its expectation (averaged like v
    where s changes). Adam's own quotient is bounded because m^ and v^ come from the same numbers. D(m^), however, is
    not small where v^ happens to be small, and ``1 / sqrt(v^)`` of the first steps has no finite mean. With
    ``noise_correction=f`` the second moment loses what noise adds to it, as in DP-AdamBC (Tang et al. 2024):
    ``max(v^ - s^2, f s^2)`` in its place.

    With ``second_moment="denoised"`` the matrices' second moment is that of ``D(m^)`` itself, as if Adam without
    momentum followed the denoiser: every entry moves by about the learning rate, and no bound is needed.

    An entry that is not finite stays in its moments, as in `optax.adam`. Its matrix passes undenoised; other matrices
    are not touched by it. With `optax.apply_if_finite` around this transformation such an update is left out.

    Formal guarantee: this is post-processing, as for `dp_rmt.denoise_matrices`.

    Args:
      noise_std: standard deviation s of ONE entry of the incoming update, or a schedule of it. The noise of two updates
        is taken to be independent, unless it is a `CorrelatedNoiseLevel`, which must be that of a run from its start.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator.
      second_moment: "noisy" for that of the incoming updates, or "denoised". Leaves that are not matrices always have
        the noisy one.
      noise_correction: least value of the corrected second moment, in units of the noise's variance; None for the bound
        s^2 without a correction. Small values make large steps where v^ falls short of s^2 by chance; over t steps v^
        has a relative error of sqrt(2 / t).
      shrinker: this option and all that follow are those of `dp_rmt.denoise_matrices`.
      gate: decides what is signal.
      rescale: norm correction; the default keeps the size of a step as Adam's, so that its learning rates carry over.
      below_edge: what happens to components that are not kept.
      blend: "stein" for the blend of noisy and denoised matrix.
      svd: "exact", "gram" or "subspace".
      matrix_rule: which leaves are matrices.
      join: which matrices are denoised side by side.
      sharding: where the matrices are divided among devices.

    Returns:
      An `optax.GradientTransformation` with a `DenoisedAdamState`. It applies no learning rate.

    Raises:
      ValueError: an option is unknown or a number is out of range.

    >>> transform = scale_by_denoised_adam(1e-3)
    >>> params = {"kernel": jnp.zeros((16, 16))}
    >>> scaled, state = transform.update({"kernel": jnp.ones((16, 16))}, transform.init(params))
    >>> print(f"{scaled['kernel'].mean():.3f}, noise of the moment {state.mu_variance ** 0.5:.1e}")
    1.000, noise of the moment 1.0e-04
    """
    check_noise_std(noise_std)
    _check_options(b1, b2, second_moment, noise_correction)
    denoiser = TreeDenoiser(
        MatrixDenoiser(shrinker=shrinker, gate=gate, rescale=rescale, below_edge=below_edge, blend=blend, svd=svd),
        matrix_rule,
        join,
        sharding,
    )

    def std_of(step: jax.Array) -> jax.Array:
        return jnp.asarray(noise_std(step) if callable(noise_std) else noise_std, jnp.float32)

    def init(params: Params) -> DenoisedAdamState:
        step, unit = jnp.zeros([], jnp.int32), _unit(std_of(jnp.zeros([], jnp.int32)))
        mu, nu = wide_zeros_like(params), wide_zeros_like(params)
        mu_variance, nu_offset = jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32)
        return DenoisedAdamState(step, mu, nu, mu_variance, nu_offset, unit, denoiser.init(params))

    def update(
        updates: Params, state: DenoisedAdamState, params: Params | None = None
    ) -> tuple[Params, DenoisedAdamState]:
        del params
        std = in_units(std_of(state.step), state.unit)
        step = optax.safe_increment(state.step)
        gradient = jax.tree.map(lambda leaf: wide(leaf) * (1 / state.unit), updates)
        mu = optax.tree.update_moment(gradient, state.mu, b1, 1)
        if isinstance(noise_std, CorrelatedNoiseLevel):
            mu_variance = jnp.square(in_units((1 - b1) * noise_std.of_decayed_sum(b1)(state.step), state.unit))
        else:
            mu_variance = b1**2 * state.mu_variance + (1 - b1) ** 2 * std**2
        nu_offset = noise_in_average(state.nu_offset, std, b2)

        moment_std = jnp.sqrt(mu_variance) / (1 - b1 ** step.astype(jnp.float32))
        denoised, denoise = denoiser(optax.tree.bias_correction(mu, b1, step), state.denoise, moment_std)
        has_own = _has_own(updates, matrix_rule, second_moment)
        nu = optax.tree.update_moment(
            jax.tree.map(lambda own, g, m: m if own else g, has_own, gradient, denoised), state.nu, b2, 2
        )
        offset = optax.tree.bias_correction(nu_offset, b2, step)
        subtracted, least = (0.0, offset) if noise_correction is None else (offset, noise_correction * offset)

        def scale(own: bool, m: jax.Array, v: jax.Array) -> jax.Array:
            return m / (jnp.sqrt(v if own else without_noise(v, subtracted, least)) + eps * (1 / state.unit))

        scaled = jax.tree.map(scale, has_own, denoised, optax.tree.bias_correction(nu, b2, step))
        return scaled, DenoisedAdamState(step, mu, nu, mu_variance, nu_offset, state.unit, denoise)

    return optax.GradientTransformation(init, update)


def _unit(std: jax.Array) -> jax.Array:
    """The unit of the moments: 1, or the noise's power of two where squares would leave the range of float32."""
    return jnp.where((std > 0) & ((std < _ORDINARY[0]) | (std > _ORDINARY[1])), unit_of(std), 1.0)


def _has_own(tree: Params, rule: matrix_view.MatrixRule | None, second_moment: SecondMoment) -> Params:
    """Tells which leaves have the second moment of their denoised first moment."""
    matrices = matrix_view.matrix_leaves(tree, rule) if second_moment == "denoised" else {}
    flags = [path in matrices for path, _ in leaves_by_path(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), flags)


def _check_options(b1: float, b2: float, second_moment: SecondMoment, noise_correction: float | None) -> None:
    for name, decay in (("b1", b1), ("b2", b2)):
        if is_known(decay) and not 0 <= decay < 1:
            raise ValueError(f"scale_by_denoised_adam: {name} must be at least 0 and below 1, got {decay}")
    if noise_correction is not None and is_known(noise_correction) and not noise_correction > 0:
        raise ValueError(
            f"scale_by_denoised_adam: noise_correction must be above 0, got {noise_correction}: it keeps the "
            "denominator from 0; None switches the correction off"
        )
    if second_moment not in get_args(SecondMoment) or (second_moment == "denoised" and noise_correction is not None):
        raise ValueError(
            f"scale_by_denoised_adam: second_moment must be 'noisy' or 'denoised', got {second_moment!r}; a "
            f"noise_correction, here {noise_correction}, goes with 'noisy' alone"
        )
