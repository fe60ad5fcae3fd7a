"""Ghost clipping equals the vmap reference, refuses what it cannot count, and costs what it should."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.clipping import clipped_grad
from dp_rmt.ghost_clipping import ghost_clipped_grad

BATCH, TOKENS, WIDTH, VOCABULARY = 6, 5, 8, 11
# Rounding of float32 (6e-8) through some tens of operations, and of float64 (1e-16).
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


class Block(nn.Module):
    """A pre-norm transformer layer, the body of a scan."""

    width: int = WIDTH
    hidden: int = 2 * WIDTH
    dtype: str | None = None

    @nn.compact
    def __call__(self, h, _):
        x = nn.LayerNorm(name="norm", use_fast_variance=False)(h)
        # A key bias has no gradient at all: the softmax does not see it.
        q, k, v = (nn.Dense(self.width, dtype=self.dtype, use_bias=n != "k", name=n)(x) for n in "qkv")
        h = h + nn.Dense(self.width, dtype=self.dtype, name="o")(jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v)
        x = nn.LayerNorm(name="norm_2", epsilon=1e-3, dtype=self.dtype)(h)
        x = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name="in")(x))
        return h + nn.Dense(self.width, dtype=self.dtype, name="out")(x), None


class Transformer(nn.Module):
    remat: bool = False
    param_dtype: str = "float32"
    dtype: str | None = None
    params_axis: int = 0

    @nn.compact
    def __call__(self, ids):
        h = nn.Embed(VOCABULARY, WIDTH, dtype=self.dtype)(ids)
        layers = nn.scan(
            nn.remat(Block) if self.remat else Block,
            variable_axes={"params": self.params_axis},
            split_rngs={"params": True},
            length=3,
            in_axes=nn.broadcast,
        )(dtype=self.dtype, name="layers")
        return nn.Dense(3)(layers(h, None)[0][:, 0]).astype(jnp.promote_types(h.dtype, jnp.float32))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(use_scale=False)(nn.tanh(nn.Dense(7)(x)))
        return nn.Dense(3, use_bias=False)(nn.LayerNorm(use_bias=False)(x))


def cross_entropy(model, argument="x"):
    """Per-example losses of a classifier; the label is the first feature's sign or the first id's parity."""

    def losses(params, batch):
        return -jnp.sum(jax.nn.log_softmax(model.apply(params, batch["x"])) * batch["label"], axis=-1)

    return losses


def problem(model, *, dtype="float32", seed=0):
    """Losses, parameters far from their initial zeros and ones, and a batch with repeated tokens."""
    rng = np.random.default_rng(seed)
    is_mlp = isinstance(model, MLP)
    x = rng.standard_normal((BATCH, 4)).astype(dtype) if is_mlp else rng.integers(0, 4, (BATCH, TOKENS))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    params = jax.tree.map(lambda a: (0.5 * rng.standard_normal(a.shape)).astype(dtype), shapes)
    return cross_entropy(model), params, {"x": x, "label": np.eye(3, dtype=dtype)[rng.integers(0, 3, BATCH)]}


def assert_equals_reference(losses, params, batch, *, tolerance, is_padding_example=None, **arguments):
    """Norms and every leaf of the clipped sum agree, relative to the largest entry of each."""
    outputs = []
    for method in (clipped_grad, ghost_clipped_grad):
        function = method(losses, **{"l2_clip_norm": 1.0, **arguments})
        outputs.append(jax.jit(function)(params, batch, is_padding_example=is_padding_example))
    (expected, expected_per_example), (actual, per_example) = outputs
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(
        jax.tree.leaves((actual, per_example)), jax.tree.leaves((expected, expected_per_example))
    ):
        assert a.dtype == e.dtype
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())
    return actual, per_example


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "model", [MLP(), Transformer(), Transformer(remat=True)], ids=["mlp", "transformer", "remat"]
)
def test_equals_vmap(model, dtype):
    with jax.enable_x64(dtype == "float64"):
        losses, params, batch = problem(model, dtype=dtype)
        _, per_example = assert_equals_reference(losses, params, batch, tolerance=TOLERANCE[dtype])
        assert per_example.grad_norm.dtype == dtype
        assert per_example.grad_norm.min() > 0.1


@pytest.mark.parametrize(
    "arguments",
    [
        {"clip": "automatic", "l2_clip_norm": 0.3},
        {"l2_clip_norm": np.inf, "normalize_by": 7.0},
        {"microbatch_size": 2},
        {"microbatch_size": BATCH},
    ],
)
def test_arguments_mean_what_they_mean_for_clipped_grad(arguments):
    assert_equals_reference(*problem(Transformer()), tolerance=TOLERANCE["float32"], **arguments)
    arguments = {"l2_clip_norm": 1.0, **arguments}
    ghost, reference = (f(lambda p, b: b, **arguments) for f in (ghost_clipped_grad, clipped_grad))
    assert ghost.l2_norm_bound == reference.l2_norm_bound


def test_one_example():
    losses, params, batch = problem(Transformer())
    batch = jax.tree.map(lambda a: a[:1], batch)
    gradient, per_example = assert_equals_reference(losses, params, batch, tolerance=TOLERANCE["float32"])
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(norm, min(1.0, per_example.grad_norm[0]), rtol=1e-6)


def test_bfloat16_activations():
    """Two bfloat16 computations of the same thing: 2^-9 per operation, some tens of them with random signs."""
    losses, params, batch = problem(Transformer(dtype="bfloat16"))
    gradient, per_example = assert_equals_reference(losses, params, batch, tolerance=2e-2)
    assert {a.dtype for a in jax.tree.leaves((gradient, per_example))} == {np.dtype("float32")}


def test_scan_over_another_axis():
    losses, params, batch = problem(Transformer(params_axis=1))
    assert_equals_reference(losses, params, batch, tolerance=TOLERANCE["float32"])


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("num_padding", [2, BATCH])
def test_padding_contributes_exactly_zero(num_padding, microbatch_size):
    losses, params, batch = problem(Transformer())
    function = jax.jit(ghost_clipped_grad(losses, l2_clip_norm=1.0, microbatch_size=microbatch_size))
    is_padding = np.arange(BATCH) < num_padding
    gradient, per_example = function(params, batch, is_padding_example=is_padding)
    batch["label"] = np.where(is_padding[:, None], np.nan, batch["label"])
    again, _ = function(params, batch, is_padding_example=is_padding)
    jax.tree.map(np.testing.assert_array_equal, gradient, again)
    assert not per_example.grad_norm[:num_padding].any()
    assert not per_example.loss[:num_padding].any()
    assert any(g.any() for g in jax.tree.leaves(gradient)) == (num_padding < BATCH)


class Explosive(nn.Module):
    """Has, for one value of the first feature each, a NaN, an infinite activation, or an infinite derivative."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(nn.LayerNorm()(x)) + x[..., :1]
        kind = x[..., :1] * 0 + x[:, :1, -1:] * 0  # keeps shapes
        return nn.Dense(3)(jnp.exp(x) + jnp.sqrt(jnp.abs(x - x[:, :1] + kind))).sum(1)


