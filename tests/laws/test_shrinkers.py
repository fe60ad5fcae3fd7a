"""Every shrinker against the optimum that it claims, found by brute force on simulated spiked matrices."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy import optimize

from dp_rmt.random_matrix import marchenko_pastur, shrinkage

NOISE_STD = 0.3
SHAPES = [(160, 160), (80, 320), (320, 80)]
LOSSES = {"frobenius": "fro", "operator": 2, "operator_rectangular": 2, "nuclear": "nuc"}


@functools.lru_cache
def leading_components(rows, cols, strength):
    """The signal l; for 16 draws, the observed y and the cosines of its singular vectors to the signal's."""
    signal = strength * marchenko_pastur.detection_threshold(rows=rows, cols=cols, noise_std=NOISE_STD)
    noisy = NOISE_STD * np.random.default_rng(0).standard_normal((16, rows, cols), dtype=np.float32)
    noisy[:, 0, 0] += signal  # Gaussian noise looks alike in every basis
    left, values, right = np.linalg.svd(noisy, full_matrices=False)
    return signal, values[:, 0], left[:, 0, 0], right[:, 0, 0]


def error_norm(shrunken, signal, left_cosine, right_cosine, norm):
    """Norm of `signal e1 e1^T - shrunken u v^T`, in the plane spanned by e1 and u times that of e1 and v."""
    u = np.array([left_cosine, np.sqrt(1 - left_cosine**2)])
    v = np.array([right_cosine, np.sqrt(1 - right_cosine**2)])
    return np.linalg.norm(np.diag([signal, 0.0]) - shrunken * np.outer(u, v), norm)


@pytest.mark.parametrize("strength", [1.6, 3.0])
# The operator shrinker of Gavish & Donoho is the optimum for square matrices only.
@pytest.mark.parametrize(
    ("name", "rows", "cols"),
    [(name, *shape) for name in LOSSES for shape in SHAPES if name != "operator" or shape == (160, 160)],
)
def test_shrinker_is_the_brute_force_optimum_of_its_loss(name, rows, cols, strength):
    signal, observed, left, right = leading_components(rows, cols, strength)
    best = [
        optimize.minimize_scalar(
            error_norm, args=(signal, a, b, LOSSES[name]), bounds=(0, 2 * signal), method="bounded"
        ).x
        for a, b in zip(left, right)
    ]
    claimed = getattr(shrinkage, name)(observed, rows=rows, cols=cols, noise_std=NOISE_STD)
    # The mean of 16 draws: y, and with it either side, fluctuates by about s, more where the map is steep.
    assert np.mean(claimed) == pytest.approx(np.mean(best), abs=NOISE_STD)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_no_other_shrinker_does_better_at_its_loss(name, rows, cols):
    signal, observed, left, right = leading_components(rows, cols, 3.0)

    def mean_loss(other):
        shrunken = getattr(shrinkage, other)(observed, rows=rows, cols=cols, noise_std=NOISE_STD)
        norms = [error_norm(eta, signal, a, b, LOSSES[name]) for eta, a, b in zip(np.asarray(shrunken), left, right)]
        return np.mean(norms)

    own = mean_loss("operator_rectangular" if name == "operator" else name)
    for other in LOSSES:
        assert own <= mean_loss(other) * (1 + 1e-6)


@pytest.mark.parametrize(("rows", "cols"), [(500, 500), (100, 700), (700, 100), (1, 1000)])
def test_hard_threshold_cuts_where_keeping_costs_as_much_as_dropping(rows, cols):
    # Keeping y costs l^2 + y^2 - 2 y eta(y), dropping costs l^2: equal where the Frobenius optimum is y / 2.
    shape = {"rows": rows, "cols": cols, "noise_std": NOISE_STD}
    edge = marchenko_pastur.bulk_edge(**shape)
    cut = optimize.brentq(lambda y: float(shrinkage.frobenius(y, **shape)) - y / 2, edge, 3 * edge, xtol=1e-9)
    around = np.array([cut * (1 - 1e-4), cut * (1 + 1e-4)])
    np.testing.assert_allclose(shrinkage.hard_threshold(around, **shape), [0, around[1]], rtol=1e-6)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("name", ["frobenius", "optshrink"])
def test_weights_of_several_spikes_are_the_oracle_s(name, rows, cols):
    # For any matrix the best weights in the Frobenius norm are the diagonal of U^T G V.
    shape = {"rows": rows, "cols": cols, "noise_std": NOISE_STD}
    strengths = np.array([6.0, 4.0, 2.5]) * marchenko_pastur.detection_threshold(**shape)
    noisy = NOISE_STD * np.random.default_rng(1).standard_normal((8, rows, cols), dtype=np.float32)
    noisy[:, range(3), range(3)] += strengths
    left, values, right = np.linalg.svd(noisy, full_matrices=False)
    oracle = np.einsum("bik,i,bki->bk", left[:, :3], strengths, right[:, :, :3])
    claimed = np.asarray(getattr(shrinkage, name)(values, **shape))
    # A weight fluctuates by about s in one draw.
    np.testing.assert_allclose(claimed[:, :3].mean(axis=0), oracle[:, :3].mean(axis=0), atol=NOISE_STD)
    # What is kept below the third has escaped the edge by chance, and counts for little.
    assert np.linalg.norm(claimed[:, 3:]) < 0.1 * np.linalg.norm(claimed[:, :3])
