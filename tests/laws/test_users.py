"""The laws of user-level privacy: neighbouring batches differ by all rows of one user, and a user is clipped as one.

The losses and the adversarial rows are those of `test_sensitivity`, with its allowance for rounding.
"""

from __future__ import annotations

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import clipped_grad

SENSITIVITY = runpy.run_path(str(Path(__file__).parent / "test_sensitivity.py"))
FIELDS, TOKENS, ROWS = (SENSITIVITY[name] for name in ("FIELDS", "TOKENS", "ROWS"))
distance, leafwise_losses = SENSITIVITY["distance"], SENSITIVITY["leafwise_losses"]
USERS, ROWS_PER_USER = 3, 4
METHODS = ["vmap", "bookkeeping", "ghost"]
ROUNDING = {"vmap": 2e-6, "bookkeeping": 5e-4, "ghost": 5e-4}
SETTINGS = [("flat", 0.1, None), ("automatic", 7.0, 1)]


@functools.cache
def clipping(method, clip="flat", l2_clip_norm=0.1, microbatch_size=None, unit="user"):
    """``(ClippedGradient, params)``, compiled once for each kind."""
    options = {"l2_clip_norm": l2_clip_norm, "normalize_by": 3.0, "clip": clip, "microbatch_size": microbatch_size}
    if method == "vmap":
        function = clipped_grad(leafwise_losses, unit=unit, **options)
        return function, {name: jnp.zeros(shape) for name, shape in FIELDS.items()}
    module = SENSITIVITY["TwoLayers"]()
    batch = {name: np.zeros((1, *shape), np.float32) for name, shape in FIELDS.items()}
    params = module.init(jax.random.key(0), {**batch, "ids": np.zeros((1, TOKENS), np.int32)})
    return ghost_clipped_grad(module.apply, method=method, unit=unit, **options), params


def ordinary_batch(seed, shape=(USERS, ROWS_PER_USER)):
    rng = np.random.default_rng(seed)
    batch = {name: rng.standard_normal((*shape, *of_row)).astype(np.float32) for name, of_row in FIELDS.items()}
    return {**batch, "ids": rng.integers(0, ROWS, (*shape, TOKENS)).astype(np.int32)}


def replaced(batch, mask, value):
    """The batch with something else in the rows of the mask."""
    return {
        name: np.where(mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), np.asarray(value).astype(x.dtype), x)
        if x.dtype == np.float32
        else x
        for name, x in batch.items()
    }


KINDS = ("any bits", "scaled", "ordinary")
PARTNERS = ("other", "equal", "opposite", "nearly opposite")


