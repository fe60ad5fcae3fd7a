"""Models as other people write them: convolutions, group norms, learned positions, class tokens, subclasses."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.layer_rules import rule_of
from dp_rmt.clipping.per_example import clipped_grad

METHODS = ("bookkeeping", "ghost")


class Projection(nn.Dense):
    """A subclass as people write them for another default."""

    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()


class VisionTransformer(nn.Module):
    """Patches by a strided convolution, a class token, learned positions, layer scales, and a group norm before it."""

    width: int = 6

    @nn.compact
    def __call__(self, images):
        x = nn.GroupNorm(2)(nn.Conv(4, (3, 3))(images))
        x = nn.InstanceNorm()(nn.Conv(4, (3, 3), feature_group_count=4, use_bias=False, name="depthwise")(x))
        x = nn.Conv(self.width, (2, 2), strides=2, padding="VALID", name="embedding")(x)
        x = x.reshape(len(x), -1, self.width)
        token = self.param("cls", nn.initializers.normal(), (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token, [len(x), 1, 1]), x], axis=1)
        positions = self.param("pos_embedding", nn.initializers.normal(), (1, 9, self.width))
        x = x + positions[:, : x.shape[1]]
        scale = self.param("layer_scale", nn.initializers.ones, (self.width,))
        x = x + scale * Projection(self.width)(nn.LayerNorm()(x))
        return nn.Dense(3)(jnp.tanh(x).mean(1) + x[:, 0])


def losses(params, batch):
    logits = VisionTransformer().apply(params, batch["image"])
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1)[:, 0]


@functools.cache
def drawn():
    rng = np.random.default_rng(0)
    batch = {"image": rng.standard_normal((5, 4, 4, 2)).astype("float32"), "label": rng.integers(0, 3, 5)}
    shapes = jax.eval_shape(VisionTransformer().init, jax.random.key(0), batch["image"])
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype("float32"), shapes), batch


@functools.cache
def compiled(method, microbatch_size=None):
    options = {"l2_clip_norm": 2.0, "microbatch_size": microbatch_size}
    if method == "vmap":
        return jax.jit(clipped_grad(losses, **options))
    return jax.jit(ghost_clipped_grad(losses, method=method, **options))


def assert_equal(result, reference, *, tolerance=2e-5):
    (total, per_example), (expected, of_reference) = result, reference
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    np.testing.assert_allclose(per_example.grad_norm, of_reference.grad_norm, rtol=tolerance)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        assert np.abs(leaf).max() > 5 * tolerance * largest, path  # else nothing would be compared
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance * largest), total, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_vision_transformer_equals_vmap(method):
    params, batch = drawn()
    nothing = np.zeros(5, bool)
    assert_equal(
        compiled(method)(params, batch, is_padding_example=nothing),
        compiled("vmap")(params, batch, is_padding_example=nothing),
    )


@pytest.mark.parametrize("method", METHODS)
def test_padding_and_examples_that_are_not_finite_add_nothing(method):
    params, batch = drawn()
    bad = {**batch, "image": batch["image"].copy()}
    bad["image"][1], bad["image"][3, 0, 0, 0] = 1e30, np.nan
    padding = np.array([False, True, False, False, False])
    total, per_example = compiled(method)(params, bad, is_padding_example=padding)
    without = compiled(method)(params, batch, is_padding_example=np.array([False, True, False, True, False]))[0]
    # A NaN anywhere lets the norms of the others be computed with scales, which rounds them otherwise in the last bit.
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(assert_close, total, without)
    assert per_example.grad_norm[1] == 0
    assert np.isnan(per_example.grad_norm[3])


def test_one_example_at_a_time():
    """With a single row the first axis of a parameter and that of the batch are equally long."""
    params, batch = drawn()
    nothing = np.zeros(5, bool)
    assert_equal(
        compiled("bookkeeping", 1)(params, batch, is_padding_example=nothing),
        compiled("vmap")(params, batch, is_padding_example=nothing),
    )


class BatchNormalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False)(x))


def test_batch_norm_is_refused():
    model, x = BatchNormalised(), np.ones((4, 3), "float32")
    variables = model.init(jax.random.key(0), x)

    def mixes(params, x):
        return model.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0][:, 0]

    with pytest.raises(ValueError, match="the losses mix examples"):
        ghost_clipped_grad(mixes, l2_clip_norm=1.0)(variables["params"], x, is_padding_example=None)


class Scaled(nn.Dense):
    """It adds a method under another name, which `__call__` does not use; who could know?"""

    def scaled(self, x):
        return 2 * self(x)


class Called(nn.Dense):
    """Its method is a field."""

    __call__: object = lambda self, x: x


class Mixin:
    @property
    def features(self):
        return 7


class Mixed(Mixin, nn.Dense):
    pass


class Configured(nn.Dense):
    """Fields, constants and a docstring add nothing."""

    WIDTH = 3
    features: int = 3
    label: str = "projection"


@pytest.mark.parametrize(("kind", "has"), [(Scaled, 0), (Called, 0), (Mixed, 0), (Configured, 1), (Projection, 1)])
def test_a_subclass_has_the_rule_if_it_adds_nothing(kind, has):
    assert (rule_of(kind, "__call__") is not None) == bool(has)


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)[:, 0]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=[])
@dataclasses.dataclass
class PytreeModel:
    """As equinox has it: the model is a tree of its parameters."""

    weight: jax.Array

    def __call__(self, x):
        return x @ self.weight


def of_nnx():
    graph, state = nnx.split(Linear(nnx.Rngs(0)))
    return lambda params, x: nnx.merge(graph, params)(x), state


def of_a_pytree():
    return lambda params, x: params(x), PytreeModel(jnp.ones(3))


def of_functions():
    """As haiku has it: dicts of dicts, and a pure function."""
    return lambda params, x: x @ params["linear"]["w"] + params["linear"]["b"], {
        "linear": {"w": jnp.ones(3), "b": jnp.zeros(())}
    }


@pytest.mark.parametrize("library", [of_nnx, of_a_pytree, of_functions])
def test_models_of_other_libraries_are_told_what_to_use(library):
    function, params = library()
    x = np.ones((4, 3), "float32")
    with pytest.raises(
        ValueError, match=r"flax\.linen only: for a model of flax nnx, equinox or haiku.*use clipped_grad"
    ):
        ghost_clipped_grad(function, l2_clip_norm=1.0)(params, x, is_padding_example=None)
    gradient, _ = clipped_grad(function, l2_clip_norm=1.0)(params, x, is_padding_example=None)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
