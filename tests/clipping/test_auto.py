"""Clipping that fits any loss: rules where all layers have them, else one gradient per example."""

from __future__ import annotations

import contextlib
import logging as python_logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from dp_rmt.clipping import auto
from dp_rmt.clipping.auto import auto_clipped_grad
from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.leaf_uses import LeafWithoutRule
from dp_rmt.clipping.per_example import clipped_grad

ARGUMENTS = {"l2_clip_norm": 0.7, "normalize_by": 3.0, "clip": "flat", "microbatch_size": 2}
BATCH = np.random.default_rng(0).standard_normal((6, 8, 3)).astype(np.float32)
PADDING = np.arange(6) > 4


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(4)(x))).sum((1, 2))


class Convolution(nn.Module):
    """Its first layer has no rule, its second has one."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.ConvTranspose(4, (3,))(x))).sum((1, 2))


class HeadFirst(nn.Module):
    """A tied table whose head comes before its lookup: no rule has the cross term, which the second trace notices."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(5, 3, name="table")
        scores = table.attend(x)
        return (scores.sum(-1) + table(jnp.zeros(x.shape[:2], jnp.int32)).sum(-1)).sum(1)


def plain(params, batch):
    return jnp.tanh(batch @ params["w"]).sum((1, 2))


PLAIN = {"w": jnp.ones((3, 2))}


def used_twice(params, batch):
    return Perceptron().apply(params, batch) + params["params"]["Dense_1"]["bias"][0]


def make(module):
    return module.apply, module.init(jax.random.key(0), BATCH)


def same(actual, expected):
    for leaf, wanted in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_array_equal(leaf, wanted)


@contextlib.contextmanager
def messages(caplog):
    logging.get_absl_logger().addHandler(caplog.handler)
    with caplog.at_level(python_logging.WARNING):
        yield
    logging.get_absl_logger().removeHandler(caplog.handler)


def test_layers_with_rules_are_clipped_by_their_rules(caplog):
    losses, params = make(Perceptron())
    with messages(caplog):
        found = jax.jit(auto_clipped_grad(losses, **ARGUMENTS))(params, BATCH, is_padding_example=PADDING)
    same(found, jax.jit(ghost_clipped_grad(losses, **ARGUMENTS))(params, BATCH, is_padding_example=PADDING))
    assert not caplog.records


@pytest.mark.parametrize(
    ("losses", "params", "leaf"),
    [
        (plain, PLAIN, None),
        (*make(Convolution()), "ConvTranspose_0"),
        (*make(HeadFirst()), "table"),
        (used_twice, make(Perceptron())[1], "Dense_1"),
    ],
    ids=["no layers", "a layer without a rule", "a head before its lookup", "a leaf that is used twice"],
)
@pytest.mark.parametrize("compile_", [jax.jit, lambda function: function], ids=["jit", "eager"])
def test_all_others_are_clipped_by_vmap_and_a_model_is_warned_of(compile_, losses, params, leaf, caplog):
    with pytest.raises(LeafWithoutRule):
        ghost_clipped_grad(losses, **ARGUMENTS)(params, BATCH, is_padding_example=PADDING)
    with messages(caplog):
        found = compile_(auto_clipped_grad(losses, **ARGUMENTS))(params, BATCH, is_padding_example=PADDING)
    same(found, compile_(clipped_grad(losses, **ARGUMENTS))(params, BATCH, is_padding_example=PADDING))
    said = [record.getMessage() for record in caplog.records]
    assert bool(said) == (leaf is not None)
    assert all("gradient is computed by itself (vmap)" in text and str(leaf) in text for text in said)


def test_losses_that_mix_examples_are_refused():
    losses, params = make(Perceptron())
    mixing = auto_clipped_grad(lambda p, x: losses(p, x) / jnp.sum(x), **ARGUMENTS)
    with pytest.raises(ValueError, match="the losses mix examples"):
        mixing(params, BATCH, is_padding_example=PADDING)


def test_the_choice_is_made_once_for_a_shape(monkeypatch):
    tried = []

    def counting(losses, **arguments):
        gradient = ghost_clipped_grad(losses, **arguments)
        function = lambda *given: tried.append(0) or gradient.function(*given)  # noqa: E731
        return type(gradient)(function, gradient.l2_norm_bound)

    monkeypatch.setattr(auto, "ghost_clipped_grad", counting)
    function = auto_clipped_grad(plain, **ARGUMENTS)
    for _ in range(3):
        function(PLAIN, BATCH, is_padding_example=PADDING)
    assert len(tried) == 1
    function(PLAIN, BATCH[:4], is_padding_example=PADDING[:4])
    assert len(tried) == 2


def test_it_knows_its_sensitivity():
    assert auto_clipped_grad(plain, **ARGUMENTS).sensitivity() == clipped_grad(plain, **ARGUMENTS).sensitivity()
    with pytest.raises(ValueError, match="l2_clip_norm must be at least"):
        auto_clipped_grad(plain, l2_clip_norm=0.0)
