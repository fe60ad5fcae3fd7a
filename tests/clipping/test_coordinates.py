"""Gradients that are clipped in other coordinates: every method, every kind of layer, against the definition."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.clipping.auto import auto_clipped_grad
from dp_rmt.clipping.coordinates import (
    AxisMap,
    Coordinates,
    LeafAxes,
    LeafMaps,
    map_matrix,
    rider_of,
    with_riders,
)
from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import clipped_grad
from dp_rmt.geometry import layer_moments, whitened_coordinates

pytestmark = pytest.mark.thorough

BATCH, TOKENS, WIDTH, VOCABULARY = 6, 5, 8, 11
METHODS = {
    "vmap": clipped_grad,
    "auto": auto_clipped_grad,
    "bookkeeping": lambda *a, **k: ghost_clipped_grad(*a, method="bookkeeping", **k),
    "ghost": lambda *a, **k: ghost_clipped_grad(*a, method="ghost", **k),
}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


class Layer(nn.Module):
    """The body of a scan."""

    @nn.compact
    def __call__(self, h, _):
        x = nn.LayerNorm(name="norm", use_fast_variance=False)(h)
        q, k, v = (nn.Dense(WIDTH, name=name)(x) for name in "qkv")
        h = h + nn.Dense(WIDTH, name="o")(jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v)
        return h + nn.Dense(WIDTH, name="out")(nn.gelu(nn.Dense(2 * WIDTH, name="in")(h))), None


class Model(nn.Module):
    """A scanned stack between an embedding, attention in heads, an einsum and a head on one token."""

    remat: bool = False

    @nn.compact
    def __call__(self, ids):
        h = nn.Embed(VOCABULARY, WIDTH)(ids)
        layers = nn.scan(
            nn.remat(Layer) if self.remat else Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            in_axes=nn.broadcast,
        )(name="layers")
        h, _ = layers(h, None)
        heads = nn.DenseGeneral((2, 3), name="heads")(h)
        h = h + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="joined")(heads)
        h = h + nn.Einsum((WIDTH, 2, 4), "btd,dhk->bthk", name="split")(h).reshape(h.shape)
        return nn.Dense(3, name="head")(h[:, 0])


@functools.cache
def problem(remat=False):
    model = Model(remat)
    ids = jax.random.randint(jax.random.key(0), (BATCH, TOKENS), 0, VOCABULARY)
    labels = jnp.arange(BATCH) % 3
    params = model.init(jax.random.key(1), ids)["params"]

    def losses(params, batch):
        logits = model.apply({"params": params}, batch["ids"])
        return -jax.nn.log_softmax(logits)[jnp.arange(len(logits)), batch["label"]]

    return losses, params, {"ids": ids, "label": labels}


@pytest.fixture(scope="module")
def whitened():
    """Losses, parameters, batch, and coordinates of both sides with a few directions each."""
    losses, params, batch = problem()
    moments = layer_moments(losses, params, [batch], outputs=True)
    return losses, params, batch, whitened_coordinates(moments, rank=3)


def close(tree, other, rtol):
    """Up to rounding, which is relative to the whole gradient: the key's bias has none but rounding."""
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(other))
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * largest)


def test_all_matrices_have_coordinates(whitened):
    *_, coordinates = whitened
    named = {leaf.path for leaf in coordinates.leaves}
    assert named == {
        *(f"layers/{name}/kernel" for name in ("q", "k", "v", "o", "in", "out")),
        *(f"{name}/kernel" for name in ("heads", "joined", "split", "head")),
    }
    shared = {leaf.path: leaf.rows for leaf in coordinates.leaves}
    assert shared["layers/q/kernel"] == shared["layers/k/kernel"] == shared["layers/v/kernel"]
    assert shared["layers/o/kernel"] != shared["layers/q/kernel"]


@pytest.fixture(scope="module")
def definition(whitened):
    """``(clip norm, per-example norms, clipped mean)`` from each example's gradient with respect to V."""
    losses, params, batch, coordinates = whitened

    def losses_of_v(v):
        return losses(jax.tree.map(jnp.add, params, coordinates(v)), batch)

    each = jax.jit(jax.jacrev(losses_of_v))(jax.tree.map(jnp.zeros_like, params))
    norms = jnp.sqrt(sum(jnp.sum(jnp.square(g.reshape(BATCH, -1)), 1) for g in jax.tree.leaves(each)))
    clip_norm = float(jnp.median(norms))
    factors = jnp.minimum(1, clip_norm / norms)
    return clip_norm, norms, jax.tree.map(lambda g: jnp.tensordot(factors, g, 1) / 10, each)


