"""The randomness of low-rank adaptation: what it adds to a gradient, how Gaussian that is, and what it hides (NumPy).

With ``W + B A^T``, where A of shape (n, r) has entries N(0, 1/r) and B = 0, a first step moves W along ``G A A^T``
instead of the gradient G (m, n). The difference ``E = G A A^T - G`` is the "noise of LoRA". Derivations: docs/math.md.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import special, stats


def projections(columns: int, rank: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Independent draws of A, (draws, columns, rank), with entries N(0, 1 / rank)."""
    return rng.standard_normal((draws, columns, rank), np.float32) / np.float32(np.sqrt(rank))


def row_noise(rows_RxN: np.ndarray, a_DxNxK: np.ndarray) -> np.ndarray:
    """``g A A^T - g`` for every row g and every A, (draws, R, N)."""
    return (rows_RxN @ a_DxNxK) @ np.swapaxes(a_DxNxK, 1, 2) - rows_RxN


def noise_variance(rows_RxN: np.ndarray, rank: int) -> np.ndarray:
    """``(||g||^2 + g_j^2) / r``, the variance of entry j of the noise of row g (arXiv 2409.17538).

    >>> noise_variance(np.array([[3.0, 4.0]]), rank=5)
    array([[6.8, 8.2]])
    """
    squares = np.square(rows_RxN)
    return (np.sum(squares, axis=1, keepdims=True) + squares) / rank


def scale_std(rank: int) -> float:
    """Standard deviation of ``||g A|| / ||g||``, which is chi of r degrees of freedom over sqrt r: about 1 / sqrt(2 r).

    By Johnson & Lindenstrauss (1984) the projection changes all lengths by about this share at most. The scale of the
    noise is known that well once gradients are scaled to one norm ("gradient scaling").

    >>> round(scale_std(1), 3), round(scale_std(64), 4)
    (0.603, 0.0882)
    """
    mean = np.sqrt(2 / rank) * np.exp(special.gammaln((rank + 1) / 2) - special.gammaln(rank / 2))
    return float(np.sqrt(1 - mean**2))


def kolmogorov_distance(rho: float, rank: int) -> float:
    """Largest distance between the distribution functions of one noise entry and of the Gaussian of its variance.

    For ``rho = g_j / ||g||`` the entry over ||g|| has exactly the law of ``rho (c - 1) + sqrt(c (1 - rho^2) / r) z``
    with ``r c`` chi-square of r degrees of freedom and z normal. The quadrature over c is right to 0.001.

    Args:
      rho: in [-1, 1].
      rank: r.

    Returns:
      The distance, in [0, 1]. For rho = 0 it falls like 1 / r, otherwise like ``|rho| / sqrt(r)``.

    >>> [round(kolmogorov_distance(0.0, r), 3) for r in (1, 16, 64)]
    [0.108, 0.009, 0.002]
    """
    nodes, weights = np.polynomial.legendre.leggauss(400)
    c = stats.chi2.ppf((nodes + 1) / 2, rank) / rank
    std = np.sqrt((1 + rho**2) / rank)
    x = np.linspace(-5, 5, 801) * std
    spread = np.sqrt(c * max(1 - rho**2, 1e-12) / rank)
    function = special.ndtr((x[:, None] - rho * (c - 1)) / spread) @ (weights / 2)
    return float(np.max(np.abs(function - special.ndtr(x / std))))


class Neighbours(NamedTuple):
    """The gradients of two batches that differ by one example, (m, n) each."""

    without: np.ndarray
    with_example: np.ndarray


def symmetry_scores(released: np.ndarray, candidates: Neighbours) -> float:
    """How much better the release fits the batch with the example than the one without it, for unknown A.

    A release ``M = G S`` with symmetric ``S = A A^T`` makes ``M G^T = G S G^T`` symmetric. With the gradient of another
    batch in the place of G, ``M G^T`` is not symmetric. For a single row it always is, so one row alone tells nothing
    in this way.

    Returns:
      ``asymmetry(without) - asymmetry(with)`` with ``||X - X^T|| / ||X||`` for ``X = M G^T``.
    """

    def asymmetry(gradient: np.ndarray) -> float:
        product = released @ gradient.T
        size = np.linalg.norm(product)
        return float(np.linalg.norm(product - product.T) / size) if size > 0 else 0.0

    return asymmetry(candidates.without) - asymmetry(candidates.with_example)


class Releases(NamedTuple):
    """Privacy losses ``ln p(y | with) / p(y | without)`` of simulated releases of either batch, (draws,) each."""

    of_with: np.ndarray
    of_without: np.ndarray


def projected_losses(
    batches: Neighbours, *, rank: int, noise_std: float, draws: int, rng: np.random.Generator
) -> Releases:
    """Exact privacy losses of releasing ``G A + s N`` with a fresh and SECRET A.

    That is what DP-LoRA's B sees at its first step. The r columns are independent ``N(0, Sigma)`` with
    ``Sigma = G G^T / r + s^2 I``. Let Sigma' be that of the batch without the example, and l_i the eigenvalues of
    ``Sigma'^(-1) Sigma``. The loss is ``sum_i ((1 - 1/l_i) q_i - r ln l_i) / 2``, where q_i is chi-square of r degrees
    of freedom if the example was out, and l_i times that if it was in.

    Args:
      batches: sums of clipped gradients.
      rank: r.
      noise_std: s > 0, the standard deviation of one entry of the noise.
      draws: number of draws for either batch.
      rng: the generator of the draws.

    Returns:
      `Releases`.
    """
    if len(batches.without) > 2 * batches.without.shape[1]:  # outside their column spaces both are only noise
        basis = np.linalg.qr(np.hstack(batches))[0]
        batches = Neighbours(basis.T @ batches.without, basis.T @ batches.with_example)
    covariances = [g @ g.T / rank + noise_std**2 * np.eye(len(g)) for g in batches]
    inverse_root = np.linalg.inv(np.linalg.cholesky(covariances[0]))
    ratios = np.linalg.eigvalsh(inverse_root @ covariances[1] @ inverse_root.T)
    ratios = ratios[np.abs(ratios - 1) > 1e-8]  # all but about twice the example's tokens
    chi = rng.chisquare(rank, (2, draws, len(ratios)))
    constant = rank * np.sum(np.log(ratios)) / 2
    return Releases(chi[0] @ (ratios - 1) / 2 - constant, chi[1] @ (1 - 1 / ratios) / 2 - constant)


def hockey_stick_epsilon(releases: Releases, delta: float) -> float:
    """The smallest epsilon with ``E max(0, 1 - e^(epsilon - L)) <= delta`` both ways round, for THIS pair of batches.

    It is a mean over draws, and so an estimate and not a bound. It is of one pair, not of the worst.
    """
    worst = 0.0
    for losses in (releases.of_with, -releases.of_without):
        low, high = 0.0, max(float(losses.max()), 0.0)
        for _ in range(60):
            middle = (low + high) / 2
            excess = np.mean(np.maximum(0.0, -np.expm1(middle - np.maximum(losses, middle))))
            low, high = (middle, high) if excess > delta else (low, middle)
        worst = max(worst, high)
    return worst
