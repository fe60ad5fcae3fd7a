"""DP-MuonBC: Muon whose steps lose the bias that noise gets from the orthogonalization."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dp_rmt.baselines.muon import map_matrices, orthogonalize, with_others
from dp_rmt.correlated_noise import std_in_decayed_sum
from dp_rmt.denoising import matrix_view
from dp_rmt.denoising.gradient import check_noise_std
from dp_rmt.trees import is_known, wide, wide_zeros_like
from dp_rmt.types import Params

TAYLOR = (15 / 8, -10 / 8, 3 / 8)
"""Coefficients of ``p_2(x) = sum_{k<=2} (2k)! / (4^k k!^2) (1 - x)^k``, the start of the series of x^(-1/2) at 1."""

_PROBES = 260512994


class MuonBCState(NamedTuple):
    """State of the matrices.

    Attributes:
      step: number of updates so far, int32 scalar.
      momentum: ``M_t = beta M_{t-1} + G_t``.
      noise_std: standard deviation of the noise in one entry of the momentum, float32 scalar.
    """

    step: jax.Array
    momentum: Params
    noise_std: jax.Array


def muon_bc(
    learning_rate: optax.ScalarOrSchedule,
    noise_std: float | optax.Schedule,
    others: optax.GradientTransformation,
    *,
    beta: float = 0.95,
    num_probes: int = 1,
    consistent_rms: float | None = None,
    weight_decay: float = 0.0,
    matrix_rule: matrix_view.MatrixRule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """DP-MuonBC: orthogonalized momentum less its leading bias from noise (Kim & Fan 2026, arXiv 2605.12994).

    For a matrix with noisy gradients G_t, whose noise has the standard deviation s_t in every entry,

        M_t = beta M_{t-1} + G_t,      tau_t^2 = beta^2 tau_{t-1}^2 + s_t^2,      W_{t+1} = W_t - learning_rate O(M_t),

    the momentum is unbiased with noise of std tau_t, but its orthogonalization F is not linear. The noise smooths F as
    heat does, ``E F(M + tau Z) = F(M) + tau^2 / 2 (Laplacian F)(M) + O(tau^4)``, and O subtracts the leading term:

        O(M) = 2 F(M) - mean_k [F(M + tau Z_k) + F(M - tau Z_k)] / 2,      so      E O(M + tau Z) = F(M) + O(tau^4).

    F is five Newton-Schulz steps ``X <- p_2(X X^T) X`` from ``X = M / |M|_F``, with p_2 in `TAYLOR`.

    What is the paper's and what is not: momentum, polynomials p_k, the absence of Nesterov's term and of a factor for
    the shape, the bias as smoothing by heat, and that its leading term is removed from the output are the paper's. We
    could not find its estimate of the Laplacian, the degree, number of Newton-Schulz steps, beta and learning rates.
    Taken instead: differences over num_probes pairs of public Gaussian matrices of the noise's own size (the same for
    all matrices of one shape); degree 2 and five steps, which is Muon's shape; Muon's beta. The paper divides M by
    ``max(1, |M|_F)``: below norm 1 its steps depend on the unit of the loss, so here it is the norm, as in Muon. The
    paper clips each matrix by itself; the clipping of this library is flat, of all parameters together.

    Formal guarantee: behind the noise this is post-processing. The probes are drawn from a public key, without data.

    Args:
      learning_rate: the learning rate of the matrices, a number or a schedule.
      noise_std: standard deviation s of ONE entry of the incoming gradient, or a schedule of it. With 0, O is F. For
        correlated noise it is a `dp_rmt.correlated_noise.CorrelatedNoiseLevel`.
      others: the optimizer of the other leaves with its own learning rate.
      beta: decay of the momentum.
      num_probes: pairs of probes; each costs two orthogonalizations beside the one of Muon.
      consistent_rms: if given, steps are multiplied by ``consistent_rms sqrt(max(rows, cols))``, see
        `dp_rmt.baselines.muon.private_muon`.
      weight_decay: the weight decay of the matrices, which is multiplied with the learning rate.
      matrix_rule: which leaves are matrices, see `dp_rmt.denoising.matrix_view`; None for `kernels_are_matrices` there.

    Returns:
      An `optax.GradientTransformation`. Its state has one copy of the matrices, and what `others` keeps of the rest.

    Raises:
      ValueError: noise_std or num_probes is out of range; ``init`` raises it if there are matrices and the rule names
        none of them.

    >>> params = {"kernel": jnp.eye(4, 8), "bias": jnp.zeros(8)}
    >>> muon = muon_bc(0.5, 0.0, optax.sgd(1.0))
    >>> updates, _ = muon.update(params, muon.init(params), params)
    >>> print(jnp.round(updates["kernel"][0, :2], 2) + 0.0)  # an orthogonal matrix stays what it is
    [-0.5  0. ]
    """
    check_noise_std(noise_std)
    if is_known(num_probes) and num_probes < 1:
        raise ValueError(f"muon_bc: num_probes must be at least 1, got {num_probes}; private_muon corrects nothing")

    def init(params: Params) -> MuonBCState:
        return MuonBCState(jnp.zeros([], jnp.int32), wide_zeros_like(params), jnp.zeros([], jnp.float32))

    def update(updates: Params, state: MuonBCState, params: Params | None = None):
        del params
        momentum = jax.tree.map(lambda m, g: beta * m + wide(g), state.momentum, updates)
        tau = std_in_decayed_sum(state.noise_std, noise_std, beta, state.step)

        def direction(matrices: jax.Array, tau: jax.Array, step: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(_PROBES), step)
            rows, cols = matrices.shape[1:]
            factor = 1.0 if consistent_rms is None else consistent_rms * max(rows, cols) ** 0.5
            return factor * unbiased_orthogonal(matrices, tau, key, num_probes)

        steps = map_matrices(direction, momentum, matrix_rule, tau, state.step)
        return steps, MuonBCState(optax.safe_increment(state.step), momentum, tau)

    return with_others(
        "muon_bc", optax.GradientTransformation(init, update), others, learning_rate, weight_decay, matrix_rule
    )


def unbiased_orthogonal(matrices: jax.Array, noise_std: jax.Array, key: jax.Array, num_probes: int) -> jax.Array:
    """Computes O of `muon_bc`.

    Args:
      matrices: (B, rows, cols), with noise.
      noise_std: tau, scalar.
      key: of the probes.
      num_probes: pairs of probes.

    Returns:
      (B, rows, cols).
    """
    probes = jax.random.normal(key, (num_probes, *matrices.shape[1:]), jnp.float32).astype(matrices.dtype)
    apart = noise_std.astype(matrices.dtype) * jnp.concatenate([probes, -probes])
    smoothed = jax.vmap(lambda probe: orthogonalize(matrices + probe, TAYLOR))(apart)
    return 2 * orthogonalize(matrices, TAYLOR) - jnp.mean(smoothed, axis=0)