@pytest.mark.parametrize(
    "bad", ["NaN input", "infinite input", "infinite activation", "NaN loss", "sqrt at zero"]
)
@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_nonfinite_example_contributes_exactly_zero(bad, microbatch_size):
    """Removing the example by padding gives bit for bit the same sum, and it is the reference's."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, scale, root):
            x = nn.Dense(4)(nn.LayerNorm()(x * scale[:, None, None]))
            h = jnp.exp(x * scale[:, None, None])
            # With root = 0: sqrt(0), whose derivative is infinite.
            return nn.Dense(3)(h + jnp.sqrt(jnp.abs(x * root[:, None, None]))).sum(1)

    model, rng = Model(), np.random.default_rng(0)
    batch = {
        "x": rng.standard_normal((BATCH, TOKENS, 4), np.float32),
        "scale": np.ones(BATCH, np.float32),
        "root": np.ones(BATCH, np.float32),
        "weight": np.ones(BATCH, np.float32),
    }
    params = model.init(jax.random.key(0), batch["x"], batch["scale"], batch["root"])
    if bad.endswith("input"):
        batch["x"][1, 2, 3] = np.nan if bad == "NaN input" else np.inf
    else:
        name, value = {
            "infinite activation": ("scale", 1e4),
            "NaN loss": ("weight", np.nan),
            "sqrt at zero": ("root", 0.0),
        }[bad]
        batch[name][1] = value

    def losses(params, batch):
        return model.apply(params, batch["x"], batch["scale"], batch["root"])[:, 0] * batch["weight"]

    is_bad = np.arange(BATCH) == 1
    results = [
        jax.jit(method(losses, l2_clip_norm=1.0, microbatch_size=microbatch_size))(
            params, batch, is_padding_example=is_padding
        )
        for method, is_padding in (
            (ghost_clipped_grad, ~is_bad & False),
            (ghost_clipped_grad, is_bad),
            (clipped_grad, ~is_bad & False),
        )
    ]
    (gradient, per_example), (padded, _), (reference, reference_per_example) = results
    jax.tree.map(np.testing.assert_array_equal, gradient, padded)
    assert not np.isfinite(reference_per_example.grad_norm[1])
    np.testing.assert_array_equal(np.isfinite(per_example.grad_norm), ~is_bad)
    for a, e in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference)):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max())


def split_params(params, trained):
    """The leaves whose path holds one of the names, by path; and what puts them back."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    treedef = jax.tree.structure(params)
    mine = {path: leaf for path, leaf in leaves.items() if any(name in path for name in trained)}
    return mine, lambda mine: treedef.unflatten({**leaves, **mine}[path] for path in leaves)


