"""Clipped gradients: the equation, what contributes nothing, microbatches, the errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import NeighboringRelation

from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import AUTOMATIC_CLIPPING_STABILITY, clipped_grad

BATCH = 6
SHAPES = {"matrix": (3, 4), "vector": (5,), "scalar": ()}


def linear_losses(params, batch):
    """The gradient of example i is ``{name: batch[name][i]}``, whatever the parameters are."""
    products = jax.tree.map(lambda p, g: jnp.sum((p * g).reshape(len(g), -1), axis=1), params, batch)
    return sum(jax.tree.leaves(products))


def gradients(batch_size=BATCH, seed=0, scales=(0.01, 0.1, 0.5, 1.0, 2.0, 10.0)):
    """Per-example gradients whose norms lie on both sides of 1, and zero parameters."""
    rng = np.random.default_rng(seed)
    scale = np.resize(scales, batch_size)
    batch = {
        name: (scale.reshape(-1, *[1] * len(shape)) * rng.standard_normal((batch_size, *shape)) / 4).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    return {name: jnp.zeros(shape) for name, shape in SHAPES.items()}, batch


def flat(tree, batch_size=None):
    """All leaves as one float64 vector, or one per example."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    lead = () if batch_size is None else (batch_size,)
    return np.concatenate([leaf.reshape(*lead, -1) for leaf in leaves], axis=-1)


def expected_sum(grads_BxD, l2_clip_norm, clip):
    """The definition, in float64."""
    norms = np.sqrt((grads_BxD**2).sum(axis=1))
    factors = (
        l2_clip_norm / (norms + AUTOMATIC_CLIPPING_STABILITY)
        if clip == "automatic"
        else np.minimum(1.0, l2_clip_norm / norms)
    )
    return factors @ grads_BxD, norms


@pytest.mark.parametrize("clip", ["flat", "automatic"])
@pytest.mark.parametrize(("l2_clip_norm", "normalize_by"), [(1.0, 1.0), (0.3, 7.5)])
def test_is_the_sum_of_clipped_gradients_over_a_constant(clip, l2_clip_norm, normalize_by):
    params, batch = gradients()
    function = clipped_grad(linear_losses, l2_clip_norm=l2_clip_norm, normalize_by=normalize_by, clip=clip)
    gradient, per_example = jax.jit(function)(params, batch, is_padding_example=None)
    expected, norms = expected_sum(flat(batch, BATCH), l2_clip_norm, clip)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    # float32: a norm of 18 entries, a quotient and a sum of six.
    np.testing.assert_allclose(flat(gradient), expected / normalize_by, rtol=0, atol=1e-6 * l2_clip_norm)
    np.testing.assert_allclose(per_example.grad_norm, norms, rtol=1e-6)


@pytest.mark.parametrize("microbatch_size", [None, 1, 2, 3])
def test_equals_a_loop_over_examples_of_a_network(microbatch_size):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((BATCH, 4)).astype(np.float32), rng.standard_normal(BATCH).astype(np.float32)
    params = {"in": jnp.asarray(rng.standard_normal((4, 8)), jnp.float32), "out": jnp.ones(8)}

    def losses(params, batch):
        return (jnp.tanh(batch["x"] @ params["in"]) @ params["out"] - batch["y"]) ** 2

    function = clipped_grad(losses, l2_clip_norm=1.0, normalize_by=BATCH, microbatch_size=microbatch_size)
    gradient, per_example = jax.jit(function)(params, {"x": x, "y": y}, is_padding_example=None)
    one = jax.jit(jax.value_and_grad(lambda p, x, y: losses(p, {"x": x[None], "y": y[None]})[0]))
    loop = [one(params, x[i], y[i]) for i in range(BATCH)]
    expected, norms = expected_sum(np.stack([flat(g) for _, g in loop]), 1.0, "flat")
    assert norms.min() < 1 < norms.max()
    np.testing.assert_allclose(flat(gradient), expected / BATCH, rtol=0, atol=1e-6)
    np.testing.assert_allclose(per_example.grad_norm, norms, rtol=1e-5)  # in the order of the batch
    np.testing.assert_allclose(per_example.loss, [loss for loss, _ in loop], rtol=1e-5)


