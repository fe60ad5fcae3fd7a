"""Laws of ghost clipping: rules equal explicit gradients; every leaf is counted once or refused."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_rmt.clipping import clipped_grad
from dp_rmt.ghost_clipping import ghost_clipped_grad
from dp_rmt.ghost_rules import LOOKUP, MATRIX, OFFSET, SCALE, mark, tap, uses_of_leaves

SIZES = {name: st.sampled_from([1, 2, 7]) for name in ("batch", "tokens", "inputs", "outputs")}
# Explicit gradients of one example, (T, I) and (T, O) to the shape of the leaf.
EXPLICIT = {
    "matrix": (MATRIX, lambda x, g: np.einsum("ti,to->io", x, g)),
    "offset": (OFFSET, lambda x, g: g.sum(0)),
    "scale": (SCALE, lambda x, g: (x * g).sum(0)),
    "lookup": (LOOKUP, lambda ids, g: np.eye(5)[ids].T @ g),
}


def draw_layer(name, batch, tokens, inputs, outputs, seed):
    """Random inputs and output gradients of a layer, float64."""
    rng = np.random.default_rng(seed)
    g = rng.standard_normal((batch, tokens, outputs))
    if name == "lookup":
        return rng.integers(0, 5, (batch, tokens)), g
    return rng.standard_normal((batch, tokens, outputs if name == "scale" else inputs)), g


@pytest.mark.parametrize("name", EXPLICIT)
@settings(max_examples=10, deadline=None)
@given(**SIZES, seed=st.integers(0, 2**32 - 1))
def test_rule_equals_explicit_gradients(name, batch, tokens, inputs, outputs, seed):
    """These sizes reach both forms of the matrix rule, and repeated ids in the table of five rows."""
    rule, gradient = EXPLICIT[name]
    x, g = draw_layer(name, batch, tokens, inputs, outputs, seed)
    explicit = np.stack([gradient(x_i, g_i) for x_i, g_i in zip(x, g)])
    with jax.enable_x64(True):
        norms = rule.squared_norm(jnp.asarray(x), jnp.asarray(g))
        total = rule.weighted_sum(jnp.asarray(x), jnp.asarray(g), explicit.shape[1:])
    # float64: at most 7^4 products of size about 1, each rounded to 1e-16.
    np.testing.assert_allclose(norms, np.square(explicit).reshape(batch, -1).sum(1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(total, explicit.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [2, 40])
def test_matrix_rule_takes_the_cheaper_form(tokens):
    """Gram form below T = IO / (I + O) = 8, direct form above: no array of the other form exists."""
    x, g = jnp.ones((3, tokens, 16)), jnp.ones((3, tokens, 16))
    shapes = [v.aval.shape for eqn in jax.make_jaxpr(MATRIX.squared_norm)(x, g).eqns for v in eqn.outvars]
    assert ((3, tokens, tokens) in shapes) == (tokens == 2)
    assert ((3, 16, 16) in shapes) == (tokens == 40)


@pytest.mark.parametrize("name", EXPLICIT)
def test_half_precision_is_accumulated_in_float32(name):
    """Products of bfloat16 are exact in float32; the sum of 257 ones is not a bfloat16."""
    rule, _ = EXPLICIT[name]
    x = jnp.zeros((1, 257), int) if name == "lookup" else jnp.ones((1, 257, 1), jnp.bfloat16)
    g = jnp.ones((1, 257, 1), jnp.bfloat16)
    assert rule.squared_norm(x, g).dtype == jnp.float32
    # Up to the bound of rounding that a rule adds, 2.4e-7; a sum in bfloat16 would end at 256.
    np.testing.assert_allclose(rule.squared_norm(x, g), [257.0**2], rtol=1e-6)
    total = rule.weighted_sum(x, g, (1, 1))
    assert total.dtype == jnp.float32
    assert total.item() == 257.0


def test_cancelling_tokens_never_give_a_negative_norm():
    """Tokens that cancel exactly leave only rounding, of either sign, in the Gram form."""
    rng = np.random.default_rng(0)
    half_x, half_g = rng.standard_normal((2, 500, 1, 64)).astype(np.float32)
    x, g = np.concatenate([half_x, half_x], 1), np.concatenate([half_g, -half_g], 1)
    norms = np.asarray(MATRIX.squared_norm(jnp.asarray(x), jnp.asarray(g)))
    assert (norms >= 0).all()
    # eps (sqrt I + sqrt O) (sum_t |x_t| |g_t|)^2, which the rule adds, with |x_t| |g_t| from 25 to 120.
    size = 2 * np.linalg.norm(half_x[:, 0], axis=-1) * np.linalg.norm(half_g[:, 0], axis=-1)
    bound = np.finfo(np.float32).eps * 16 * size**2
    assert (norms >= 0.99 * bound).all()
    assert (norms <= 3 * bound).all()


def layer(w, b, x, probe):
    """y = x W + b, tapped."""
    y = x @ jax.lax.stop_gradient(w) + jax.lax.stop_gradient(b)
    return tap({"w": MATRIX, "b": OFFSET}, {"w": w, "b": b}, x, y, probe)


def test_tap_gives_the_stock_gradient_and_counts_only_what_is_differentiated():
    rng = np.random.default_rng(0)
    w, b, x = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 2), (2,), (4, 5, 3)))
    probe = jnp.zeros(4)

    def loss(w, b, x, probe):
        return jnp.sum(jnp.sin(layer(w, b, x, probe)))

    stock = jax.grad(lambda w, b, x: jnp.sum(jnp.sin(x @ w + b)), argnums=(0, 1, 2))(w, b, x)
    *tapped, both = jax.grad(loss, argnums=(0, 1, 2, 3))(w, b, x, probe)
    for actual, expected in zip(tapped, stock):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    g = np.cos(x @ w + b)
    kernel_only = jax.grad(loss, argnums=(0, 3))(w, b, x, probe)[1]
    np.testing.assert_allclose(kernel_only, np.square(np.einsum("bti,bto->bio", x, g)).sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(both - kernel_only, np.square(g.sum(1)).sum(1), rtol=1e-4)
    assert not jax.grad(loss, argnums=3)(w, b, x, probe).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_tap_keeps_an_excluded_example_out_of_the_sum(bad):
    """Example 0 saw a value that is not finite, and its loss has the cotangent zero."""
    w, b = jnp.ones((3, 2)), jnp.zeros(2)
    x = jnp.ones((4, 5, 3)).at[0, 1, 2].set(bad)
    _, pull_back = jax.vjp(lambda w, b: jnp.sum(layer(w, b, x, jnp.zeros(4)) ** 2, (1, 2)), w, b)
    with_it = pull_back(jnp.array([0.0, 1, 1, 1]))
    x = x[1:]
    _, pull_back = jax.vjp(lambda w, b: jnp.sum(layer(w, b, x, jnp.zeros(3)) ** 2, (1, 2)), w, b)
    for actual, expected in zip(with_it, pull_back(jnp.ones(3))):
        np.testing.assert_array_equal(actual, expected)


def use(leaf, y):
    return mark("layer", {"leaf": leaf}, y)


def double(leaf, y):
    return use(leaf, use(leaf, y))


def scan_sliced(leaf, y):
    return jax.lax.scan(lambda c, row: (use(row, c), None), y, leaf)[0]


def scan_shared(leaf, y):
    return jax.lax.scan(lambda c, _: (use(leaf, c), None), y, None, length=3)[0]


def scan_carried(leaf, y):
    return jax.lax.scan(lambda c, _: ((2 * c[0], use(c[0], c[1])), None), (leaf, y), None, length=1)[0][1]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda leaf, y: y, []),
        (lambda leaf, y: y + jax.lax.stop_gradient(leaf).sum(), []),
        (use, ["layer"]),
        (double, ["layer"] * 2),
        (lambda leaf, y: use(leaf.T.astype(jnp.float32).reshape(-1), y), ["layer"]),
        (jax.jit(jax.checkpoint(use)), ["layer"]),
        (scan_sliced, ["layer"]),
        (lambda leaf, y: scan_sliced(leaf.T, scan_sliced(leaf, y)), ["layer"] * 2),
        (scan_shared, ["layer"] * 3),
        (scan_carried, ["the carry or the output of a scan"]),
        (lambda leaf, y: use(leaf.astype(jnp.bfloat16), y), ["the operation convert_element_type"]),
        (lambda leaf, y: use(leaf[0], y), ["the operation slice"]),
        (lambda leaf, y: use(2 * leaf, y), ["the operation mul"]),
        (lambda leaf, y: jax.lax.cond(y[0] > 0, use, lambda leaf, y: y, leaf, y), ["the operation cond"]),
        (lambda leaf, y: jax.vmap(use, (None, 0))(leaf, y), ["layer inside a vmap"]),
        (lambda leaf, y: jax.vmap(use)(leaf, y), ["layer inside a vmap"]),
        (lambda leaf, y: jax.grad(lambda y: use(leaf, y).sum())(y), ["layer inside a derivative"]),
        (lambda leaf, y: leaf, ["the result, as it is"]),
        (lambda leaf, y: use(leaf, y) + 0 * leaf.sum(), ["layer", "the operation reduce_sum"]),
    ],
)
def test_leaves_are_followed_to_every_use(function, expected):
    jaxpr = jax.make_jaxpr(function)(jnp.ones((4, 3)), jnp.ones(4)).jaxpr
    assert uses_of_leaves(jaxpr, 1) == [expected]


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
            r"no rule for params\['params'\]\['Conv_0'\].*rules for .* Dense, LayerNorm, Embed.*freeze",
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
    jax.eval_shape(clipped_grad(losses, l2_clip_norm=1.0), params, x)  # the remedy in the message works


def test_refuses_narrow_dtypes_and_wrong_losses():
    model, x = nn.Dense(3), np.ones((4, 3), "float32")
    params = model.init(jax.random.key(0), x)

    def losses(params, x):
        return model.apply(params, x).sum(1)

    def half(params):
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)

    for bad_losses, bad_params, reason in (
        (losses, half(params), "is bfloat16, but a clipped sum must be float32"),
        (lambda p, x: losses(half(p), x), params, "convert_element_type"),
        (lambda p, x: losses(p, x).astype(jnp.bfloat16), params, "float32 or wider"),
        (lambda p, x: losses(p, x).mean(), params, r"one loss per example.*shape \(\)"),
        (lambda p, x: losses(p, x)[:, None], params, "one loss per example"),
    ):
        with pytest.raises(ValueError, match=reason):
            ghost_clipped_grad(bad_losses, l2_clip_norm=1.0)(bad_params, x)
