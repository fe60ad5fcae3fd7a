"""The law of sensitivity: neighbouring batches give gradients at most `.sensitivity()` apart, whatever the gradients.

The losses are linear in the parameters, so a batch holds the per-example gradients themselves (for ghost clipping, what
the layers see), and hypothesis can choose any bits for them.

Rounding allowed, relative to the clip norm C. One contribution is ``c g``: the norm is a float32 sum of squares in a
tree (2 units u = 6e-8 for so few entries), then a root, a quotient and a product: below 8 u. Two sums of B = 4
contributions, each at most C, round by at most (B - 1) B u each: 24 u. Together 2e-6. Ghost clipping computes the norm
from products of whole tokens and adds a bound of their rounding, so that tokens that cancel are clipped harder, never
less; the sum over tokens of at most 1e3 times the size of the result then rounds by less than 1e3 * 8 u = 5e-4.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import clipped_grad

BATCH, TOKENS, WIDTH, ROWS = 4, 2, 8, 3
ROUNDING = {"vmap": 2e-6, "ghost": 5e-4, "ghost of a convolution": 5e-4}
FIELDS = {"x": (TOKENS, WIDTH), "w": (TOKENS, WIDTH), "v": (TOKENS, WIDTH)}
# Half of the cases with microbatches; the clip norms are of different size, and their quotient by 3 is not exact.
SETTINGS = [("flat", 0.1, None), ("flat", 7.0, 2), ("automatic", 7.0, None), ("automatic", 0.1, 2)]


class TwoLayers(nn.Module):
    """A kernel with a bias, and a table; 2 * (8 + 8) < 8 * 8, so the kernel's norm comes from products of tokens."""

    @nn.compact
    def __call__(self, batch):
        return (nn.Dense(WIDTH)(batch["x"]) * batch["w"]).sum((1, 2)) + (
            nn.Embed(ROWS, WIDTH)(batch["ids"]) * batch["v"]
        ).sum((1, 2))


class ConvolutionAndCopies(nn.Module):
    """A convolution, whose patches share entries, and positions of which each example has a copy."""

    @nn.compact
    def __call__(self, batch):
        positions = self.param("positions", nn.initializers.zeros, (1, TOKENS, WIDTH))
        copies = jnp.broadcast_to(positions, batch["v"].shape)
        return (nn.Conv(WIDTH, (2,))(batch["x"]) * batch["w"]).sum((1, 2)) + (copies * batch["v"]).sum((1, 2))


MODULES = {"ghost": TwoLayers, "ghost of a convolution": ConvolutionAndCopies}


def leafwise_losses(params, batch):
    """The gradients of example i are its rows of x, w and v."""
    return sum(jnp.sum(params[name] * batch[name], axis=(1, 2)) for name in FIELDS)


@functools.cache
def compiled(method, clip, l2_clip_norm, microbatch_size):
    options = {"l2_clip_norm": l2_clip_norm, "normalize_by": 3.0, "clip": clip, "microbatch_size": microbatch_size}
    if method == "vmap":
        params = {name: jnp.zeros(shape) for name, shape in FIELDS.items()}
        function = clipped_grad(leafwise_losses, **options)
    else:
        module = MODULES[method]()
        batch = {name: np.zeros((1, *shape), np.float32) for name, shape in FIELDS.items()}
        params = module.init(jax.random.key(0), {**batch, "ids": np.zeros((1, TOKENS), np.int32)})
        function = ghost_clipped_grad(module.apply, **options)
    return function, jax.jit(functools.partial(function, params))


def any_bits(shape):
    """Every float32 there is: NaN, infinite, denormal, both zeros."""
    return hnp.arrays(np.uint32, shape).map(lambda bits: bits.view(np.float32))


