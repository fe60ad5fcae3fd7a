"""The short-side SVD and the spectral multiplier against NumPy's SVD in double precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.random_matrix import singular_values

METHODS = ["exact", "gram"]
SHAPES = [(12, 12), (8, 40), (40, 8), (1, 9), (9, 1)]


def random_matrices(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_values_and_basis(method, rows, cols):
    matrices = random_matrices(3, rows, cols)
    short = min(rows, cols)
    svd = singular_values.short_side_svd(jnp.asarray(matrices), method=method)
    assert svd.basis.shape == (3, short, short)
    assert svd.values.shape == (3, short)
    largest = np.linalg.norm(matrices, 2, axis=(-2, -1)).max()
    expected = np.linalg.svd(matrices.astype(np.float64), compute_uv=False)
    # gram: error 1e-7 y_1^2 / y, and the smallest y of square matrices is about y_1 / 2 r.
    np.testing.assert_allclose(svd.values, expected, atol=1e-5 * largest)
    identity = np.tile(np.eye(short), (3, 1, 1))
    np.testing.assert_allclose(np.swapaxes(svd.basis, 1, 2) @ svd.basis, identity, atol=5e-6)
    gram = matrices @ np.swapaxes(matrices, 1, 2)
    if rows > cols:
        gram = np.swapaxes(matrices, 1, 2) @ matrices
    rebuilt = svd.basis * svd.values[:, None, :] ** 2 @ np.swapaxes(svd.basis, 1, 2)
    np.testing.assert_allclose(rebuilt, gram, atol=1e-5 * largest**2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_scale_spectrum_replaces_the_singular_values(method, rows, cols):
    matrices = random_matrices(2, rows, cols)
    left, values, right = np.linalg.svd(matrices.astype(np.float64), full_matrices=False)
    weights = np.linspace(1, 0.1, min(rows, cols)) ** 2
    expected = left * (weights * values)[:, None, :] @ right
    svd = singular_values.short_side_svd(jnp.asarray(matrices), method=method)
    scaled = singular_values.scale_spectrum(jnp.asarray(matrices), svd.basis, jnp.tile(weights, (2, 1)))
    assert scaled.shape == matrices.shape
    np.testing.assert_allclose(scaled, expected, atol=2e-5 * values.max())
    kept = singular_values.scale_spectrum(jnp.asarray(matrices), svd.basis, jnp.ones_like(svd.values))
    np.testing.assert_allclose(kept, matrices, atol=1e-5)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("kept", [1, 3, 8])  # below and above half of the shorter side: two ways to multiply
def test_what_the_leading_components_leave_out_is_scaled_by_the_complement(kept, rows, cols):
    kept = min(kept, rows, cols)
    matrices = random_matrices(2, rows, cols)
    left, values, right = np.linalg.svd(matrices.astype(np.float64), full_matrices=False)
    complement, weights = np.array([0.5, 0.0]), np.linspace(2.0, 0.1, kept)
    all_weights = np.tile(complement[:, None], values.shape[1])
    all_weights[:, :kept] = weights
    expected = left * (all_weights * values)[:, None, :] @ right
    basis = singular_values.short_side_svd(jnp.asarray(matrices)).basis[..., :kept]
    arguments = jnp.asarray(matrices), basis, jnp.tile(weights, (2, 1))
    scaled = singular_values.scale_spectrum(*arguments, complement=jnp.asarray(complement, jnp.float32))
    np.testing.assert_allclose(scaled, expected, atol=2e-5 * values.max())
    same = singular_values.scale_spectrum(*arguments[:2], jnp.ones((2, kept)), complement=1.0)
    np.testing.assert_array_equal(same, matrices)


def test_gram_agrees_with_exact_on_a_spiked_matrix():
    # What the denoiser asks of it: the components above the edge, under a signal 30 times the edge.
    matrices = random_matrices(1, 32, 128)
    matrices[0, 0, 0], matrices[0, 1, 1] = 500.0, 40.0
    results = []
    for method in METHODS:
        svd = singular_values.short_side_svd(jnp.asarray(matrices), method=method)
        weights = jnp.where(svd.values > 17.0, 0.9, 0.0)
        assert int(jnp.sum(weights > 0)) == 2
        results.append(singular_values.scale_spectrum(jnp.asarray(matrices), svd.basis, weights))
    np.testing.assert_allclose(results[0], results[1], atol=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_batch_axes_jit_and_low_precision(method):
    matrices = jnp.asarray(random_matrices(2, 3, 4, 6), jnp.bfloat16)
    svd = jax.jit(lambda batch: singular_values.short_side_svd(batch, method=method))(matrices)
    assert svd.basis.shape == (2, 3, 4, 4)
    assert svd.basis.dtype == svd.values.dtype == jnp.float32
    one = singular_values.short_side_svd(matrices[1, 2], method=method)
    np.testing.assert_allclose(svd.values[1, 2], one.values, rtol=1e-5)
    scaled = jax.jit(singular_values.scale_spectrum)(matrices, svd.basis, jnp.zeros_like(svd.values))
    assert scaled.dtype == jnp.float32
    np.testing.assert_array_equal(scaled, jnp.zeros((2, 3, 4, 6)))


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_rank_deficient_matrices_have_no_nan(method):
    matrices = np.zeros((2, 5, 7), np.float32)
    matrices[1] = np.outer(np.ones(5), np.ones(7))
    svd = singular_values.short_side_svd(jnp.asarray(matrices), method=method)
    assert np.isfinite(svd.basis).all()
    np.testing.assert_allclose(svd.values[0], 0.0, atol=0)
    # The square root of the rounding error of y_1^2 = 35 at worst.
    np.testing.assert_allclose(svd.values[1], [np.sqrt(35), 0, 0, 0, 0], atol=5e-3)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="is unknown"):
        singular_values.short_side_svd(jnp.ones((1, 2, 3)), method="subspace")
    with pytest.raises(ValueError, match="at least two"):
        singular_values.short_side_svd(jnp.ones(3))
    with pytest.raises(ValueError, match="do not fit"):
        singular_values.scale_spectrum(jnp.ones((1, 2, 3)), jnp.ones((1, 3, 3)), jnp.ones((1, 3)))
