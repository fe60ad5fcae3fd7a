"""Laws of ghost clipping: rules equal explicit gradients; every leaf is counted once or refused."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_rmt.clipping.contraction import Contraction
from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.leaf_rules import Lookup, Offset, Scale
from dp_rmt.clipping.leaf_uses import mark, uses_of_leaves
from dp_rmt.clipping.per_example import clipped_grad
from dp_rmt.clipping.taps import tap

MATRIX = Contraction("bti", "io", "bto")

# Each rule with the axes of x, of the leaf, and of g. Sizes reach both forms of a contraction, kept gradients and not.
CASES = {
    "per token": (Contraction("bti", "io", "bto"), "bti", "io", "bto"),
    "per example": (Contraction("bi", "io", "bo"), "bi", "io", "bo"),
    "two token axes": (Contraction("bsti", "io", "bsto"), "bsti", "io", "bsto"),
    "to heads": (Contraction("bti", "inh", "btnh"), "bti", "inh", "btnh"),
    "from heads": (Contraction("btnh", "nho", "bto"), "btnh", "nho", "bto"),
    "per head": (Contraction("btnh", "nhk", "btnk"), "btnh", "nhk", "btnk"),
    "transposed": (Contraction("bti", "oi", "bto"), "bti", "oi", "bto"),
    "tokens last": (Contraction("bit", "io", "bto"), "bit", "io", "bto"),
    "offset": (Offset("bto", "o"), "bti", "o", "bto"),
    "offset of heads": (Offset("btnh", "nh"), "bti", "nh", "btnh"),
    "scale": (Scale(), "bto", "o", "bto"),
    "lookup": (Lookup(5), "bt", "vo", "bto"),
}
SIZES = st.fixed_dictionaries(dict.fromkeys("bstiohnkv", st.sampled_from([2, 1, 7])))
SEED = st.integers(0, 2**32 - 1)
# Every case is compiled for its own shapes.
FEW_OR_MANY = pytest.mark.parametrize("cases", [3, pytest.param(60, marks=pytest.mark.slow)])


def draw_layer(name, sizes, seed):
    """Random inputs and output gradients of a layer, float64, and the gradient of each example."""
    rng = np.random.default_rng(seed)
    _, x_axes, w_axes, y_axes = CASES[name]
    g = rng.standard_normal([sizes[a] for a in y_axes])
    if name == "lookup":
        ids = rng.integers(0, 5, [sizes[a] for a in x_axes])
        return ids, g, np.einsum("btv,bto->bvo", np.eye(5)[ids], g)
    x = rng.standard_normal([sizes[a] for a in x_axes])
    if name.startswith("offset"):
        return x, g, np.einsum(f"{y_axes}->b{w_axes}", g)
    return x, g, np.einsum(f"{x_axes},{y_axes}->b{w_axes}", x, g)


@pytest.mark.parametrize("name", CASES)
@FEW_OR_MANY
def test_rule_equals_explicit_gradients(name, cases):
    @settings(max_examples=cases, deadline=None)
    @given(sizes=SIZES, seed=SEED)
    def holds(sizes, seed):
        rule = CASES[name][0]
        x, g, explicit = draw_layer(name, sizes, seed)
        weights = np.random.default_rng(seed).standard_normal(len(g))
        with jax.enable_x64(True):
            norms = rule.squared_norm(jnp.asarray(x), jnp.asarray(g))
            total = rule.weighted_sum(jnp.asarray(x), jnp.asarray(g), jnp.asarray(weights))
        # float64: at most 7^6 products of size about 1, each rounded to 1e-16.
        np.testing.assert_allclose(norms, np.square(explicit).reshape(len(g), -1).sum(1), rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(total, np.einsum("b,b...->...", weights, explicit), rtol=1e-11, atol=1e-11)

    holds()


def shapes_of_results(function, *arguments):
    """Of every operation, those within the branches of a choice included."""

    def within(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval.shape for v in eqn.outvars)
            for branch in eqn.params.get("branches", ()):
                yield from within(branch.jaxpr)

    return list(within(jax.make_jaxpr(function)(*arguments).jaxpr))


# Of a float32 result near one, what rounding adds to the norm is some 1e-6; where tokens cancel, more.
@pytest.mark.parametrize("name", CASES)
@FEW_OR_MANY
def test_rule_in_the_corners_of_float32(name, cases):
    """Inputs times 2^e, output gradients times 2^-e, other e for every token: the same gradients, to the last bits."""

    @settings(max_examples=cases, deadline=None)
    @given(sizes=SIZES, seed=SEED, exponent=st.sampled_from([-110, -64, -60, 0, 58, 61, 63, 110]))
    def holds(sizes, seed, exponent):
        rule, (x, g, explicit) = CASES[name][0], draw_layer(name, sizes, seed)
        weights = np.random.default_rng(seed).standard_normal(len(g))
        if isinstance(rule, Contraction):
            x, g = times_powers_of_two(name, x, g, exponent, seed)
        x = x if name == "lookup" else jnp.asarray(x, jnp.float32)
        g, weights = jnp.asarray(g, jnp.float32), jnp.asarray(weights, jnp.float32)
        size = np.square(explicit).sum()
        # Up to 7^2 tokens that cancel by chance.
        norms, total = np.square(explicit).reshape(len(g), -1).sum(1), np.einsum("b,b...->...", weights, explicit)
        np.testing.assert_allclose(rule.squared_norm(x, g), norms, rtol=1e-3, atol=1e-4 * size)
        np.testing.assert_allclose(rule.weighted_sum(x, g, weights), total, rtol=1e-4, atol=1e-4 * size**0.5)

    holds()


def times_powers_of_two(name, x, g, exponent, seed):
    """An input and its output gradient times a factor of the token, and one over it."""
    _, x_axes, w_axes, y_axes = CASES[name]
    spread = np.random.default_rng(seed).integers(-2, 3, [1 if a in w_axes else n for a, n in zip(x_axes, x.shape)])
    factors = 2.0 ** (exponent + spread)
    of_tokens = "".join(a for a in x_axes if a not in w_axes)
    flat = np.squeeze(factors, tuple(i for i, a in enumerate(x_axes) if a in w_axes))
    return x * factors, np.einsum(f"{of_tokens},{y_axes}->{y_axes}", 1 / flat, g)


@pytest.mark.parametrize(("tokens", "gram", "kept"), [(2, True, False), (8, False, True), (40, False, True)])
def test_matrix_rule_takes_the_cheapest_form(tokens, gram, kept):
    """Of 16 x 16: gradients are kept from T = I / 2 on; below, the Gram form; no array of the other form exists."""
    x, g, weights = jnp.ones((3, tokens, 16)), jnp.ones((3, tokens, 16)), jnp.ones(3)

    norm = shapes_of_results(MATRIX.squared_norm, x, g)
    assert ((3, tokens, tokens) in norm) == gram
    assert ((3, 16, 16) in norm) == (not gram)
    assert ((3, 16, 16) in shapes_of_results(MATRIX.weighted_sum, x, g, weights)) == kept


def test_direct_form_is_taken_where_gradients_are_not_kept_and_tokens_are_many():
    """T = 5 tokens, I = 16 > 2 T, O = 4: I O = 64 is less than T (I + O) = 100."""
    x, g = jnp.ones((3, 5, 16)), jnp.ones((3, 5, 4))
    shapes = shapes_of_results(MATRIX.squared_norm, x, g)
    assert (3, 16, 4) in shapes
    assert (3, 5, 5) not in shapes


@pytest.mark.parametrize("name", ["per token", "offset", "scale", "lookup"])
def test_half_precision_is_accumulated_in_float32(name):
    """Products of bfloat16 are exact in float32; the sum of 257 ones is not a bfloat16."""
    rule = CASES[name][0]
    x = jnp.zeros((1, 257), int) if name == "lookup" else jnp.ones((1, 257, 1), jnp.bfloat16)
    g = jnp.ones((1, 257, 1), jnp.bfloat16)
    assert rule.squared_norm(x, g).dtype == jnp.float32
    # With the bound of rounding that a rule adds to the norm, eps sqrt T for a sum of T tokens. A sum in bfloat16 would
    # end at 256.
    eps = np.finfo(np.float32).eps
    bound = eps / 2 if name == "lookup" else eps * 257**0.5
    np.testing.assert_allclose(rule.squared_norm(x, g), [(257.0 * (1 + bound)) ** 2], rtol=1e-6)
    total = rule.weighted_sum(x, g, jnp.ones(1))
    assert total.dtype == jnp.float32
    assert total.ravel()[0] == 257.0


def test_clipped_contribution_of_bfloat16_layers_is_within_the_clip_norm():
    """Two tokens that nearly cancel: what rounding of c_i g_i adds is 100 times the gradient's own norm."""
    rng = np.random.default_rng(0)
    x = np.ones((200, 2, 8)) * rng.standard_normal((200, 1, 8))
    g = rng.standard_normal((200, 1, 8)) * np.array([1.0, -1.0])[:, None]
    x, g = jnp.asarray(x, jnp.bfloat16), jnp.asarray(g, jnp.bfloat16).at[:, 1].multiply(1 - 2**-7)
    norms = jnp.sqrt(MATRIX.squared_norm(x, g))
    own = jnp.linalg.norm(jnp.einsum("bti,bto->bio", x, g, preferred_element_type=jnp.float32), axis=(1, 2))
    clip_norm = 0.7 * own.min()

    def largest_contribution(weights):
        one = lambda xgw: jnp.linalg.norm(MATRIX.weighted_sum(*(a[None] for a in xgw)))  # noqa: E731
        return jax.lax.map(one, (x, g, weights)).max()

    assert largest_contribution(clip_norm / norms) <= clip_norm
    assert largest_contribution(clip_norm / own) > 1.1 * clip_norm  # the bound is needed


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