def test_every_leaf_counts_in_the_norm():
    params, batch = gradients()
    function = jax.jit(clipped_grad(linear_losses, l2_clip_norm=1.0))
    for name in SHAPES:
        other = {**batch, name: np.zeros_like(batch[name])}
        with_leaf, without = (function(params, b, is_padding_example=None)[1] for b in (batch, other))
        lost = with_leaf.grad_norm**2 - without.grad_norm**2
        np.testing.assert_allclose(lost, (flat(batch[name], BATCH) ** 2).sum(axis=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", ["flat", "automatic"])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_padding_contributes_exactly_zero(clip, microbatch_size):
    params, batch = gradients()
    is_padding = np.array([False, True, False, False, True, True])
    function = jax.jit(clipped_grad(linear_losses, l2_clip_norm=1.0, clip=clip, microbatch_size=microbatch_size))
    gradient, _ = function(params, batch, is_padding_example=is_padding)
    for garbage in (0.0, np.nan, np.inf, 1e30):
        for x in batch.values():
            x[is_padding] = garbage
        again, per_example = function(params, batch, is_padding_example=is_padding)
        jax.tree.map(np.testing.assert_array_equal, again, gradient)  # bit for bit
        assert not np.any(per_example.loss[is_padding])
        assert not np.any(per_example.grad_norm[is_padding])
    alone, _ = expected_sum(flat(batch, BATCH)[~is_padding], 1.0, clip)
    np.testing.assert_allclose(flat(gradient), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_a_batch_of_padding_gives_exactly_zero(microbatch_size):
    params, batch = gradients()
    batch["scalar"][:] = np.nan
    function = jax.jit(clipped_grad(linear_losses, l2_clip_norm=1.0, microbatch_size=microbatch_size))
    gradient, per_example = function(params, batch, is_padding_example=np.ones(BATCH, bool))
    assert not flat(gradient).any()
    assert not flat(per_example).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_gradient_without_a_finite_norm_contributes_exactly_zero(bad):
    params, batch = gradients()
    batch["matrix"][2, 1] = bad
    function = jax.jit(clipped_grad(linear_losses, l2_clip_norm=1.0))
    gradient, per_example = function(params, batch, is_padding_example=None)
    removed, _ = function(params, batch, is_padding_example=np.arange(BATCH) == 2)
    jax.tree.map(np.testing.assert_array_equal, gradient, removed)
    np.testing.assert_array_equal(np.isfinite(per_example.grad_norm), np.arange(BATCH) != 2)


def test_zero_gradients_stay_zero():
    params, batch = gradients(scales=(0.0,))
    for clip in ("flat", "automatic"):
        gradient, _ = clipped_grad(linear_losses, l2_clip_norm=1.0, clip=clip)(params, batch, is_padding_example=None)
        assert not flat(gradient).any()


def test_an_infinite_clip_norm_is_the_plain_sum():
    params, batch = gradients()
    gradient, _ = clipped_grad(linear_losses, l2_clip_norm=np.inf)(params, batch, is_padding_example=None)
    np.testing.assert_allclose(flat(gradient), flat(batch, BATCH).sum(axis=0), rtol=1e-5, atol=1e-6)


def test_trailing_microbatches_of_padding_are_not_computed():
    """Rows of microbatch j of 3 are j and j + 3: the first rows of each, filled in this order."""
    calls = []

    def losses(params, batch):
        jax.debug.callback(lambda _: calls.append(1), batch["scalar"][0])
        return linear_losses(params, batch)

    params, batch = gradients()
    function = jax.jit(clipped_grad(losses, l2_clip_norm=1.0, microbatch_size=2))
    for kept, expected_calls in [(0, 0), (1, 2), (2, 2), (3, 4), (6, 6)]:
        calls.clear()
        is_padding = ~np.isin(np.arange(BATCH), [0, 3, 1, 4, 2, 5][:kept])
        gradient, per_example = function(params, batch, is_padding_example=is_padding)
        jax.block_until_ready(gradient)
        jax.effects_barrier()
        assert len(calls) == expected_calls
        expected, norms = expected_sum(flat(batch, BATCH), 1.0, "flat")
        np.testing.assert_allclose(per_example.grad_norm, np.where(is_padding, 0, norms), rtol=1e-6)
        expected, _ = expected_sum(flat(batch, BATCH)[~is_padding], 1.0, "flat")
        np.testing.assert_allclose(flat(gradient), expected, rtol=0, atol=1e-6)


def test_norms_and_sums_are_float32_for_bfloat16_parameters():
    """The sum of 64 gradients of 2^-9 each: in bfloat16 it would stick at 2^-1."""
    params, batch = {"w": jnp.zeros(4, jnp.bfloat16)}, {"w": jnp.full((640, 4), 2.0**-9, jnp.bfloat16)}
    gradient, per_example = jax.jit(clipped_grad(linear_losses, l2_clip_norm=1.0))(
        params, batch, is_padding_example=None
    )
    assert gradient["w"].dtype == per_example.grad_norm.dtype == jnp.float32
    np.testing.assert_array_equal(gradient["w"], 1.25)
    np.testing.assert_array_equal(per_example.grad_norm, 2.0**-8)


def test_float64_parameters_keep_their_precision():
    with jax.enable_x64(True):
        params, batch = jax.tree.map(lambda x: np.asarray(x, np.float64), gradients())
        gradient, per_example = jax.jit(clipped_grad(linear_losses, l2_clip_norm=1.0))(
            params, batch, is_padding_example=None
        )
        assert per_example.grad_norm.dtype == np.float64
        np.testing.assert_allclose(flat(gradient), expected_sum(flat(batch, BATCH), 1.0, "flat")[0], rtol=1e-13)


def test_the_norm_of_a_large_leaf_with_one_large_entry():
    """A running float32 sum would lose each of the 10^6 small squares, and with them 3% of the norm."""
    gradient = np.full((1, 1000, 1000), 2.4e-4, np.float32)
    gradient[0, 0, 0] = 1.0
    function = jax.jit(clipped_grad(linear_losses, l2_clip_norm=1.0))
    _, per_example = function({"w": jnp.zeros((1000, 1000))}, {"w": gradient}, is_padding_example=None)
    np.testing.assert_allclose(per_example.grad_norm[0], np.linalg.norm(gradient.astype(np.float64)), rtol=1e-6)


def test_sensitivity_is_the_bound_or_twice_it():
    function = clipped_grad(linear_losses, l2_clip_norm=0.5, normalize_by=4.0)
    assert function.l2_norm_bound == 0.125
    assert function.sensitivity() == 0.125
    assert function.sensitivity(NeighboringRelation.ADD_OR_REMOVE_ONE) == 0.125
    assert function.sensitivity(NeighboringRelation.REPLACE_SPECIAL) == 0.125
    assert function.sensitivity(NeighboringRelation.REPLACE_ONE) == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l2_clip_norm": 0.0}, "l2_clip_norm must be"),
        ({"l2_clip_norm": np.nan}, "l2_clip_norm must be"),
        ({"l2_clip_norm": 9e-7}, "l2_clip_norm must be"),  # squares of such gradients underflow in float32
        ({"normalize_by": 0.0}, "expected batch size"),
        ({"normalize_by": np.inf}, "expected batch size"),
        ({"clip": "hard"}, "'flat' or 'automatic'"),
        ({"clip": "automatic", "l2_clip_norm": np.inf}, "must therefore be finite"),
        ({"clip": "automatic", "l2_clip_norm": 1e37}, "at most 1e[+]30"),  # 100 C overflows float32
        ({"microbatch_size": 0}, "microbatch_size must be"),
    ],
)
def test_refuses_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        clipped_grad(linear_losses, **{"l2_clip_norm": 1.0, **arguments})


def test_refuses_a_mean_over_the_batch():
    function = clipped_grad(lambda p, b: jnp.mean(linear_losses(p, b)), l2_clip_norm=1.0)
    with pytest.raises(ValueError, match=r"one loss per example.*returned shape \(\)"):
        function(*gradients(), is_padding_example=None)


def test_refuses_a_batch_that_microbatches_do_not_divide():
    with pytest.raises(ValueError, match=r"batch of 6 examples .* microbatches of 4"):
        clipped_grad(linear_losses, l2_clip_norm=1.0, microbatch_size=4)(*gradients(), is_padding_example=None)


@pytest.mark.parametrize("make", [clipped_grad, ghost_clipped_grad])
@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool", "float8_e4m3fn"])
def test_refuses_leaves_that_are_not_real_numbers_of_16_bits(make, dtype):
    """Of complex numbers the sum was 1,414 times the clip norm: a square of a complex number is not its size."""
    params = {"layer": {"w": jnp.ones(3, dtype)}, "b": jnp.ones(3)}

    def losses(params, batch):
        return jnp.abs(batch @ params["layer"]["w"].astype("complex64")) + batch @ params["b"]

    with pytest.raises(ValueError, match=rf"params\['layer'\]\['w'\] is {dtype}, but clipping and noise are for real"):
        make(losses, l2_clip_norm=1.0)(params, np.ones((2, 3), "float32"), is_padding_example=None)