@pytest.mark.parametrize("remat", [False, True])
def test_only_params_are_counted(remat):
    """Biases of layers whose kernels are frozen, and a kernel whose bias is."""
    losses, params, batch = problem(Transformer(remat=remat))
    mine, merge = split_params(params, ["bias", "['q']['kernel']"])
    assert 0 < len(mine) < len(jax.tree.leaves(params))
    assert_equals_reference(
        lambda mine, batch: losses(merge(mine), batch), mine, batch, tolerance=TOLERANCE["float32"]
    )


def test_frozen_parameters_may_be_used_in_any_way():
    """Frozen: a convolution, a position table without batch axis, a layer used twice and one under vmap."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (2,), name="frozen_conv")(x) + nn.Embed(TOKENS, 4, name="frozen_1")(
                jnp.arange(TOKENS)
            )
            twice = nn.Dense(4, name="frozen_2")
            across = nn.vmap(
                nn.Dense, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=1, out_axes=1
            )(4, name="frozen_3")
            return nn.Dense(3, name="head")(across(twice(twice(nn.Dense(4, name="in")(x))))).sum(1)

    model, x = Model(), np.random.default_rng(0).standard_normal((BATCH, TOKENS, 4)).astype("float32")
    params = model.init(jax.random.key(0), x)
    mine, merge = split_params(params, ["head", "'in'"])
    assert_equals_reference(
        lambda mine, x: model.apply(merge(mine), x)[:, 0] ** 2, mine, x, tolerance=TOLERANCE["float32"]
    )


def test_unused_leaf_has_gradient_zero():
    losses, params, batch = problem(MLP())
    gradient, _ = assert_equals_reference(
        lambda p, b: losses(p["model"], b),
        {"model": params, "unused": np.ones(3, "float32")},
        batch,
        tolerance=1e-5,
    )
    assert not gradient["unused"].any()


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
    first = function(params, x)
    jax.tree.map(np.testing.assert_array_equal, first, function(params, x))
    assert_equals_reference(losses, params, x, tolerance=TOLERANCE["float32"])
    losses(params, x)


class Uncounted(nn.Module):
    """A model that ghost clipping must refuse."""

    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "conv":
            return nn.Conv(3, (2,))(x)
        if self.kind == "raw parameter":
            return x @ self.param("w", nn.initializers.ones, (3, 2))
        if self.kind == "subclass":
            return type("Doubled", (nn.Dense,), {})(3)(x)
        if self.kind == "used twice":
            layer = nn.Dense(3)
            return layer(layer(x))
        if self.kind == "penalty":
            layer = nn.Dense(3)
            return layer(x) + jnp.sum(layer.variables["params"]["kernel"] ** 2)
        if self.kind == "tied":
            table = nn.Embed(5, 3)
            return table.attend(table(jnp.argmax(x, -1)))
        if self.kind == "shared over a scan":
            step = nn.scan(
                lambda layer, h, _: (layer(h), None),
                variable_broadcast="params",
                split_rngs={"params": False},
                length=3,
            )
            return step(nn.Dense(3), x, None)[0]
        if self.kind == "shared over a vmap":
            return nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})(2)(x)
        if self.kind == "tokens first":
            return nn.Dense(2)(x.swapaxes(0, 1)).swapaxes(0, 1)
        if self.kind == "merged axes":
            return nn.Dense(2)(x.reshape(-1, 3)).reshape(*x.shape[:2], 2)
        if self.kind == "positions":
            return x + nn.Embed(x.shape[1], 3)(jnp.arange(x.shape[1])[None])
        if self.kind == "mask":
            return nn.LayerNorm()(x, mask=x > 0)
        if self.kind == "axes":
            return nn.LayerNorm(reduction_axes=(1, 2))(x)
        return nn.Dense(2, dot_general=jax.lax.dot_general)(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "conv",
            r"no rule for params\['params'\]\['Conv_0'\].*It has rules for .* Dense, LayerNorm, Embed.*freeze",
        ),
        ("raw parameter", r"\['w'\], which goes into: the operation dot_general"),
        ("subclass", r"no rule for params\['params'\]\['Doubled_0'\]"),
        (
            "used twice",
            r"\['Dense_0'\].* is used 2 times, by Dense 'Dense_0'; Dense 'Dense_0'.*cross terms.*freeze",
        ),
        ("penalty", r"kernel'\], which goes into: Dense 'Dense_0'; the operation"),
        ("tied", r"embedding'\], which goes into: Embed 'Embed_0'; the operation dot_general"),
        ("shared over a scan", "is used 3 times"),
        ("shared over a vmap", "inside a vmap"),
        (
            "tokens first",
            r"Dense 'Dense_0' whose input has shape \(4, batch, 3\): the batch axis must come first",
        ),
        ("merged axes", "the batch axis must come first, alone"),
        ("positions", r"Embed 'Embed_0' whose input has shape \(1, 4\).*position ids"),
        ("mask", "called with more than its input"),
        ("axes", r"with reduction_axes=\(1, 2\)"),
        ("dot_general", "with dot_general="),
    ],
)
def test_refuses_what_it_cannot_count(kind, reason):
    """The batch has as many examples as tokens: shapes alone do not tell which axis is which."""
    model, x = Uncounted(kind), np.ones((4, 4, 3), "float32")
    params = model.init(jax.random.key(0), x)

    def losses(params, x):
        return model.apply(params, x).sum((1, 2))

    with pytest.raises(ValueError, match=reason):
        ghost_clipped_grad(losses, l2_clip_norm=1.0)(params, x)
    clipped_grad(losses, l2_clip_norm=1.0)(params, x)  # the remedy in the message works


def test_refuses_narrow_dtypes_and_wrong_losses():
    losses, params, batch = problem(MLP())
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    for bad_losses, bad_params, reason in (
        (losses, half, "is bfloat16, but a clipped sum must be float32"),
        (
            lambda p, b: losses(jax.tree.map(lambda a: a.astype(jnp.bfloat16), p), b),
            params,
            "convert_element_type",
        ),
        (lambda p, b: losses(p, b).astype(jnp.bfloat16), params, "float32 or wider"),
        (lambda p, b: losses(p, b).mean(), params, r"one loss per example.*shape \(\)"),
        (lambda p, b: losses(p, b)[:, None], params, "one loss per example"),
    ):
        with pytest.raises(ValueError, match=reason):
            ghost_clipped_grad(bad_losses, l2_clip_norm=1.0)(bad_params, batch)


@pytest.mark.parametrize(
    "arguments", [{"method": "vmap"}, {"l2_clip_norm": 0.0}, {"normalize_by": -1.0}, {"clip": "hard"}]
)
def test_refuses_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ghost_clipped_grad(lambda p, b: b, **{"l2_clip_norm": 1.0, **arguments})


@pytest.mark.parametrize("scanned", [True, False])
def test_operations_relative_to_a_plain_gradient(scanned):
    """Forward, two backward passes without and one with weight gradients: 4/3, plus the norms.

    XLA counts the body of a loop once, hence a scanned and an unrolled stack: in neither may the first backward pass
    compute weight gradients (that would be 5/3).
    """

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            if scanned:
                axes = {
                    "variable_axes": {"params": 0},
                    "split_rngs": {"params": True},
                    "in_axes": nn.broadcast,
                }
                return nn.scan(Block, length=4, **axes)(64, 256)(x, None)[0]
            for i in range(4):
                x = Block(64, 256, name=f"layer_{i}")(x, None)[0]
            return x

    model, x = Stack(), jnp.ones((8, 4, 64))
    params = jax.eval_shape(model.init, jax.random.key(0), x)

    def losses(params, x):
        return jnp.sum(model.apply(params, x) ** 2, (1, 2))

    def flops(function):
        return jax.jit(function).lower(params, x).compile().cost_analysis()["flops"]

    plain = flops(jax.grad(lambda params, x: jnp.sum(losses(params, x))))
    assert 1.3 < flops(ghost_clipped_grad(losses, l2_clip_norm=1.0)) / plain < 1.45