@st.composite
def scaled(draw, shape):
    """Gaussian entries times one power of ten for all, or one for each."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    each = draw(st.booleans())
    exponent = rng.uniform(-44, 38, shape) if each else draw(st.integers(-44, 38))
    with np.errstate(over="ignore"):
        return (rng.standard_normal(shape) * 10.0**exponent).astype(np.float32)


def ordinary(shape):
    """Small whole numbers, many of them zero."""
    return hnp.arrays(np.float32, shape, elements=st.integers(-4, 4).map(np.float32))


@st.composite
def examples(draw):
    """One example: extreme, ordinary, or with tokens that almost cancel."""
    example = {name: draw(st.one_of(any_bits(s), scaled(s), ordinary(s))) for name, s in FIELDS.items()}
    if draw(st.booleans()):
        size = np.float32(10.0 ** draw(st.integers(0, 10)))
        first = ordinary(FIELDS["x"][1:])
        example["x"][0], example["w"][:] = size * draw(first), draw(first)
        example["x"][1] = draw(first) - example["x"][0]
        example["v"][0] = size * draw(first)
        example["v"][1] = draw(first) - example["v"][0]
    example["ids"] = draw(hnp.arrays(np.int32, TOKENS, elements=st.integers(0, ROWS - 1)))
    return example


def distance(first, second):
    squares = [
        np.sum(np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    ]
    return np.sqrt(sum(squares))


@pytest.mark.parametrize("method", ROUNDING)
@pytest.mark.parametrize("cases", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_neighbours_differ_by_at_most_the_sensitivity(method, cases):
    @settings(max_examples=cases, deadline=None)
    @given(
        setting=st.sampled_from(SETTINGS),
        rows=st.lists(examples(), min_size=BATCH, max_size=BATCH),
        other=examples(),
        changed=st.integers(0, BATCH - 1),
        is_padding=hnp.arrays(bool, BATCH),
    )
    def holds(setting, rows, other, changed, is_padding):
        function, run = compiled(method, *setting)
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        replaced = {name: x.copy() for name, x in batch.items()}
        for name, value in other.items():
            replaced[name][changed] = value
        present, absent = is_padding.copy(), is_padding.copy()
        present[changed], absent[changed] = False, True
        with np.errstate(all="ignore"):
            gradient, without, instead = (
                run(b, is_padding_example=p)[0] for b, p in ((batch, present), (batch, absent), (replaced, present))
            )
        bound = (1 + ROUNDING[method]) * function.sensitivity()
        of_replacing = (1 + ROUNDING[method]) * function.sensitivity(NeighboringRelation.REPLACE_ONE)
        assert distance(gradient, without) <= bound  # NaN fails
        assert distance(instead, without) <= bound
        assert distance(gradient, instead) <= of_replacing

    holds()


def test_the_bound_is_reached():
    """The law above would hold of a function that returns zero; a large gradient moves the sum by all of it."""
    for method in ROUNDING:
        for setting in SETTINGS:
            function, run = compiled(method, *setting)
            batch = {name: np.full((BATCH, *shape), 1e3, np.float32) for name, shape in FIELDS.items()}
            batch["ids"] = np.zeros((BATCH, TOKENS), np.int32)
            gradient, without = (run(batch, is_padding_example=np.arange(BATCH) < n)[0] for n in (1, 2))
            np.testing.assert_allclose(distance(gradient, without), function.sensitivity(), rtol=1e-4)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_tokens_that_cancel_do_not_hide_from_ghost_clipping(size):
    """x_1 + x_2 is of size 1 however large both are; their products alone would round its square away."""
    rng = np.random.default_rng(0)
    large = rng.integers(-4, 5, (BATCH, WIDTH)).astype(np.float32) * np.float32(size)
    rest = rng.integers(-4, 5, (BATCH, WIDTH)).astype(np.float32)
    batch = {name: np.zeros((BATCH, *shape), np.float32) for name, shape in FIELDS.items()}
    batch["x"][:] = np.stack([large + rest, -large], axis=1)
    batch["w"][:] = 1.0
    batch["v"][:] = np.stack([large + rest, -large], axis=1)
    batch["ids"] = np.zeros((BATCH, TOKENS), np.int32)
    function, run = compiled("ghost", "flat", 0.1, None)
    gradient, without = (run(batch, is_padding_example=np.arange(BATCH) < n)[0] for n in (1, 2))
    assert distance(gradient, without) <= (1 + ROUNDING["ghost"]) * function.sensitivity()
