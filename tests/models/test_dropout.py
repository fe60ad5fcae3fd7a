"""Dropout by a key of each example: one gradient whatever the method, and no example decides about another."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.batch_selection import PoissonSampling
from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import clipped_grad
from dp_rmt.models import PerExampleDropout, example_keys

BATCH, TOKENS, WIDTH, RATE = 6, 5, 8, 0.3
WAYS = {
    "vmap": clipped_grad,
    "bookkeeping": lambda losses, **arguments: ghost_clipped_grad(losses, method="bookkeeping", **arguments),
    "ghost": lambda losses, **arguments: ghost_clipped_grad(losses, method="ghost", **arguments),
}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, h, keys):
        x = nn.Dense(WIDTH)(PerExampleDropout(RATE)(nn.LayerNorm()(h), keys))
        return h + PerExampleDropout(RATE)(nn.gelu(x), keys), None


class Model(nn.Module):
    """Dropout alone, in layers of a scan, and in rematerialised ones."""

    layers: str = "loop"

    @nn.compact
    def __call__(self, x, keys):
        h = PerExampleDropout(RATE)(nn.Dense(WIDTH)(x), keys)
        layer = nn.remat(Layer) if self.layers == "remat" else Layer
        if self.layers == "scan":
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True, "dropout": True}}
            h, _ = nn.scan(layer, length=2, in_axes=nn.broadcast, **axes)()(h, keys)
        else:
            for i in range(2):
                h, _ = layer(name=f"layer_{i}")(h, keys)
        return nn.Dense(3)(h).sum((1, 2))


def problem(layers="loop"):
    model, rng = Model(layers), np.random.default_rng(0)
    batch = {
        "x": rng.standard_normal((BATCH, TOKENS, WIDTH)).astype("float32"),
        "dropout_key": example_keys(jax.random.key(1), np.arange(BATCH)),
    }
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch["x"], None)
    params = jax.tree.map(lambda a: (0.5 * rng.standard_normal(a.shape)).astype("float32"), shapes)

    def losses(params, batch):
        return model.apply(params, batch["x"], batch["dropout_key"], rngs={"dropout": jax.random.key(0)}) ** 2

    return losses, params, batch


@pytest.mark.parametrize(
    ("layers", "microbatch_size"),
    [
        ("loop", None),
        pytest.param("scan", 2, marks=pytest.mark.thorough),
        pytest.param("loop", 2, marks=pytest.mark.slow),
        pytest.param("scan", None, marks=pytest.mark.slow),
        pytest.param("remat", None, marks=pytest.mark.slow),
        pytest.param("remat", 2, marks=pytest.mark.slow),
    ],
)
def test_all_methods_drop_the_same(layers, microbatch_size):
    losses, params, batch = problem(layers)
    arguments = {"l2_clip_norm": 1.0, "microbatch_size": microbatch_size}
    outcomes = [jax.jit(way(losses, **arguments))(params, batch, is_padding_example=None) for way in WAYS.values()]
    expected, norms = outcomes[0]
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    for actual, other in outcomes[1:]:
        np.testing.assert_allclose(other.loss, norms.loss, rtol=1e-5)
        np.testing.assert_allclose(other.grad_norm, norms.grad_norm, rtol=1e-4)  # rounded upwards
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=2e-5 * largest), actual, expected)
    batch["dropout_key"] = example_keys(jax.random.key(2), np.arange(BATCH))  # it does drop something
    again = clipped_grad(losses, **arguments)(params, batch, is_padding_example=None)[1].loss
    assert (np.abs(again / norms.loss - 1) > 1e-3).all()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_mask_goes_with_the_example(way):
    """Removing an example changes nothing else, wherever the others then stand; the naive way changes all."""
    losses, params, batch = problem()
    function = jax.jit(way(losses, l2_clip_norm=1.0))
    whole = function(params, batch, is_padding_example=None)[1]
    without_first = function(params, jax.tree.map(lambda a: a[1:], batch), is_padding_example=None)[1]
    np.testing.assert_allclose(without_first.loss, whole.loss[1:], rtol=1e-5)


def test_one_key_for_the_batch_gives_each_method_other_masks():
    """Why the naive way is none: by vmap all examples share a mask, by ghost clipping it belongs to the row."""

    class Naive(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(x)).sum((1, 2))

    model, x = Naive(), jnp.ones((BATCH, TOKENS, WIDTH))
    params = model.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, x)

    def losses(params, x):
        return model.apply(params, x, rngs={"dropout": jax.random.key(1)})

    vmap, ghost = (
        way(losses, l2_clip_norm=1.0)(params, x, is_padding_example=None)[1].loss
        for way in (clipped_grad, ghost_clipped_grad)
    )
    assert len(np.unique(vmap)) == 1
    assert len(np.unique(ghost)) == BATCH


def test_every_layer_and_every_call_has_masks_of_its_own():
    """Entries dropped by one of two dropouts, of a loop, of a scan, or of one module that is called twice."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, keys):
            drop = PerExampleDropout(0.5)
            return drop(x, keys), drop(x, keys), PerExampleDropout(0.5)(x, keys)

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x, keys):
            scanned = nn.scan(
                lambda drop, carry, _: (carry, drop(x, keys)),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=3,
            )
            return tuple(scanned(PerExampleDropout(0.5), 0.0, None)[1])

    x, keys = jnp.ones((BATCH, 1000)), example_keys(jax.random.key(0), jnp.arange(BATCH))
    for model in (Twice(), Scanned()):
        masks = [y > 0 for y in model.apply({}, x, keys, rngs={"dropout": jax.random.key(0)})]
        for first, second in ((0, 1), (0, 2), (1, 2)):
            # Independent coins agree half of the time: 6,000 of them within .5 +- 5 sd.
            assert abs(np.mean(masks[first] == masks[second]) - 0.5) < 5 * 0.5 / np.sqrt(masks[0].size)


