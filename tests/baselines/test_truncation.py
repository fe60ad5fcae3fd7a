"""Low-rank truncation against NumPy's SVD; what passes through; one program for many shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.baselines.truncation import truncate_rank
from dp_rmt.denoising.matrix_view import MatrixAxes


def truncated(y, rank):
    """Of each matrix along the leading axes, by NumPy in float64."""
    u, s, vt = np.linalg.svd(np.asarray(y, np.float64), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("svd", ["exact", "gram"])
@pytest.mark.parametrize("shape", [(3, 20, 36), (36, 20), (16, 16)])
def test_it_keeps_the_leading_components(svd, shape):
    y = normal(*shape)
    truncate = truncate_rank(3, svd=svd)
    found, _ = jax.jit(truncate.update)({"kernel": y}, truncate.init({"kernel": y}))
    np.testing.assert_allclose(found["kernel"], truncated(y, 3), atol=5e-5)


def test_other_leaves_and_thin_matrices_pass_unchanged():
    updates = {
        "embedding": normal(30, 20),
        "bias": normal(20).astype(jnp.bfloat16),
        "head": {"kernel": normal(20, 2)},
        "short": {"kernel": normal(8, 50)},
    }
    found, _ = truncate_rank(8).update(updates, truncate_rank(8).init(updates))
    jax.tree.map(np.testing.assert_array_equal, found, updates)
    assert found["bias"].dtype == jnp.bfloat16


def test_every_leaf_of_many_shapes_gets_its_own_matrix_back():
    updates = {
        name: {"kernel": normal(*shape, seed=seed)}
        for seed, (name, shape) in enumerate(
            {"a": (2, 16, 24), "b": (24, 16), "c": (16, 24), "d": (3, 2, 16, 16)}.items()
        )
    }
    truncate = truncate_rank(2)
    found, _ = jax.jit(truncate.update)(updates, truncate.init(updates))
    for name in updates:
        np.testing.assert_allclose(found[name]["kernel"], truncated(updates[name]["kernel"], 2), atol=5e-5)


def test_the_matrix_rule_decides():
    updates = {"attention": normal(16, 2, 12)}  # (in, heads, head_dim)
    truncate = truncate_rank(2, matrix_rule=lambda path, leaf: MatrixAxes(rows=(0,), cols=(1, 2)))
    found, _ = truncate.update(updates, truncate.init(updates))
    expected = truncated(np.asarray(updates["attention"]).reshape(16, 24), 2).reshape(16, 2, 12)
    np.testing.assert_allclose(found["attention"], expected, atol=5e-5)


def test_of_noise_it_keeps_what_theory_says():
    rows, cols, rank = 100, 200, 2
    noise = {"kernel": normal(8, rows, cols)}
    found, _ = truncate_rank(rank).update(noise, truncate_rank(rank).init(noise))
    share = float(jnp.sum(jnp.square(found["kernel"])) / jnp.sum(jnp.square(noise["kernel"])))
    # The leading values of so small a matrix are a few percent below the edge (Tracy & Widom).
    np.testing.assert_allclose(share, rank * (np.sqrt(rows) + np.sqrt(cols)) ** 2 / (rows * cols), rtol=0.08)


def test_it_is_stateless_and_float32():
    updates = {"kernel": normal(16, 16).astype(jnp.bfloat16)}
    truncate = truncate_rank()
    state = truncate.init(updates)
    found, after = truncate.update(updates, state)
    assert jax.tree.leaves(state) == jax.tree.leaves(after) == []
    assert found["kernel"].dtype == jnp.float32
    assert np.linalg.matrix_rank(np.asarray(found["kernel"]), tol=1e-4) == 4


def test_it_refuses():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        truncate_rank(0)
    with pytest.raises(ValueError, match="'exact' or 'gram', got 'lanczos'"):
        truncate_rank(2, svd="lanczos")  # type: ignore[arg-type]
