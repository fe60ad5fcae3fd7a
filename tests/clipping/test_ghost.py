"""Both methods of ghost clipping equal the vmap reference, and cost what they should."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import clipped_grad

METHODS = ("bookkeeping", "ghost")
BATCH, TOKENS, WIDTH, VOCABULARY = 6, 5, 8, 11
# Rounding of float32 (6e-8) through some tens of operations, and of float64 (1e-16).
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


class Block(nn.Module):
    """A pre-norm transformer layer, the body of a scan."""

    @nn.compact
    def __call__(self, h, _):
        x = nn.LayerNorm(name="norm", use_fast_variance=False)(h)
        # A key bias has no gradient at all: the softmax does not see it.
        q, k, v = (nn.Dense(WIDTH, use_bias=n != "k", name=n)(x) for n in "qkv")
        h = h + nn.Dense(WIDTH, name="o")(jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v)
        x = nn.LayerNorm(name="norm_2", epsilon=1e-3)(h)
        x = nn.gelu(nn.Dense(2 * WIDTH, name="in")(x))
        return h + nn.Dense(WIDTH, name="out")(x), None


class Transformer(nn.Module):
    remat: bool = False
    params_axis: int = 0

    @nn.compact
    def __call__(self, ids):
        h = nn.Embed(VOCABULARY, WIDTH)(ids)
        layers = nn.scan(
            nn.remat(Block) if self.remat else Block,
            variable_axes={"params": self.params_axis},
            split_rngs={"params": True},
            length=3,
            in_axes=nn.broadcast,
        )(name="layers")
        return nn.Dense(3)(layers(h, None)[0][:, 0])


class Small(nn.Module):
    """Layers on tokens and on examples, with and without their optional parameters; quick to compile."""

    dtype: str | None = None

    @nn.compact
    def __call__(self, ids):
        embedded = nn.Embed(VOCABULARY, WIDTH, dtype=self.dtype)(ids)
        x = nn.tanh(nn.Dense(7, dtype=self.dtype)(embedded))
        x = nn.LayerNorm(use_scale=False, dtype=self.dtype)(x)
        x = nn.LayerNorm(use_bias=False, dtype=self.dtype)(x).sum(1)
        x = nn.Dense(3, use_bias=False, dtype=self.dtype)(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def problem(model, *, dtype="float32"):
    """Losses, parameters far from their initial zeros and ones, and a batch with repeated tokens."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, (BATCH, TOKENS))
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    params = jax.tree.map(lambda a: (0.5 * rng.standard_normal(a.shape)).astype(dtype), shapes)

    def losses(params, batch):
        return -jnp.sum(jax.nn.log_softmax(model.apply(params, batch["ids"])) * batch["label"], axis=-1)

    return losses, params, {"ids": ids, "label": np.eye(3, dtype=dtype)[rng.integers(0, 3, BATCH)]}


def assert_equals_reference(losses, params, batch, *, tolerance, is_padding_example=None, **arguments):
    """Norms and every leaf of the clipped sum agree for both methods, relative to the largest entry of each."""

    def outcome(function):
        return jax.jit(function)(params, batch, is_padding_example=is_padding_example)

    arguments = {"l2_clip_norm": 1.0, **arguments}
    expected = outcome(clipped_grad(losses, **arguments))
    for method in METHODS:
        actual = outcome(ghost_clipped_grad(losses, method=method, **arguments))
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
            assert a.dtype == e.dtype
            np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())
    return actual


@pytest.mark.parametrize(
    ("model", "dtype"), [(Small(), "float32"), pytest.param(Transformer(), "float64", marks=pytest.mark.thorough)]
)
def test_equals_vmap(model, dtype):
    with jax.enable_x64(dtype == "float64"):
        losses, params, batch = problem(model, dtype=dtype)
        _, per_example = assert_equals_reference(losses, params, batch, tolerance=TOLERANCE[dtype])
        assert per_example.grad_norm.dtype == dtype
        assert per_example.grad_norm.min() < 1 < per_example.grad_norm.max()  # both sides of the clip norm


