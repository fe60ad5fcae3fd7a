"""A gate with a meaning: on pure noise of the models' own shapes, as many matrices pass as the gate says."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy import linalg, stats

from dp_rmt.denoising.gates import Kappa, TracyWidom

# RoBERTa-base and -large, MiniLM, and the factors of LoRA.
SHAPES = [(768, 768), (768, 3072), (384, 384), (384, 1536), (1024, 4096), (16, 1024), (8, 4096), (64, 64), (4096, 16)]
GATES = {rate: TracyWidom(rate) for rate in (0.1, 0.05, 0.01)}
DRAWS = 60_000
NOISE_STD = 0.3


def tridiagonal(rows, cols, draws, generator, *, length=None):
    """The leading `length` rows of a tridiagonal matrix with the eigenvalues of `N N^T`, (length, draws) each.

    `N` can be turned to a bidiagonal matrix B of independent chi variables with the same singular values (Dumitriu &
    Edelman 2002): chi_q, chi_(q - 1), ... on the diagonal, chi_(p - 1), chi_(p - 2), ... below it. `B B^T`.
    """
    shorter, longer = min(rows, cols), max(rows, cols)
    length = shorter if length is None else length
    diagonal = generator.chisquare(longer - np.arange(length)[:, None], (length, draws))
    below = generator.chisquare(shorter - np.arange(1, length)[:, None], (length - 1, draws))
    main = diagonal.copy()
    main[1:] += below
    return main, diagonal[:-1] * below  # the main diagonal, and the squares of the one beside it


def leading_length(shorter):
    """Rows that decide the largest eigenvalue: its eigenvector decays within some p^(1/3) rows, by far within 20."""
    return min(shorter, int(20 * shorter ** (1 / 3)))


def exceeds(main, beside, value):
    """Whether the largest eigenvalue exceeds `value`: one of Sturm's pivots of `T - value I` is positive."""
    pivot = main[0] - value
    found = pivot > 0
    for row, square in zip(main[1:], beside):
        pivot = row - value - square / pivot
        found |= pivot > 0
    return found


@functools.cache
def alarm_rates(rows, cols):
    """The share of noise matrices whose largest value exceeds the threshold, for each gate."""
    generator = np.random.default_rng([rows, cols])
    thresholds = [gate.threshold(rows=rows, cols=cols, noise_std=NOISE_STD) / NOISE_STD for gate in GATES.values()]
    alarms = np.zeros(len(GATES))
    for _ in range(20):  # in parts, for memory
        main, beside = tridiagonal(rows, cols, DRAWS // 20, generator, length=leading_length(min(rows, cols)))
        alarms += [np.sum(exceeds(main, beside, threshold**2)) for threshold in thresholds]
    return alarms / DRAWS


def standard_error(rate, draws):
    return np.sqrt(rate * (1 - rate) / draws)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_as_many_alarms_on_pure_noise_as_the_gate_says(rows, cols):
    for rate, measured in zip(GATES, alarm_rates(rows, cols)):
        # 4 standard errors: 5% of a rate of 0.1, 16% of 0.01. The law itself is off by 2% at most at these sizes.
        assert abs(measured - rate) < 4 * standard_error(rate, DRAWS) + 0.02 * rate


def test_rates_of_all_shapes_together():
    # Nine times the draws: an error common to all shapes shows if it is 3% of 0.1 or 6% of 0.01.
    measured = np.mean([alarm_rates(*shape) for shape in SHAPES], axis=0)
    for rate, mean in zip(GATES, measured):
        assert abs(mean - rate) < 4 * standard_error(rate, DRAWS * len(SHAPES)) + 0.01 * rate


def test_the_paper_s_gate_passes_a_sixth_of_pure_noise():
    # Why Kappa(1.0) needs an alternative; 0.17 in the limit (Tracy-Widom's law at 0).
    main, beside = tridiagonal(768, 768, 4000, np.random.default_rng(1), length=leading_length(768))
    edge = Kappa(1.0).threshold(rows=768, cols=768, noise_std=1.0)
    assert np.mean(exceeds(main, beside, edge**2)) == pytest.approx(0.154, abs=4 * standard_error(0.154, 4000))


@pytest.mark.parametrize(("rows", "cols"), [(30, 30), (48, 20), (6, 200)])
def test_the_chi_variables_have_the_law_of_gaussian_matrices(rows, cols):
    draws = 3000
    generator = np.random.default_rng(rows)
    noise = generator.standard_normal((draws, rows, cols))
    gaussian = np.linalg.svd(noise, compute_uv=False)[:, 0]
    main, beside = tridiagonal(rows, cols, draws, generator)
    chi = np.sqrt([largest_eigenvalue(main[:, i], beside[:, i]) for i in range(draws)])
    assert stats.ks_2samp(gaussian, chi).pvalue > 1e-3
    # The largest value has a spread of about 0.4: its mean is known to 0.01.
    assert np.mean(chi) == pytest.approx(np.mean(gaussian), abs=0.04)


def largest_eigenvalue(main, beside):
    last = len(main) - 1
    return linalg.eigh_tridiagonal(main, np.sqrt(beside), eigvals_only=True, select="i", select_range=(last, last))[0]


@pytest.mark.parametrize(("rows", "cols"), [(384, 384), (768, 3072)])
def test_leading_rows_and_pivots_decide_as_the_whole_matrix_does(rows, cols):
    main, beside = tridiagonal(rows, cols, 20, np.random.default_rng(2))
    length = leading_length(min(rows, cols))
    for i in range(20):
        whole = largest_eigenvalue(main[:, i], beside[:, i])
        part = largest_eigenvalue(main[:length, i], beside[: length - 1, i])
        assert part == pytest.approx(whole, rel=1e-11)
        around = np.array([whole * (1 - 1e-9), whole * (1 + 1e-9)])
        np.testing.assert_array_equal(exceeds(main[:, [i, i]], beside[:, [i, i]], around), [True, False])


def test_seldom_more_components_are_kept_than_the_signal_has():
    # Weyl: the (k + 1)-th value of a signal of rank k plus noise is at most the largest of the noise.
    draws, rank = 3000, 1
    shape = {"rows": 24, "cols": 40, "noise_std": NOISE_STD}
    noisy = NOISE_STD * np.random.default_rng(3).standard_normal((draws, 24, 40))
    noisy[:, 0, 0] += 20 * NOISE_STD
    values = np.linalg.svd(noisy, compute_uv=False)
    kept = np.sum(TracyWidom(0.1, per="component").passes(values, **shape), axis=1)
    too_many = np.mean(kept > rank)
    assert too_many < 0.1 + 4 * standard_error(0.1, draws)
    assert too_many > 0.02  # and not far below: the second value is the largest of noise of 23 x 39
    assert np.all(kept >= rank)