@st.composite
def batches(draw):
    """Users with rows that are extreme, equal, or each other's negatives; and which of the rows are there."""
    rng, batch = np.random.default_rng(draw(st.integers(0, 2**32))), ordinary_batch(0)
    for user in range(USERS):
        kind, partner = draw(st.sampled_from(KINDS)), draw(st.sampled_from(PARTNERS))
        for name in FIELDS:
            rows = batch[name][user]
            if kind == "any bits":
                rows[:] = rng.integers(0, 2**32, rows.shape, np.uint32).view(np.float32)
            else:
                scale = 10.0 ** rng.integers(-40, 38) if kind == "scaled" else 1.0
                with np.errstate(over="ignore"):
                    rows[:] = scale * rng.integers(-4, 5, rows.shape)
            # A row's gradient is x, w and v, or products of them that are linear in x and in v.
            if partner != "other":
                rows[2:] = rows[:2] if partner == "equal" or name == "w" else -rows[:2]
            if partner == "nearly opposite" and name != "w":
                with np.errstate(all="ignore"):
                    rows[2:] += rng.integers(-1, 2, rows[2:].shape)
        if partner != "other":
            batch["ids"][user, 2:] = batch["ids"][user, :2]
    return batch, draw(hnp.arrays(bool, (USERS, ROWS_PER_USER)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cases", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_neighbours_differ_by_one_users_rows_and_by_at_most_the_sensitivity(method, cases):
    @settings(max_examples=cases, deadline=None)
    @given(setting=st.sampled_from(SETTINGS), drawn=batches(), changed=st.integers(0, USERS - 1))
    def holds(setting, drawn, changed):
        function, params = clipping(method, *setting)
        batch, is_padding = drawn
        absent = is_padding.copy()
        absent[changed] = True
        with np.errstate(all="ignore"):
            gradient, without = (function(params, batch, is_padding_example=mask)[0] for mask in (is_padding, absent))
        assert distance(gradient, without) <= (1 + ROUNDING[method]) * function.sensitivity()  # NaN fails

    holds()


@pytest.mark.parametrize("method", METHODS)
def test_the_bound_is_reached(method):
    """By a user of any number of rows: four large rows move the sum by as much as one does."""
    function, params = clipping(method)
    batch = replaced(ordinary_batch(0), np.ones((USERS, ROWS_PER_USER), bool), 1e3)
    nobody = np.ones((USERS, ROWS_PER_USER), bool)
    for count in (1, 3, 4):
        present = nobody.copy()
        present[1, :count] = False
        gradient, without = (function(params, batch, is_padding_example=mask)[0] for mask in (present, nobody))
        np.testing.assert_allclose(distance(gradient, without), function.sensitivity(), rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("l2_clip_norm", [0.1, 1e6])
def test_a_user_is_the_mean_of_its_rows_clipped_as_one(method, l2_clip_norm):
    """Against gradients of single rows, added up in float64; 1e6 clips nobody. Norms of the rules are rounded upwards
    by up to 1e-5; each method is compared with the rows' gradients of its own model."""
    function, params = clipping(method, "flat", l2_clip_norm)
    batch, is_padding = ordinary_batch(1), np.array([[0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]], bool)
    losses = leafwise_losses if method == "vmap" else SENSITIVITY["TwoLayers"]().apply
    loss = jax.jit(jax.grad(lambda p, row: losses(p, jax.tree.map(lambda x: x[None], row))[0]))
    expected, norms = jax.tree.map(lambda p: np.zeros(p.shape), params), []
    for user in range(USERS):
        rows = np.flatnonzero(~is_padding[user])
        grads = [loss(params, {name: x[user, row] for name, x in batch.items()}) for row in rows]
        mean = jax.tree.map(
            lambda p, *g: np.sum(np.array([np.zeros(p.shape), *g], np.float64), 0) / max(len(g), 1), params, *grads
        )
        norms.append(np.sqrt(sum(np.sum(m**2) for m in jax.tree.leaves(mean))))
        factor = min(1.0, l2_clip_norm / max(norms[-1], 1e-30))
        expected = jax.tree.map(lambda e, m, factor=factor: e + factor * m / 3.0, expected, mean)
    gradient, per_user = function(params, batch, is_padding_example=is_padding)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=1e-6), gradient, expected)
    np.testing.assert_allclose(per_user.grad_norm, norms, rtol=3e-5)
    assert per_user.loss.shape == (USERS,)


@pytest.mark.parametrize("method", METHODS)
def test_padding_within_a_user_reaches_nothing(method):
    """Garbage, infinities and NaN in rows of padding: the same bits, in sums, norms and losses."""
    function, params = clipping(method)
    is_padding = np.array([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], bool)
    results = [
        function(params, replaced(ordinary_batch(2), is_padding, value), is_padding_example=is_padding)
        for value in (0.0, 1.0, np.nan, np.inf, 1e30)
    ]
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)
    assert np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(results[0])])).all()
    assert (np.asarray(results[0][1].grad_norm[:2]) > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_one_row_that_is_not_finite_takes_its_user_out(method):
    function, params = clipping(method)
    batch, nobody = ordinary_batch(3), np.zeros((USERS, ROWS_PER_USER), bool)
    broken, without = nobody.copy(), nobody.copy()
    broken[1, 2], without[1] = True, True
    gradient, per_user = function(params, replaced(batch, broken, np.nan), is_padding_example=nobody)
    expected, _ = function(params, batch, is_padding_example=without)
    jax.tree.map(np.testing.assert_array_equal, gradient, expected)
    assert not np.isfinite(per_user.grad_norm[1])
    assert np.isfinite(np.delete(per_user.grad_norm, 1)).all()


@pytest.mark.parametrize(("method", "width"), [("vmap", 1), ("vmap", 4), ("bookkeeping", 1), ("ghost", 1)])
def test_users_of_one_row_give_the_bits_of_examples(method, width):
    by_user, params = clipping(method)
    by_example, _ = clipping(method, unit="example")
    batch, is_padding = ordinary_batch(4, (USERS, width)), np.array([False, True, False])
    mask = np.ones((USERS, width), bool)
    mask[:, 0] = is_padding
    gradient, per_user = by_user(params, batch, is_padding_example=mask)
    rows = jax.tree.map(lambda x: x[:, 0], batch)
    expected, per_example = by_example(params, rows, is_padding_example=is_padding)
    jax.tree.map(np.testing.assert_array_equal, (gradient, per_user), (expected, per_example))
