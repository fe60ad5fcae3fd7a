"""What a clipped gradient is called with is checked before the loss is traced, whatever the method."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.batch_selection import PoissonSampling
from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import clipped_grad

WAYS = pytest.mark.parametrize("way", [clipped_grad, ghost_clipped_grad])
MODEL, BATCH = nn.Dense(3), 8
X = np.random.default_rng(0).standard_normal((BATCH, 4)).astype("float32")
PARAMS = MODEL.init(jax.random.key(0), X)


def losses(params, batch):
    return jnp.sum((MODEL.apply(params, batch["x"]) - batch["y"]) ** 2, axis=1)


def not_to_be_traced(params, batch):
    raise AssertionError("the loss was traced before what it is called with was checked")


@WAYS
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": X, "y": X[:1, :3]}, r"batch\['y'\] has shape \(1, 3\), but 8 examples are in batch\['x'\]"),
        ({"x": X[:1], "y": X}, r"batch\['x'\] has shape \(1, 4\), but 8 examples are in batch\['y'\]"),
        ({"a": X, "b": X, "c": X[:5]}, r"batch\['c'\] has shape \(5, 4\), but 8"),
        ((X, (X, X[:1])), r"batch\[1\]\[1\] has shape \(1, 4\), but 8"),
        ({"x": X, "weight": np.float32(2)}, r"batch\['weight'\] has no axis.*close over"),
        ({"x": X, "weight": jnp.ones([])}, r"batch\['weight'\] has no axis"),
        ({"x": X, "weight": 2.0}, r"batch\['weight'\] has type float.*close over"),
        ({"x": X, "key": jax.random.key(0)}, r"batch\['key'\] has no axis"),
        ({}, "the batch .* has no arrays"),
        (None, "the batch .* has no arrays"),
    ],
)
def test_leaves_must_share_their_leading_axis(way, batch, message):
    function = way(not_to_be_traced, l2_clip_norm=1.0)
    with pytest.raises(ValueError, match=message):
        function(PARAMS, batch, is_padding_example=None)


@WAYS
def test_a_row_that_is_broadcast_would_move_the_sum_by_more_than_the_sensitivity(way):
    """What the check is for: of a label of one row, only the number of examples bounds the influence."""
    function = way(losses, l2_clip_norm=1.0)
    x = np.ones((BATCH, 4), "float32")
    one, other = (np.full((1, 3), value, "float32") for value in (30.0, -30.0))

    def distance(first, second):
        return np.sqrt(sum(np.sum(np.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (first, second)))))

    sums = []
    for y in (one, other):
        everywhere = {"x": x, "y": np.broadcast_to(y, (BATCH, 3))}
        sums.append(function(PARAMS, everywhere, is_padding_example=None)[0])
        with pytest.raises(ValueError, match=r"batch\['y'\]"):
            function(PARAMS, {"x": x, "y": y}, is_padding_example=None)
    assert distance(*sums) > 7 * function.sensitivity(None) > 0


@WAYS
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.array([0, 1, 2, -1, -1, -1, -1, -1], np.int32), r"must be boolean.*got int32.*`indices < 0`"),
        (np.zeros(BATCH, np.float32), "must be boolean"),
        (np.zeros(BATCH - 1, bool), r"one entry for each of the 8 examples.*\(7,\)"),
        (np.zeros((BATCH, 1), bool), r"\(8, 1\)"),
        (np.bool_(False), r"got shape \(\)"),
    ],
)
def test_the_mask_is_boolean_and_has_an_entry_for_each_example(way, mask, message):
    function = way(not_to_be_traced, l2_clip_norm=1.0)
    with pytest.raises(ValueError, match=message):
        function(PARAMS, {"x": X}, is_padding_example=mask)
    with pytest.raises(ValueError, match=message):  # also where it is a tracer
        jax.jit(lambda mask: function(PARAMS, {"x": X}, is_padding_example=mask))(mask)


@WAYS
def test_padding_cannot_be_forgotten(way):
    """-1 is NumPy's and JAX's name for the last row: without a mask each free row would count the last example."""
    indices = PoissonSampling(num_examples=100, sampling_probability=0.05, max_batch_size=12, seed=0).indices(0)
    assert 0 < (indices < 0).sum() < 12
    rng = np.random.default_rng(0)
    data = {"x": rng.standard_normal((100, 4)).astype("float32"), "y": rng.standard_normal((100, 3)).astype("float32")}
    batch = {name: a[indices] for name, a in data.items()}
    function = way(losses, l2_clip_norm=1.0)
    with pytest.raises(TypeError, match="is_padding_example"):
        function(PARAMS, batch)
    gradient, _ = function(PARAMS, batch, is_padding_example=indices < 0)
    sampled = {name: a[indices[indices >= 0]] for name, a in data.items()}
    expected, _ = function(PARAMS, sampled, is_padding_example=None)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-6), gradient, expected)


@WAYS
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_a_batch_without_rows_has_a_gradient_of_zero(way, microbatch_size):
    gradient, per_example = way(losses, l2_clip_norm=1.0, microbatch_size=microbatch_size)(
        PARAMS, {"x": X[:0], "y": X[:0, :3]}, is_padding_example=np.zeros(0, bool)
    )
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, PARAMS)
    assert not any(g.any() for g in jax.tree.leaves(gradient))
    assert per_example.loss.shape == per_example.grad_norm.shape == (0,)


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_typed_keys_are_leaves_like_any_other(microbatch_size):
    batch = {"x": X, "key": jax.random.split(jax.random.key(0), BATCH)}

    def noisy_losses(params, batch):
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(batch["key"])
        return jnp.sum(MODEL.apply(params, batch["x"]) * noise, axis=1)

    (expected, norms), (actual, _) = (
        way(noisy_losses, l2_clip_norm=1.0, microbatch_size=microbatch_size)(PARAMS, batch, is_padding_example=None)
        for way in (clipped_grad, ghost_clipped_grad)
    )
    assert norms.grad_norm.min() < norms.grad_norm.max()
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-5), actual, expected)