@pytest.mark.parametrize(
    "arguments",
    [
        {"clip": "automatic", "l2_clip_norm": 0.3},
        {"l2_clip_norm": np.inf, "normalize_by": 7.0},
        {"microbatch_size": 2},
    ],
)
def test_arguments_mean_what_they_mean_for_clipped_grad(arguments):
    assert_equals_reference(*problem(Small()), tolerance=TOLERANCE["float32"], **arguments)
    arguments = {"l2_clip_norm": 1.0, **arguments}
    ghost, reference = (f(lambda p, b: b, **arguments) for f in (ghost_clipped_grad, clipped_grad))
    assert ghost.l2_norm_bound == reference.l2_norm_bound


def test_one_example():
    losses, params, batch = problem(Small())
    batch = jax.tree.map(lambda a: a[:1], batch)
    gradient, per_example = assert_equals_reference(losses, params, batch, tolerance=TOLERANCE["float32"])
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(norm, min(1.0, per_example.grad_norm[0]), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_activations(method):
    """Two bfloat16 computations of the same: 2^-9 per operation, some tens of them with random signs."""
    losses, params, batch = problem(Small(dtype="bfloat16"))
    gradient, per_example = jax.jit(ghost_clipped_grad(losses, l2_clip_norm=1.0, method=method))(
        params, batch, is_padding_example=None
    )
    reference = jax.jit(clipped_grad(losses, l2_clip_norm=1.0))
    expected, expected_per_example = reference(params, batch, is_padding_example=None)
    assert {a.dtype for a in jax.tree.leaves((gradient, per_example))} == {np.dtype("float32")}
    np.testing.assert_allclose(per_example.grad_norm, expected_per_example.grad_norm, rtol=0.03)
    error = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, expected))
    assert error < 0.03 * optax.tree.norm(expected)


@pytest.mark.parametrize(("num_padding", "microbatch_size"), [(1, None), (1, 2), (BATCH, None)])
@pytest.mark.parametrize("method", METHODS)
def test_padding_contributes_exactly_zero(method, num_padding, microbatch_size):
    losses, params, batch = problem(Small())
    function = ghost_clipped_grad(losses, l2_clip_norm=1.0, method=method, microbatch_size=microbatch_size)
    function = jax.jit(function)
    is_padding = np.arange(BATCH) < num_padding
    gradient, per_example = function(params, batch, is_padding_example=is_padding)
    batch["label"] = np.where(is_padding[:, None], np.nan, batch["label"])
    again, _ = function(params, batch, is_padding_example=is_padding)
    jax.tree.map(np.testing.assert_array_equal, gradient, again)
    assert not per_example.grad_norm[:num_padding].any()
    assert not per_example.loss[:num_padding].any()
    assert any(g.any() for g in jax.tree.leaves(gradient)) == (num_padding < BATCH)


class Fragile(nn.Module):
    @nn.compact
    def __call__(self, x, scale, root):
        x = nn.Dense(4)(nn.LayerNorm()(x * scale[:, None, None])) * scale[:, None, None]
        return nn.Dense(3)(jnp.exp(x) + jnp.sqrt(jnp.abs(x * root[:, None, None]))).sum(1)


@pytest.mark.parametrize("method", METHODS)
def test_nonfinite_example_contributes_exactly_zero(method):
    """Removing the example by padding gives bit for bit the same sum, and it is the reference's."""
    model, rng, ones = Fragile(), np.random.default_rng(0), np.ones(BATCH, "float32")
    x = rng.standard_normal((BATCH, TOKENS, 4), "float32")
    params = model.init(jax.random.key(0), x, ones, ones)

    def losses(params, batch):
        return model.apply(params, batch["x"], batch["scale"], batch["root"])[:, 0] * batch["weight"]

    ghost = jax.jit(ghost_clipped_grad(losses, l2_clip_norm=1.0, method=method))
    reference = jax.jit(clipped_grad(losses, l2_clip_norm=1.0))
    for name, value in (
        ("x", np.nan),
        ("x", np.inf),
        ("scale", 1e4),  # infinite activations
        ("weight", np.nan),  # the loss is NaN
        ("root", 0.0),  # the derivative of the square root is infinite
    ):
        batch = {key: a.copy() for key, a in (("x", x), ("scale", ones), ("root", ones), ("weight", ones))}
        batch[name][(1,) * batch[name].ndim] = value
        is_bad = np.arange(BATCH) == 1
        gradient, per_example = ghost(params, batch, is_padding_example=None)
        padded, _ = ghost(params, batch, is_padding_example=is_bad)
        expected, expected_per_example = reference(params, batch, is_padding_example=None)
        jax.tree.map(np.testing.assert_array_equal, gradient, padded)
        for norms in (per_example.grad_norm, expected_per_example.grad_norm):
            np.testing.assert_array_equal(np.isfinite(norms), ~is_bad)
        for a, e in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max())
            assert np.isfinite(a).all()


