"""The blend of noisy and denoised matrix against both of them, and the risk estimate against the true error."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from dp_rmt.denoising.gates import Kappa, TracyWidom
from dp_rmt.random_matrix import marchenko_pastur, shrinkage, stein

NOISE_STD = 0.7
DRAWS = 60
SHAPES = [(96, 96), (64, 256), (8, 512), (200, 100)]
GATES = {"edge": Kappa(1.0), "tracy_widom": TracyWidom(0.01), "component": TracyWidom(0.01, per="component")}
SHRINKERS = {"frobenius": shrinkage.frobenius, "operator": shrinkage.operator}


def spikes(strongest, weakest, rank):
    return lambda generator, count: np.geomspace(strongest, weakest, min(rank, count // 2 or 1))


# Singular values of the signal in units of the detection threshold, given the number of all of them.
SIGNALS = {
    "pure noise": lambda generator, count: [],
    "weak full rank": lambda generator, count: 0.7 * np.minimum(abs(generator.standard_normal(count)), 1.2),
    "nearly detectable full rank": lambda generator, count: np.full(count, 0.95),
    "strong full rank": lambda generator, count: 3 + 5 * abs(generator.standard_normal(count)),
    "one spike at 1.05": spikes(1.05, 1.05, 1),
    "one spike at 1.3": spikes(1.3, 1.3, 1),
    "one spike at 2": spikes(2, 2, 1),
    "one spike at 10": spikes(10, 10, 1),
    "five weak spikes": spikes(1.3, 1.05, 5),
    "five strong spikes": spikes(10, 2, 5),
    "thirty weak spikes": spikes(1.3, 1.05, 30),
    "thirty strong spikes": spikes(10, 2, 30),
    "power law": lambda generator, count: 6 / np.arange(1, count + 1) ** 0.7,
}


@functools.cache
def draws(signal, rows, cols, count=DRAWS):
    """Signal l (R,); the noisy singular values y (count, R), and `u_i^T G v_i` of their singular vectors."""
    generator = np.random.default_rng([rows, cols, *signal.encode()])
    shorter = min(rows, cols)
    l = np.zeros(shorter)
    strengths = np.asarray(SIGNALS[signal](generator, shorter))
    l[: len(strengths)] = strengths * marchenko_pastur.detection_threshold(rows=rows, cols=cols, noise_std=NOISE_STD)
    noisy = NOISE_STD * generator.standard_normal((count, rows, cols))
    noisy[:, range(shorter), range(shorter)] += l  # Gaussian noise looks alike in every basis
    left, y, right = np.linalg.svd(noisy, full_matrices=False)
    return l, y, np.einsum("bki,k,bik->bi", left[:, :shorter], l, right[:, :, :shorter])


@functools.partial(jax.jit, static_argnames=("shrinker", "gate", "rows", "cols", "leading"))
def denoise(y, *, shrinker, gate, rows, cols, leading=None):
    """`(f, a, div D, estimated risk of D)` for the blend `(1 - a) Y + a D`, D with the singular values f."""
    shape = {"rows": rows, "cols": cols, "noise_std": NOISE_STD}
    f = SHRINKERS[shrinker](y, **shape)
    kept = GATES[gate].passes(y, **shape) & (f > 0)
    f = kept * f
    slope = kept * stein.slope_of(SHRINKERS[shrinker])(y, **shape)
    divergence = stein.divergence(y[:, :leading], f[:, :leading], slope[:, :leading], **shape)
    distance = jax.numpy.sum((f - y) ** 2, axis=1)
    estimate = stein.risk(distance, divergence, **shape)
    return f, stein.blend_weight(distance, divergence, **shape), divergence, estimate


def squared_errors(weights, l, overlaps):
    """`|X - G|^2` for the matrix X that has the singular vectors of Y and these singular values."""
    return np.sum(weights**2 - 2 * weights * overlaps, axis=1) + np.sum(l**2)


@pytest.mark.parametrize("gate", ["edge", "tracy_widom"])
@pytest.mark.parametrize("shrinker", SHRINKERS)
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_the_blend_is_never_worse_than_the_better_of_the_two(rows, cols, signal, shrinker, gate):
    l, y, overlaps = draws(signal, rows, cols)
    for leading in (None, min(rows, cols) // 2):  # all values given, and only half of them
        if leading and np.any(y[:, leading:] > marchenko_pastur.bulk_edge(rows=rows, cols=cols, noise_std=NOISE_STD)):
            continue  # a backend that computes leading values computes all that exceed the edge
        f, a, *_ = (
            np.asarray(x, float)
            for x in denoise(y, shrinker=shrinker, gate=gate, rows=rows, cols=cols, leading=leading)
        )
        noisy, denoised = squared_errors(y, l, overlaps), squared_errors(f, l, overlaps)
        blend = squared_errors(y + a[:, None] * (f - y), l, overlaps)
        # What a refused matrix is without the blend: left as it is.
        published = np.where(np.any(f > 0, axis=1), denoised, noisy)
        best = min(noisy.mean(), denoised.mean(), published.mean())
        # Choosing a from data costs about s^2 for the whole matrix, of the m n s^2 that the noise has. (Measured: at
        # most 1.3 s^2 and 0.6% with all values given; with half of them 0.4% more.)
        assert blend.mean() <= 1.01 * best + 2 * NOISE_STD**2
        # No shrinker and no gate can make it worse than the noise.
        assert blend.mean() <= 1.002 * noisy.mean()


@pytest.mark.parametrize(("signal", "gain"), [("nearly detectable full rank", 0.25), ("power law", 0.08)])
def test_the_blend_is_better_than_both_where_the_signal_is_not_of_low_rank(signal, gain):
    l, y, overlaps = draws(signal, 96, 96)
    f, a, *_ = (np.asarray(x, float) for x in denoise(y, shrinker="frobenius", gate="edge", rows=96, cols=96))
    blend = squared_errors(y + a[:, None] * (f - y), l, overlaps).mean()
    assert blend < (1 - gain) * min(squared_errors(x, l, overlaps).mean() for x in (y, f))


@pytest.mark.parametrize("signal", ["one spike at 2", "five strong spikes", "weak full rank", "power law"])
@pytest.mark.parametrize(("rows", "cols"), [(96, 96), (64, 256), (200, 100)])
@pytest.mark.parametrize(("gate", "leading"), [("edge", None), ("component", None), ("edge", 20)])
def test_the_estimate_of_the_error_is_unbiased(rows, cols, signal, gate, leading):
    count = 150
    l, y, overlaps = draws(signal, rows, cols, count)
    f, _, div_d, estimate = (
        np.asarray(x, float) for x in denoise(y, shrinker="frobenius", gate=gate, rows=rows, cols=cols, leading=leading)
    )
    # Most of the fluctuation is that of |N|^2 and <N, G>, whose means are known: regressed out.
    noise_dot_signal = np.sum(y * overlaps, axis=1) - np.sum(l**2)
    noise = np.sum(y**2, axis=1) - np.sum(l**2) - 2 * noise_dot_signal - rows * cols * NOISE_STD**2
    controls = np.column_stack([np.ones(count), noise_dot_signal, noise])
    difference = estimate - squared_errors(f, l, overlaps)
    bias, *_ = coefficients = np.linalg.lstsq(controls, difference, rcond=None)[0]
    tolerance = 4 * np.std(difference - controls @ coefficients) / np.sqrt(count)
    from_divergence = 2 * NOISE_STD**2 * div_d.mean()
    if gate == "component":  # the jump at the threshold is missing from the divergence
        tolerance += 0.003 * rows * cols * NOISE_STD**2
    if leading:  # the law of pure noise in the place of the values not given; a signal below the edge widens them
        tolerance += (0.02 if "spike" in signal else 0.08) * from_divergence
    assert abs(bias) < tolerance
    assert tolerance < 0.18 * from_divergence  # a sharp statement: a divergence off by a fifth is seen
