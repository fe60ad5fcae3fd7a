"""The shrinkers against the textbook equations, at their edges, and on the design's simulated numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.random_matrix import marchenko_pastur, shrinkage, singular_values

pytestmark = pytest.mark.thorough

ALL = ["frobenius", "operator", "operator_rectangular", "nuclear", "hard_threshold", "optshrink"]
MODEL_BASED = [name for name in ALL if name != "optshrink"]


def textbook(name, y, rows, cols, noise_std):
    """The equations as published, in double precision."""
    variance = noise_std**2
    a = y**2 - variance * (rows + cols)
    root = np.sqrt(a**2 - 4 * variance**2 * rows * cols)
    signal = np.sqrt((a + root) / 2)
    if name == "frobenius":
        return root / y
    if name == "nuclear":
        product = variance * np.sqrt(rows * cols)
        return np.maximum(signal**4 - product**2 - product * signal * y, 0) / (signal**2 * y)
    if name == "hard_threshold":
        beta = min(rows, cols) / max(rows, cols)
        cut = np.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + np.sqrt(beta**2 + 14 * beta + 1)))
        return np.where(y > cut * np.sqrt(max(rows, cols)) * noise_std, y, 0)
    ratio = (signal**2 + variance * min(rows, cols)) / (signal**2 + variance * max(rows, cols))
    return signal * (np.sqrt(ratio) if name == "operator_rectangular" else 1)


@pytest.mark.parametrize("name", MODEL_BASED)
@pytest.mark.parametrize(
    ("rows", "cols", "noise_std"),
    [(6, 6, 0.37), (6, 6, 1e6), (4, 300, 0.37), (300, 4, 1e-12), (60, 90, 1e-12)],
)
def test_equations_in_float32_near_and_far_from_the_edge(name, rows, cols, noise_std):
    edge = marchenko_pastur.bulk_edge(rows=rows, cols=cols, noise_std=noise_std)
    gaps = np.array([1e-3, 1e-2, 0.1, 0.5, 1.0, 10.0, 1e4])
    y = (edge * (1 + gaps)).astype(np.float32)
    expected = textbook(name, y.astype(np.float64), rows, cols, noise_std)
    actual = getattr(shrinkage, name)(y, rows=rows, cols=cols, noise_std=noise_std)
    # The edge is rounded to 6e-8 of itself in float32, and sqrt(gap) by that over 2 sqrt(gap); then rounding.
    error = np.abs(np.asarray(actual, np.float64) - expected) / edge
    assert np.all(error <= 2e-7 / np.sqrt(gaps) + 3e-7 * (1 + gaps)), error


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("rows", "cols"), [(5, 5), (5, 80), (80, 5)])
def test_zero_at_and_below_the_edge_and_no_larger_than_observed_above(name, rows, cols):
    edge = np.float32(marchenko_pastur.bulk_edge(rows=rows, cols=cols, noise_std=0.3))
    y = np.array([4 * edge, np.nextafter(edge, np.float32(99)), edge, edge / 2, 0], np.float32)
    shrunken = np.asarray(getattr(shrinkage, name)(y, rows=rows, cols=cols, noise_std=0.3))
    np.testing.assert_array_equal(shrunken[2:], 0.0)
    assert np.all((shrunken >= 0) & (shrunken <= y))
    assert shrunken[0] > 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("values", [[3.0, 2.0, 1e-9, 0.0], [3.0, 2.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
def test_identity_without_noise_also_traced(name, values):
    shrink = jax.jit(lambda y, noise_std: getattr(shrinkage, name)(y, rows=4, cols=9, noise_std=noise_std))
    with jax.debug_nans(True):
        np.testing.assert_allclose(shrink(jnp.array(values), 0.0), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_batch_axes_and_transposition(name):
    y = np.sort(np.random.default_rng(0).uniform(0, 40, (2, 3, 8)).astype(np.float32))[..., ::-1]
    shrink = getattr(shrinkage, name)
    batched = shrink(y, rows=8, cols=100, noise_std=1.0)
    assert batched.shape == y.shape
    np.testing.assert_allclose(batched[1, 2], shrink(y[1, 2], rows=8, cols=100, noise_std=1.0), rtol=1e-5)
    np.testing.assert_allclose(batched, shrink(y, rows=100, cols=8, noise_std=1.0), rtol=1e-5)
    tiny = shrink(1e-9 * y, rows=8, cols=100, noise_std=1e-9)
    np.testing.assert_allclose(1e-9 * batched, tiny, rtol=2e-4, atol=0)


def test_published_thresholds():
    # Square matrices: the hard threshold is 4 / sqrt(3) sqrt(n) s.
    kept = shrinkage.hard_threshold([23.095, 23.094 - 1e-3], rows=100, cols=100, noise_std=1.0)
    np.testing.assert_allclose(kept, [23.095, 0])
    # The nuclear shrinker is l - 2 / l at n s^2 = 1, with the root l = sqrt(2), y = l + 1 / l = 3 / sqrt(2).
    root = 3 / np.sqrt(2) * 10
    nuclear = shrinkage.nuclear([root * 0.999, root * 1.001], rows=100, cols=100, noise_std=1.0)
    assert nuclear[0] == 0
    assert 0 < nuclear[1] < 1


def test_optshrink_equals_the_formula_of_its_tail():
    # An independent count: D as a trace over the diagonal noise matrix, its slope by central differences.
    rows, cols, noise_std = 10, 25, 1.0
    y = np.array([15.0, 9.0, 7.5, 6.0, 5.0, 4.5, 4.0, 3.0, 2.5, 2.0])
    num_signals = int(np.sum(y > marchenko_pastur.bulk_edge(rows=rows, cols=cols, noise_std=noise_std)))
    assert num_signals == 2
    tail = np.zeros((rows - num_signals, cols - num_signals))
    np.fill_diagonal(tail, y[num_signals:])

    def d_transform(z):
        left = np.trace(z * np.linalg.inv(z**2 * np.eye(len(tail)) - tail @ tail.T)) / tail.shape[0]
        right = np.trace(z * np.linalg.inv(z**2 * np.eye(tail.shape[1]) - tail.T @ tail)) / tail.shape[1]
        return left * right

    step = 1e-5
    slopes = [(d_transform(z + step) - d_transform(z - step)) / (2 * step) for z in y[:2]]
    expected = [-2 * d_transform(z) / slope for z, slope in zip(y[:2], slopes)]
    actual = shrinkage.optshrink(y, rows=rows, cols=cols, noise_std=noise_std)
    np.testing.assert_allclose(actual[:2], expected, rtol=1e-5)
    np.testing.assert_array_equal(actual[2:], 0)


@pytest.mark.parametrize(("rows", "cols"), [(256, 256), (64, 512)])
def test_optshrink_is_close_to_frobenius_without_knowing_the_noise_exactly(rows, cols):
    noise_std = 0.01
    noisy = noise_std * np.random.default_rng(0).standard_normal((rows, cols))
    threshold = marchenko_pastur.detection_threshold(rows=rows, cols=cols, noise_std=noise_std)
    noisy[0, 0] += 5 * threshold
    noisy[1, 1] += 3 * threshold
    y = np.linalg.svd(noisy, compute_uv=False)
    known = shrinkage.frobenius(y, rows=rows, cols=cols, noise_std=noise_std)
    for guess in (noise_std, 1.1 * noise_std, 1.3 * noise_std):
        data_driven = shrinkage.optshrink(y, rows=rows, cols=cols, noise_std=guess)
        np.testing.assert_allclose(data_driven[:2], known[:2], rtol=0.02)
    # What knowing the noise 30% too high costs the model-based shrinker: more than ten times that.
    wrong = shrinkage.frobenius(y, rows=rows, cols=cols, noise_std=1.3 * noise_std)
    assert abs(wrong[1] / known[1] - 1) > 0.05


def test_optshrink_without_a_tail_is_frobenius():
    y = np.array([[50.0, 40.0, 30.0], [50.0, 40.0, 1.0]], np.float32)
    shape = {"rows": 3, "cols": 64, "noise_std": 1.0}
    data_driven, known = shrinkage.optshrink(y, **shape), shrinkage.frobenius(y, **shape)
    np.testing.assert_array_equal(data_driven[0], known[0])
    assert np.all(data_driven[1, :2] != known[1, :2])


def test_optshrink_needs_the_whole_spectrum():
    with pytest.raises(ValueError, match="last axis must have length"):
        shrinkage.optshrink(np.ones(3), rows=4, cols=5, noise_std=1.0)


def cosines_to_signal(rows, cols, strengths, weights_of, seed=0):
    """Cosine between each re-weighted noisy matrix and the clean one; `strengths` in detection thresholds."""
    signal = np.zeros((rows, cols), np.float32)
    threshold = marchenko_pastur.detection_threshold(rows=rows, cols=cols, noise_std=1.0)
    np.fill_diagonal(signal, np.pad(np.asarray(strengths) * threshold, (0, min(rows, cols) - len(strengths))))
    noisy = jnp.asarray(signal + np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32))
    svd = singular_values.short_side_svd(noisy, method="gram")
    cosines = []
    for shrink in weights_of:
        shrunken = shrink(svd.values, rows=rows, cols=cols, noise_std=1.0)
        denoised = singular_values.scale_spectrum(noisy, svd.basis, shrunken / svd.values)
        cosines.append(float(jnp.vdot(denoised, signal) / jnp.linalg.norm(denoised) / np.linalg.norm(signal)))
    return cosines


def identity(y, **shape):
    return y


def cut_at_the_edge(y, **shape):
    return jnp.where(y > marchenko_pastur.bulk_edge(**shape), y, 0)


@pytest.mark.parametrize(
    ("rows", "cols", "noisy", "denoised"),
    [(768, 768, 0.08, 0.66), (16, 1024, 0.20, 0.46), (8, 4096, 0.17, 0.32)],
)
def test_cosines_of_a_rank_four_signal(rows, cols, noisy, denoised):
    draws = 1 if rows > 100 else 40
    cosines = np.mean(
        [
            cosines_to_signal(rows, cols, [2, 1, 0.5, 0.25], [identity, shrinkage.frobenius], seed=seed)
            for seed in range(draws)
        ],
        axis=0,
    )
    # The table has two digits; one draw of 768 x 768 scatters by 0.01.
    assert cosines[0] == pytest.approx(noisy, abs=0.01)
    assert cosines[1] == pytest.approx(denoised, abs=0.02)


def test_cosines_of_five_detectable_spikes():
    shrinkers = [identity, cut_at_the_edge, shrinkage.operator, shrinkage.frobenius, shrinkage.optshrink]
    cosines = cosines_to_signal(768, 3072, [8, 4, 2, 1.5, 1.2, 0.8, 0.6], shrinkers)
    assert cosines[:4] == sorted(cosines[:4])
    # These strengths have the expected cosines .234, .908, .930, .938; one draw scatters by about 0.005.
    np.testing.assert_allclose(cosines[:4], [0.234, 0.907, 0.930, 0.938], atol=0.01)
    assert cosines[4] == pytest.approx(cosines[3], abs=0.002)