@pytest.mark.parametrize("num_embeddings", [1, 4])
def test_lookup_of_unusual_ids(num_embeddings):
    """Negative ids count from the end, so -1 and 3 are one row; a table of one row ignores the ids."""
    model = nn.Embed(num_embeddings, 3)
    ids, table = np.array([[-1, 3, 0], [2, 2, -2]]), np.random.default_rng(0).standard_normal((4, 3))
    params = {"params": {"embedding": table[:num_embeddings].astype("float32")}}
    assert_equals_reference(lambda p, ids: jnp.sum(jnp.sin(model.apply(p, ids)), (1, 2)), params, ids, tolerance=1e-5)


def split_params(params, trained):
    """The leaves whose path holds one of the names, by path; and what puts them back."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    treedef = jax.tree.structure(params)
    mine = {path: leaf for path, leaf in leaves.items() if any(name in path for name in trained)}
    return mine, lambda mine: treedef.unflatten({**leaves, **mine}[path] for path in leaves)


def test_only_params_are_counted():
    """Layers with a frozen kernel, a frozen bias or both, inside nn.scan (over axis 1) and nn.remat."""
    losses, params, batch = problem(Transformer(remat=True, params_axis=1))
    mine, merge = split_params(params, ["Embed", "norm", "bias", "['q']['kernel']", "['out']['kernel']"])
    assert 0 < len(mine) < len(jax.tree.leaves(params))
    assert_equals_reference(lambda mine, batch: losses(merge(mine), batch), mine, batch, tolerance=TOLERANCE["float32"])


def test_frozen_parameters_may_be_used_in_any_way():
    """Frozen: a convolution, positions without a batch axis, a layer used twice and one shared by vmap."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (2,))(x) + nn.Embed(TOKENS, 4)(jnp.arange(TOKENS))
            share = {"variable_axes": {"params": None}, "split_rngs": {"params": False}, "in_axes": 1}
            twice, across = nn.Dense(4), nn.vmap(nn.Dense, **share, out_axes=1)(4)
            return nn.Dense(3, name="head")(across(twice(twice(nn.Dense(4, name="in")(x))))).sum(1)

    model, x = Model(), np.random.default_rng(0).standard_normal((BATCH, TOKENS, 4)).astype("float32")
    mine, merge = split_params(model.init(jax.random.key(0), x), ["head", "'in'"])
    mine["not used at all"] = np.ones(3, "float32")
    gradient, _ = assert_equals_reference(
        lambda mine, x: model.apply(merge(mine), x)[:, 0] ** 2, mine, x, tolerance=TOLERANCE["float32"]
    )
    assert [path for path, g in gradient.items() if not g.any()] == ["not used at all"]


def test_traces_made_elsewhere_are_not_reused():
    """A jitted loss, and a jitted layer, that were called before without ghost clipping."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.relu(nn.jit(nn.Dense)(4)(x)))

    model, x = Model(), np.random.default_rng(0).standard_normal((BATCH, 4)).astype("float32")
    params = model.init(jax.random.key(0), x)
    losses = jax.jit(lambda p, x: model.apply(p, x).sum(-1) ** 2)
    losses(params, x)
    function = ghost_clipped_grad(losses, l2_clip_norm=1.0)
    first = function(params, x, is_padding_example=None)
    jax.tree.map(np.testing.assert_array_equal, first, function(params, x, is_padding_example=None))
    assert_equals_reference(losses, params, x, tolerance=TOLERANCE["float32"])
    losses(params, x)


@pytest.mark.parametrize(
    "arguments", [{"method": "vmap"}, {"l2_clip_norm": 0.0}, {"normalize_by": -1.0}, {"clip": "hard"}]
)
def test_refuses_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ghost_clipped_grad(lambda p, b: b, **{"l2_clip_norm": 1.0, **arguments})
