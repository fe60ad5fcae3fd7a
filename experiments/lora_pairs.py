"""Estimators of both factor gradients of a LoRA update from both noisy ones, which have a core in common.

A layer computes with ``W + (alpha / r) A B``, A (in, r), B (r, out). If G (in, out) is alpha / r times the gradient of
W, those of the factors are ``G_A = G B^T`` and ``G_B = A^T G``; both contain the core ``A^T G B^T``, (r, r), for
``A^T G_A = G_B B^T``. They are seen as ``Y_A = G_A + s N_A`` and ``Y_B = G_B + s N_B``. Here are three ways to use what
they share, to be measured against denoising each alone (`experiments.structure`); NumPy, one layer at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg

from dp_rmt.random_matrix import marchenko_pastur

_ROUNDS = 15
"""Of alternating least squares; the fit changes by less than 1e-3 after them."""


class Pair(NamedTuple):
    """Something of factor A, (in, r), and the same of factor B, (r, out)."""

    a: np.ndarray
    b: np.ndarray


def consistent(noisy: Pair, factors: Pair) -> Pair:
    """The nearest pair (least squares) whose two cores agree, ``A^T X = Z B^T``.

    ``X = Y_A - A L``, ``Z = Y_B + L B`` with ``A^T A L + L B B^T = A^T Y_A - Y_B B^T`` (Lagrange). The r^2 constraints
    take away r^2 of the noise's r (in + out) dimensions, so of its energy the share r / (in + out), and no signal.

    Args:
      noisy: the observed gradients.
      factors: A and B themselves, of full rank r (B may be 0).

    Returns:
      The projected gradients.
    """
    a, b = factors
    multiplier = scipy.linalg.solve_sylvester(a.T @ a, b @ b.T, a.T @ noisy.a - noisy.b @ b.T)
    return Pair(noisy.a - a @ multiplier, noisy.b + multiplier @ b)


def joint_fit(noisy: Pair, factors: Pair, noise_std: float) -> Pair:
    """Least squares over all G of rank k: ``min |Y_A - X (B V)^T|^2 + |Y_B - (A^T X) V^T|^2``, ``G = X V^T``.

    k is the larger of the numbers of singular values above the edge in Y_A and in Y_B; with 0 the pair comes back as it
    is. The factor that shows less is fitted in the directions that the other one gives it. Found by alternating between
    X and V from the factor that shows more; each step is an exact solution.

    Args:
      noisy: the observed gradients.
      factors: A and B themselves.
      noise_std: s, of one entry.

    Returns:
      The fitted gradients.
    """
    (a, b), ranks = factors, [_above_edge(matrix, noise_std) for matrix in noisy]
    rank = max(ranks)
    if rank == 0:
        return noisy
    if ranks[1] >= ranks[0]:
        v = np.linalg.svd(noisy.b, full_matrices=False)[2][:rank].T
    else:
        x, values, _ = np.linalg.svd(noisy.a, full_matrices=False)
        v = _half_step(noisy.b.T, noisy.a.T, b.T, a.T @ (x[:, :rank] * values[:rank]), x[:, :rank] * values[:rank])
    for _ in range(_ROUNDS):
        x = _half_step(noisy.a, noisy.b, a, b @ v, v)
        v = _half_step(noisy.b.T, noisy.a.T, b.T, a.T @ x, x)
    return Pair(x @ (b @ v).T, (a.T @ x) @ v.T)


def tangent_denoised(noisy: Pair, factors: Pair, noise_std: float, rng: np.random.Generator) -> Pair:
    """Spectral denoising of the direction in W itself, ``T = P_A G + G P_B - P_A G P_B``, P_A and P_B the projections.

    T is what the pair determines of G: ``G_A = T B^T`` and ``G_B = A^T T``. Its noise is coloured by the inverses of A
    and B, so that the edges of the bulk, between which nothing is kept, are those of simulated noise of that colour;
    above, the weights are ``sqrt((1 - e^2 / y^2)(1 - c^2 / y^2))`` as for white noise.

    Args:
      noisy: the observed gradients.
      factors: A and B themselves, of full rank.
      noise_std: s, of one entry.
      rng: of the simulated noise.

    Returns:
      The gradients of the factors that belong to the denoised T; the pair itself where nothing is above the edge.
    """
    a, b = factors
    noise = Pair(*(noise_std * rng.standard_normal(matrix.shape) for matrix in noisy))
    bulk = np.linalg.svd(_tangent(noise, factors), compute_uv=False)[: 2 * len(b)]  # its rank
    u, values, vt = np.linalg.svd(_tangent(noisy, factors), full_matrices=False)
    squares = np.square(values) + np.finfo(float).tiny
    kept = values > bulk[0]
    if not kept.any():
        return noisy
    weights = np.sqrt(np.where(kept, (1 - bulk[0] ** 2 / squares) * (1 - bulk[-1] ** 2 / squares), 0.0))
    denoised = (u * (weights * values)) @ vt
    return Pair(denoised @ b.T, a.T @ denoised)


def _half_step(own: np.ndarray, other: np.ndarray, factor: np.ndarray, w: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The X that is least in ``|own - X w^T|^2 + |other - factor^T X v^T|^2``.

    ``X w^T w + F F^T X v^T v = own w + F other v``: with M that makes ``w^T w`` the identity and ``v^T v`` diagonal and
    with the singular vectors of F, every entry has an equation of its own.
    """
    right = own @ w + factor @ (other @ v)
    gram, other_gram = w.T @ w, v.T @ v
    floor = 1e-9 * np.trace(gram) + np.finfo(float).tiny
    ratios, m = scipy.linalg.eigh(other_gram, gram + floor * np.eye(len(gram)))
    basis, scales, _ = np.linalg.svd(factor, full_matrices=False)
    turned = right @ m
    products = np.square(scales)[:, None] * ratios
    return (turned - basis @ (products / (1 + products) * (basis.T @ turned))) @ m.T


def _tangent(pair: Pair, factors: Pair) -> np.ndarray:
    a, b = factors
    agreed = consistent(pair, factors)
    from_a, from_b = agreed.a @ np.linalg.pinv(b).T, np.linalg.pinv(a).T @ agreed.b
    return from_a + from_b - a @ (np.linalg.pinv(a) @ from_a)


def _above_edge(matrix: np.ndarray, noise_std: float) -> int:
    rows, cols = matrix.shape
    edge = marchenko_pastur.bulk_edge(rows=rows, cols=cols, noise_std=noise_std)
    return int(np.sum(np.linalg.svd(matrix, compute_uv=False) > np.asarray(edge)))