@EVERY_METHOD
@pytest.mark.parametrize("remat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_method_clips_the_gradient_of_v(whitened, definition, method, remat):
    """By the definition: W = W_0 + F V H, each example's gradient with respect to V, its norm, its clipped sum."""
    _, _, _, coordinates = whitened
    losses, params, batch = problem(remat)
    clip_norm, norms, wanted = definition
    function = METHODS[method](losses, l2_clip_norm=clip_norm, normalize_by=10, coordinates=coordinates)
    got, per_example = function(params, batch, is_padding_example=None)
    # Ghost norms are rounded upwards, by a bound of what rounding takes from the unmapped squares: here at most 2e-4.
    excess = per_example.grad_norm / norms - 1
    assert float(jnp.min(excess)) > -1e-6
    assert float(jnp.max(excess)) < (5e-6 if method == "vmap" else 2e-4)
    close(got, wanted, 2e-6 if method == "vmap" else 2e-4)


@pytest.mark.slow
def test_microbatches_change_nothing(whitened):
    losses, params, batch, coordinates = whitened
    options = {"l2_clip_norm": 0.5, "coordinates": coordinates}
    for name in ("vmap", "bookkeeping"):
        whole, _ = METHODS[name](losses, **options)(params, batch, is_padding_example=None)
        parts, _ = METHODS[name](losses, microbatch_size=2, **options)(params, batch, is_padding_example=None)
        close(parts, whole, 1e-5)


@pytest.mark.slow
def test_the_identity_changes_nothing(whitened):
    losses, params, batch, coordinates = whitened
    maps = {
        name: AxisMap(jnp.ones_like(axis_map.scale), jnp.zeros_like(axis_map.basis))
        for name, axis_map in coordinates.maps.items()
    }
    identity = Coordinates(maps, coordinates.leaves)
    for name in ("vmap", "bookkeeping"):
        plain, _ = METHODS[name](losses, l2_clip_norm=0.5)(params, batch, is_padding_example=None)
        mapped, _ = METHODS[name](losses, l2_clip_norm=0.5, coordinates=identity)(
            params, batch, is_padding_example=None
        )
        # The bound of a ghost norm's rounding has the terms of two squares in the place of one.
        close(mapped, plain, 1e-6 if name == "vmap" else 2e-5)


@EVERY_METHOD
def test_neighbours_differ_by_the_clip_norm_at_most_in_the_coordinates(whitened, method):
    """Coordinates that stretch by 100 leave the bound where it is: the norm is taken after the map."""
    losses, params, batch, coordinates = whitened
    maps = {name: AxisMap(100 * m.scale, m.basis) for name, m in coordinates.maps.items()}
    function = METHODS[method](losses, l2_clip_norm=0.3, coordinates=Coordinates(maps, coordinates.leaves))
    whole, _ = function(params, batch, is_padding_example=None)
    for left_out in range(BATCH):
        without, _ = function(params, batch, is_padding_example=jnp.arange(BATCH) == left_out)
        difference = jax.tree.map(jnp.subtract, whole, without)
        length = float(jnp.sqrt(sum(jnp.sum(d**2) for d in jax.tree.leaves(difference))))
        assert length <= 0.3 * (1 + 1e-5)
        assert length > 0.29  # all are clipped, so that the bound is what holds them


@pytest.mark.parametrize("tokens", [1, 2, 12])  # pairs of tokens; gradients that are kept
def test_an_input_along_a_damped_direction_is_not_longer_than_it_seems(tokens):
    """Its norm is the difference of two squares a million times as large, of which rounding leaves nothing."""
    rng = np.random.default_rng(0)
    n, cases = 16, 300
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0][:, :4]
    coordinates = Coordinates(
        {"rows": AxisMap(jnp.asarray(2.0), jnp.asarray(basis * np.sqrt(1 - 1e-3), jnp.float32))},
        (LeafAxes("kernel", (-2,), (-1,), "rows"),),
    )
    model = nn.Dense(3, use_bias=False)
    params = {"kernel": jnp.zeros((n, 3))}
    x = jnp.asarray(rng.standard_normal((cases, tokens, 4)) @ basis.T, jnp.float32)
    w = jnp.asarray(rng.standard_normal((cases, tokens, 3)), jnp.float32)

    def losses(params, batch):
        return jnp.sum(model.apply({"params": params}, batch[0]) * batch[1], (1, 2))

    function = ghost_clipped_grad(losses, l2_clip_norm=1e-3, coordinates=coordinates, method="bookkeeping")
    one = jax.jit(lambda i: function(params, (x[i][None], w[i][None]), is_padding_example=None)[0]["kernel"])
    contributions = np.stack([np.asarray(one(i), np.float64) for i in range(cases)])
    lengths = np.sqrt(np.sum(contributions**2, (1, 2))) / 1e-3
    assert lengths.max() <= 1 + 1e-6
    assert lengths.max() > 0.1  # the bound of the rounding clips such an example harder