def test_law():
    """Kept with probability 1 - rate and scaled, so that the mean stays; other examples, other masks."""
    x = jnp.ones((BATCH, 10_000))
    keys = example_keys(jax.random.key(0), jnp.arange(BATCH))
    y = np.asarray(PerExampleDropout(RATE).apply({}, x, keys, rngs={"dropout": jax.random.key(0)}))
    assert set(np.unique(y)) == {0, np.float32(1 / (1 - RATE))}
    # Five standard deviations of a coin thrown 10,000 times.
    np.testing.assert_allclose((y > 0).mean(axis=1), 1 - RATE, atol=5 * np.sqrt(RATE * (1 - RATE) / 10_000))
    assert len(np.unique(y, axis=0)) == BATCH
    for unchanged in (
        PerExampleDropout(RATE).apply({}, x, None),
        PerExampleDropout(0.0).apply({}, x, keys),
    ):
        np.testing.assert_array_equal(unchanged, x)


def test_masks_are_drawn_in_one_pass_over_memory():
    """JAX's own bits are a loop over whole arrays on the CPU: a layer with dropout took 1.7 times as long."""
    x, keys = jnp.ones((BATCH, 64)), example_keys(jax.random.key(0), jnp.arange(BATCH))
    drop = jax.jit(lambda x, keys: PerExampleDropout(RATE).apply({}, x, keys, rngs={"dropout": jax.random.key(0)}))
    program = drop.lower(x, keys).compile()
    loops = [line for line in program.as_text().splitlines() if " while(" in line and f"[{BATCH},64" in line]
    assert loops == []


def test_a_key_is_that_of_the_example_wherever_it_stands():
    indices = PoissonSampling(num_examples=50, sampling_probability=0.1, max_batch_size=8, seed=0).indices(0)
    keys = jax.random.key_data(example_keys(jax.random.key(3), indices))
    np.testing.assert_array_equal(keys[2], jax.random.key_data(jax.random.fold_in(jax.random.key(3), indices[2])))
    np.testing.assert_array_equal(
        jax.random.key_data(example_keys(jax.random.key(3), indices[::-1].copy()))[::-1], keys
    )
    assert len(np.unique(keys, axis=0)) == len(np.unique(indices))


@pytest.mark.parametrize(
    ("keys", "rate", "message"),
    [
        (jax.random.key(0), 0.5, r"a typed key for each of the \(6,\) examples.*shape \(\).*example_keys"),
        (jax.random.split(jax.random.key(0), 2), 0.5, r"got key<fry> of shape \(2,\)"),
        (np.zeros((BATCH, 2), np.uint32), 0.5, "got uint32"),
        (jax.random.split(jax.random.key(0, impl="rbg"), BATCH), 0.5, "threefry keys, got rbg"),
        (None, 1.0, "rate of PerExampleDropout must be in"),
    ],
)
def test_refuses_keys_that_are_not_one_for_each_example(keys, rate, message):
    with pytest.raises(ValueError, match=message):
        PerExampleDropout(rate).apply({}, jnp.ones((BATCH, 3)), keys, rngs={"dropout": jax.random.key(0)})
