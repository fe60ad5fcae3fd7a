"""DP-Muon: every matrix orthogonalized alone, in any layout; other leaves by their own optimizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from dp_rmt.baselines.muon import private_muon
from dp_rmt.denoising.matrix_view import MatrixAxes

LAYERS, ROWS, COLS = 3, 16, 40


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tree(seed):
    return {
        "layers": {"kernel": normal(LAYERS, ROWS, COLS, seed=seed), "bias": normal(LAYERS, COLS, seed=seed + 1)},
        "embedding": normal(30, ROWS, seed=seed + 2),
        "head": {"kernel": normal(ROWS, 2, seed=seed + 3)},
    }


def run(optimizer, gradients, params):
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
    return updates


def brute_force(gradients, beta=0.95, nesterov=True):
    """Momentum and five Newton-Schulz steps for one matrix (rows <= cols), as published; scale does not matter."""
    m, t = np.zeros_like(gradients[0], np.float64), len(gradients)
    for g in gradients:
        m = beta * m + (1 - beta) * np.asarray(g, np.float64)
    x = m / (1 - beta**t)
    if nesterov:
        x = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * np.asarray(gradients[-1], np.float64) / (1 - beta**t)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_follow_the_published_recursion_layer_by_layer(nesterov):
    gradients = [tree(seed) for seed in (0, 10, 20)]
    updates = run(private_muon(0.02, optax.adam(1e-3), nesterov=nesterov), gradients, tree(99))
    for layer in range(LAYERS):
        expected = brute_force([g["layers"]["kernel"][layer] for g in gradients], nesterov=nesterov)
        expected = -0.02 * np.sqrt(COLS / ROWS) * expected
        np.testing.assert_allclose(updates["layers"]["kernel"][layer], expected, atol=2e-5)
        values = np.linalg.svd(expected, compute_uv=False) / (0.02 * np.sqrt(COLS / ROWS))
        assert 0.6 < values.min() < values.max() < 1.25  # about orthogonal: 0.68 to 1.13 in theory


def test_other_leaves_follow_their_own_optimizer():
    gradients = [tree(seed) for seed in (0, 10, 20)]
    others = optax.adamw(1e-3, weight_decay=0.1)
    updates = run(private_muon(0.02, others), gradients, tree(99))
    alone = run(others, gradients, tree(99))
    for path in (("layers", "bias"), ("embedding",), ("head", "kernel")):
        mine, expected = updates, alone
        for name in path:
            mine, expected = mine[name], expected[name]
        # An entry is a sum of two of up to 1e-3, which may cancel; both programs round these, each in its own order.
        np.testing.assert_allclose(mine, expected, rtol=1e-6, atol=1e-3 * np.finfo(np.float32).eps)


def test_on_flat_matrices_it_is_muon_of_optax():
    gradients = [{"kernel": normal(ROWS, COLS, seed=seed)} for seed in range(2)]
    params = {"kernel": normal(ROWS, COLS, seed=9)}
    mine = run(private_muon(0.02, optax.adam(1e-3), weight_decay=0.1), gradients, params)
    np.testing.assert_allclose(mine["kernel"], run(contrib.muon(0.02, weight_decay=0.1), gradients, params)["kernel"])


def test_the_matrix_rule_decides_and_its_axes_are_kept():
    """(in, heads, head_dim) is the matrix (in, heads * head_dim)."""
    g, rule = normal(ROWS, 4, 10), lambda path, leaf: MatrixAxes(rows=(0,), cols=(1, 2))
    updates = run(private_muon(1.0, optax.adam(1e-3), matrix_rule=rule), [{"query": g}], {"query": g})
    expected = -np.sqrt(40 / ROWS) * brute_force([g.reshape(ROWS, 40)])
    np.testing.assert_allclose(updates["query"].reshape(ROWS, 40), expected, atol=1e-3)


def test_consistent_rms_makes_steps_of_that_size():
    g = {"kernel": normal(LAYERS, ROWS, COLS)}
    updates = run(private_muon(1.0, optax.adam(1e-3), consistent_rms=0.2), [g], g)
    # sqrt(max(rows, cols)) times an orthogonal matrix has mean square 1, and the singular values are only about 1.
    assert float(jnp.sqrt(jnp.mean(jnp.square(updates["kernel"])))) == pytest.approx(0.2, rel=0.25)


def test_a_schedule_sets_the_step():
    g = {"kernel": normal(ROWS, COLS)}
    first, second = (run(private_muon(lambda t: 0.1 / (t + 1), optax.adam(1e-3)), [g] * n, g) for n in (1, 2))
    np.testing.assert_allclose(np.linalg.norm(first["kernel"]) / np.linalg.norm(second["kernel"]), 2.0, rtol=1e-4)