@EVERY_METHOD
def test_what_is_not_finite_contributes_nothing(whitened, method):
    losses, params, batch, coordinates = whitened

    def with_nan(params, batch):
        return losses(params, batch) * batch["factor"]

    given = batch | {"factor": jnp.array([1.0, jnp.nan, 1.0, 1.0, jnp.inf, 1.0])}
    function = METHODS[method](with_nan, l2_clip_norm=0.3, coordinates=coordinates)
    got, per_example = function(params, given, is_padding_example=None)
    left_out = jnp.array([False, True, False, False, True, False])
    ones = batch | {"factor": jnp.ones(BATCH)}
    wanted, _ = function(params, ones, is_padding_example=left_out)
    assert np.isfinite(per_example.grad_norm).tolist() == (~left_out).tolist()
    close(got, wanted, 1e-6)


class Tied(nn.Module):
    """One table for lookup and head."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        return embed.attend(nn.Dense(WIDTH, name="dense")(embed(ids)).mean(1))


def test_a_tied_table_has_no_coordinates():
    model, ids = Tied(), jnp.zeros((BATCH, TOKENS), int)
    params = model.init(jax.random.key(0), ids)["params"]
    losses = lambda params, ids: jnp.sum(model.apply({"params": params}, ids) ** 2, -1)  # noqa: E731
    coordinates = whitened_coordinates(layer_moments(losses, params, [ids]))
    assert [leaf.path for leaf in coordinates.leaves] == ["dense/kernel"]
    given = Coordinates(coordinates.maps, (LeafAxes("embed/embedding", (-1,), (-2,), "dense/kernel:rows"),))
    with pytest.raises(ValueError, match="embed/embedding, which no layer uses once and as a matrix"):
        ghost_clipped_grad(losses, l2_clip_norm=1.0, coordinates=given)(params, ids, is_padding_example=None)


def test_coordinates_of_other_axes_and_of_missing_leaves_are_refused(whitened):
    losses, params, batch, coordinates = whitened
    turned = tuple(
        LeafAxes(leaf.path, leaf.col_axes, leaf.row_axes, leaf.rows)
        for leaf in coordinates.leaves
        if leaf.path == "layers/q/kernel"
    )
    with pytest.raises(ValueError, match=r"its layer has inputs at \(-2,\)"):
        ghost_clipped_grad(losses, l2_clip_norm=1.0, coordinates=Coordinates(coordinates.maps, turned))(
            params, batch, is_padding_example=None
        )
    without = {name: value for name, value in params.items() if name != "heads"}
    with pytest.raises(ValueError, match="heads/kernel, which the parameters do not have"):
        coordinates(without)


def test_riders_travel_beside_their_leaf_and_leave_the_tree_alone():
    params = {"a": {"kernel": 1, "bias": 2}, "b": 3}
    riding = with_riders(params, {"a/kernel": "map"})
    assert params == {"a": {"kernel": 1, "bias": 2}, "b": 3}
    assert (rider_of(riding["a"], "kernel"), rider_of(riding["a"], "bias")) == ("map", None)
    with pytest.raises(ValueError, match="coordinates of b/kernel"):
        with_riders(params, {"b/kernel": "map"})


def test_axes_are_mapped_together_with_the_bias_and_stacks_apart():
    """``F [W; b] H`` of attention's reshaped kernels, stacked, against dense matrices."""
    rng = np.random.default_rng(0)

    def axis_map(n, scale):
        basis = np.stack([np.linalg.qr(rng.standard_normal((n, n)))[0][:, :2] * [0.9, 0.5] for _ in range(2)])
        return AxisMap(jnp.asarray([scale, 1.0]), jnp.asarray(basis, jnp.float32)), [
            s * (np.eye(n) - u @ u.T) for s, u in zip((scale, 1.0), basis, strict=True)
        ]

    (rows, F), (cols, H) = axis_map(7, 2.0), axis_map(4, 3.0)
    kernel = rng.standard_normal((2, 2, 3, 4)).astype(np.float32)  # layers, heads, size of a head, outputs
    bias = rng.standard_normal((2, 4)).astype(np.float32)
    axes = LeafAxes("kernel", (-3, -2), (-1,), "rows", "cols", "bias")
    mapped, mapped_bias = map_matrix(jnp.asarray(kernel), jnp.asarray(bias), axes, LeafMaps(rows, cols, True))
    for layer in range(2):
        whole = np.concatenate([kernel[layer].reshape(6, 4), bias[layer][None]])
        wanted = F[layer] @ whole @ H[layer]
        np.testing.assert_allclose(mapped[layer].reshape(6, 4), wanted[:6], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mapped_bias[layer], wanted[6], rtol=1e-4, atol=1e-5)
