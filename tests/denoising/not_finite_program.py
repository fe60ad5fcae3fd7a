"""Matrices with an entry that is not finite beside others, through everything that decomposes; in a process of its own.

LAPACK's SVD does not come back from some infinite entries: whoever starts this must set a limit. Prints "done".
"""

from __future__ import annotations

import experiments  # noqa: F401  (sets XLA's flags before JAX starts)

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dp_rmt import denoise_matrices, scale_by_denoised_adam
from dp_rmt.baselines.muon import private_muon
from dp_rmt.baselines.truncation import truncate_rank
from dp_rmt.denoising.joins import shared_inputs
from dp_rmt.random_matrix import singular_values, subspace

STD, BAD = 0.05, 1
PLACES = ((0, 0), (7, 3), (-1, -1))
VALUES = (np.inf, -np.inf, np.nan)


def matrices(rows: int, cols: int, value: float, place: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """``(three with one entry of this value in the second, the same without)``, components well above the noise."""
    rng = np.random.default_rng(rows)
    spikes = rng.standard_normal((3, rows, 1)) * rng.standard_normal((3, 1, cols))
    good = (0.2 * spikes + STD * rng.standard_normal((3, rows, cols))).astype(np.float32)
    bad = good.copy()
    bad[BAD][place] = value
    return bad, good


def check_denoisers() -> None:
    """All come out as they went in, and what they are stacked with as if alone."""
    for options in (
        {},
        {"svd": "gram", "rescale": "signal_norm"},
        {"shrinker": "optshrink"},
        {"svd": "subspace", "blend": "stein", "rescale": "none", "below_edge": "keep"},
    ):
        denoise = denoise_matrices(STD, **options)
        update = jax.jit(denoise.update)
        rows, cols = (140, 150) if options.get("svd") == "subspace" else (16, 16)  # where it searches a subspace
        for value, place in zip(VALUES, PLACES, strict=True):
            bad, good = ({"kernel": jnp.asarray(x)} for x in matrices(rows, cols, value, place))
            state = denoise.init(bad)
            for _ in range(2):  # the search for singular vectors goes on from what it found
                found, state = update(bad, state)
            seen = state.diagnostics["kernel"]
            expected, _ = update(good, update(good, denoise.init(good))[1])
            np.testing.assert_array_equal(found["kernel"][BAD], bad["kernel"][BAD])
            for other in (0, 2):
                np.testing.assert_array_equal(found["kernel"][other], expected["kernel"][other])
                assert not np.array_equal(found["kernel"][other], bad["kernel"][other])
            assert seen.kept_rank[BAD] == 0
            assert np.isnan(seen.top_over_edge[BAD])
            assert np.isfinite(seen.top_over_edge[np.array([0, 2])]).all()


def check_optimizers() -> None:
    """A bad entry stays in its own moments; `apply_if_finite` leaves its update out."""
    bad, good = ({"kernel": jnp.asarray(x), "bias": jnp.ones(3)} for x in matrices(16, 16, np.inf, (0, 0)))
    for transform in (
        scale_by_denoised_adam(STD, second_moment="denoised"),
        truncate_rank(2, svd="exact"),
        private_muon(0.1, optax.sgd(0.1)),
    ):
        update = jax.jit(transform.update)
        state, clean = transform.init(good), transform.init(good)
        for gradient in (bad, good):
            found, state = update(gradient, state, good)
            expected, clean = update(good, clean, good)
            np.testing.assert_allclose(found["kernel"][jnp.array([0, 2])], expected["kernel"][jnp.array([0, 2])])
            np.testing.assert_array_equal(found["bias"], expected["bias"])
        guarded = optax.apply_if_finite(transform, 5)
        state = guarded.init(good)
        for gradient in (bad, good):
            found, state = jax.jit(guarded.update)(gradient, state, good)
        alone, _ = update(good, transform.init(good), good)
        np.testing.assert_allclose(found["kernel"], alone["kernel"], rtol=1e-5)
    truncated, _ = truncate_rank(2).update(bad, truncate_rank(2).init(bad))
    np.testing.assert_array_equal(truncated["kernel"][BAD], bad["kernel"][BAD])


def check_blocks() -> None:
    """Of leaves side by side, all pass: they are one matrix."""
    bad, good = matrices(16, 16, np.inf, (0, 0))
    tree = {"query": {"kernel": jnp.asarray(bad)}, "key": {"kernel": jnp.asarray(good)}}
    denoise = denoise_matrices(STD, join=shared_inputs)
    found, _ = jax.jit(denoise.update)(tree, denoise.init(tree))
    for name, leaf in tree.items():
        np.testing.assert_array_equal(found[name]["kernel"][BAD], leaf["kernel"][BAD])
        assert not np.array_equal(found[name]["kernel"][0], leaf["kernel"][0])


def check_plain_functions() -> None:
    """NaN for the matrix, numbers for the others."""
    for value, place in zip(VALUES, PLACES, strict=True):
        bad, good = (jnp.asarray(x) for x in matrices(16, 16, value, place))
        for method in ("exact", "gram"):
            found = singular_values.short_side_svd(bad, method=method)
            expected = singular_values.short_side_svd(good, method=method)
            for a, b in zip(found, expected, strict=True):
                assert np.isnan(a[BAD]).all()
                np.testing.assert_array_equal(a[0], b[0])
        start = subspace.initial_start(3, 16, 16)
        result = subspace.subspace_svd(bad, start=start, cut=STD * 8, key=jax.random.key(0))
        assert result.is_complete.tolist() == [True, False, True]
        assert np.isfinite(result.start).all()


if __name__ == "__main__":
    check_plain_functions()
    check_denoisers()
    check_optimizers()
    check_blocks()
    print("done")