def layer(w, b, x, weights):
    """y = x W + b, tapped."""
    y = x @ jax.lax.stop_gradient(w) + jax.lax.stop_gradient(b)
    return tap({"w": MATRIX, "b": Offset("bto", "o")}, {"w": w, "b": b}, x, y, weights)


def test_tap_gives_the_stock_gradient_and_counts_only_what_is_differentiated():
    rng = np.random.default_rng(0)
    w, b, x = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 2), (2,), (4, 5, 3)))

    def loss(w, b, x, weights):
        return jnp.sum(jnp.sin(layer(w, b, x, weights)))

    stock = jax.grad(lambda w, b, x: jnp.sum(jnp.sin(x @ w + b)), argnums=(0, 1, 2))(w, b, x)
    *tapped, both = jax.grad(loss, argnums=(0, 1, 2, 3))(w, b, x, jnp.ones(4))
    for actual, expected in zip(tapped, stock):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    g = np.cos(x @ w + b)
    kernel_only = jax.grad(loss, argnums=(0, 3))(w, b, x, jnp.ones(4))[1]
    np.testing.assert_allclose(kernel_only, np.square(np.einsum("bti,bto->bio", x, g)).sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(both - kernel_only, np.square(g.sum(1)).sum(1), rtol=1e-4)
    assert not jax.grad(loss, argnums=3)(w, b, x, jnp.ones(4)).any()


@pytest.mark.parametrize("tokens", [1, 5])  # gradients kept or not
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_tap_keeps_an_excluded_example_out_of_the_sum(bad, tokens):
    """Example 0 saw a value that is not finite; its loss has the cotangent zero, or it has the weight zero."""
    w, b = jnp.ones((3, 2)), jnp.zeros(2)
    x = jnp.ones((4, tokens, 3)).at[0, 0, 2].set(bad)

    def sums(x, cotangents, weights):
        _, pull_back = jax.vjp(lambda w, b: jnp.sum(layer(w, b, x, weights) ** 2, (1, 2)), w, b)
        return pull_back(cotangents)

    expected = sums(x[1:], jnp.ones(3), jnp.ones(3))
    without = jnp.array([0.0, 1, 1, 1])
    jax.tree.map(np.testing.assert_array_equal, sums(x, without, jnp.ones(4)), expected)
    jax.tree.map(np.testing.assert_array_equal, sums(x, jnp.ones(4), without), expected)


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
    assert [[use.by for use in uses] for uses in uses_of_leaves(jaxpr, 1)] == [expected]


class Doubled(nn.Dense):
    """It computes something else than a Dense layer."""

    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class Narrowed(nn.Dense):
    """It inherits the method; what the method reads from the module is no longer the parameter."""

    def param(self, name, *arguments):
        return super().param(name, *arguments)[..., :3]


class Uncounted(nn.Module):
    """A model that ghost clipping must refuse."""

    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "conv":
            return nn.ConvTranspose(3, (2,))(x)
        if self.kind == "masked conv":
            return nn.Conv(3, (2,), mask=np.ones((2, 3, 3), "float32"))(x)
        if self.kind == "conv over examples":
            return nn.Conv(3, (2, 2))(x)
        if self.kind == "conv of one's own":
            return nn.Conv(3, (2,), conv_general_dilated=jax.lax.conv_general_dilated)(x)
        if self.kind == "positions twice":
            p = self.param("p", nn.initializers.ones, (1, 4, 3))
            return (x + p) * p
        if self.kind == "positions of tokens":
            p = self.param("p", nn.initializers.ones, (1, 4, 3))
            return x + (p + jnp.ones((4, 4, 3))).sum(0)
        if self.kind == "positions repeated":
            return x + jnp.broadcast_to(self.param("p", nn.initializers.ones, (3,)), (1, 4, 3))
        if self.kind == "group norm over examples":
            return nn.GroupNorm(3, reduction_axes=(0, 1, 2))(x)
        if self.kind == "raw parameter":
            return x @ self.param("w", nn.initializers.ones, (3, 2))
        if self.kind == "subclass":
            return Doubled(3)(x)
        if self.kind == "subclass with another param":
            return Narrowed(3)(x)
        if self.kind == "used twice":
            layer = nn.Dense(3)
            return layer(layer(x))
        if self.kind == "penalty":
            layer = nn.Dense(3)
            return layer(x) + jnp.sum(layer.variables["params"]["kernel"] ** 2)
        if self.kind == "tied twice":
            table = nn.Embed(5, 3)
            return table.attend(table(jnp.argmax(x, -1)) + table(jnp.argmin(x, -1)))
        if self.kind == "tied backwards":
            table = nn.Embed(5, 3)
            return table(jnp.argmax(table.attend(x), -1))
        if self.kind == "einsum of sums":
            return nn.Einsum((3, 2, 2), "bti,iok->bto")(x)
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
            r"no rule for params\['params'\]\['ConvTranspose_0'\].*rules for Dense, .*LAYER_RULES.*freeze",
        ),
        ("masked conv", "with a mask of its kernel"),
        ("conv over examples", "slide along that of the examples"),
        ("conv of one's own", "with conv_general_dilated="),
        ("positions twice", r"\['p'\], which goes into: the operation add; the operation mul"),
        ("positions of tokens", r"\['p'\], which goes into: the operation add"),
        ("positions repeated", r"\['p'\], which goes into: the operation broadcast_in_dim"),
        ("group norm over examples", r"with reduction_axes=\(0, 1, 2\)"),
        ("subclass with another param", r"no rule for params\['params'\]\['Narrowed_0'\]"),
        ("raw parameter", r"\['w'\], which goes into: the operation dot_general"),
        ("subclass", r"no rule for params\['params'\]\['Doubled_0'\]"),
        (
            "used twice",
            r"\['Dense_0'\].* is used 2 times, by Dense 'Dense_0'; Dense 'Dense_0'.*cross terms.*freeze",
        ),
        ("penalty", r"kernel'\], which goes into: Dense 'Dense_0'; the operation"),
        ("tied twice", r"embedding'\].* is used 3 times, .*only for one lookup and one `attend`"),
        ("tied backwards", "'Embed_0'.attend is called before the lookup"),
        ("einsum of sums", "with axes bti,iok->bto, of which one is summed within one operand"),
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
        ghost_clipped_grad(losses, l2_clip_norm=1.0)(params, x, is_padding_example=None)
    # The remedy in the message works.
    jax.eval_shape(partial(clipped_grad(losses, l2_clip_norm=1.0), is_padding_example=None), params, x)


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
            ghost_clipped_grad(bad_losses, l2_clip_norm=1.0)(bad_params, x, is_padding_example=None)
