"""Users' own models, written as an outsider would, are clipped without edits; every rule at work inside a model."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_rmt.clipping.contraction import Contraction
from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.layer_rules import LAYER_RULES, LayerRule
from dp_rmt.clipping.leaf_rules import Offset
from dp_rmt.clipping.per_example import clipped_grad

pytestmark = pytest.mark.thorough

METHODS = ("bookkeeping", "ghost")


class Gpt(nn.Module):
    """A decoder with tied embeddings, from stock layers: fused multi-head projections, einsum experts, a token mask."""

    vocab: int
    heads: int = 2
    head_dim: int = 4

    @nn.compact
    def __call__(self, ids):
        width = self.heads * self.head_dim
        table = nn.Embed(self.vocab, width, name="wte")
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        h = table(ids) + nn.Embed(16, width, name="wpe")(positions)
        x = nn.RMSNorm()(h)
        h = h + nn.MultiHeadDotProductAttention(self.heads)(x, mask=nn.make_causal_mask(ids))
        x = nn.LayerNorm()(h)
        x = nn.silu(nn.DenseGeneral((self.heads, 3), name="up")(x))
        x = nn.Einsum((self.heads, 3, 5), "...nh,nhk->...nk", name="per_head")(x)
        x = nn.Einsum((self.heads, 5, width), "btnk,nkd->btd", use_bias=False, name="down")(x)
        return table.attend(h + x)


def token_losses(logits, batch):
    """The mean over an example's own target tokens; zero for an example without any."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), batch["ids"][:, 1:, None], axis=2)[..., 0]
    mask = batch["is_target"][:, 1:]
    return -jnp.sum(log_p * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)


def assert_methods_equal_vmap(losses, params, batch, *, tolerance, **arguments):
    reference, norms = jax.jit(clipped_grad(losses, **arguments))(params, batch, is_padding_example=None)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(reference))
    for method in METHODS:
        total, per_example = jax.jit(ghost_clipped_grad(losses, method=method, **arguments))(
            params, batch, is_padding_example=None
        )
        np.testing.assert_allclose(per_example.grad_norm, norms.grad_norm, rtol=tolerance, atol=1e-30)
        for actual, expected in zip(jax.tree.leaves(total), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * largest)
    return norms.grad_norm


def draw(model, seed, batch_size, length, dtype, vocabulary):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocabulary, (batch_size, length))
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    params = jax.tree.map(lambda a: (0.5 * rng.standard_normal(a.shape)).astype(dtype), shapes)
    return params, {"ids": ids, "is_target": rng.integers(0, 2, (batch_size, length))}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-10), pytest.param("float32", 1e-5, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("cases", [2, pytest.param(25, marks=pytest.mark.slow)])  # three programs each
def test_a_users_decoder_with_tied_embeddings(dtype, tolerance, cases):
    @settings(max_examples=cases, deadline=None)
    @given(
        seed=st.integers(0, 2**32 - 1),
        batch_size=st.sampled_from([3, 1]),
        length=st.sampled_from([7, 12, 2, 3]),
        vocabulary=st.sampled_from([2, 30]),  # 2: nearly all tokens are repeated
    )
    def holds(seed, batch_size, length, vocabulary):
        model = Gpt(30)
        with jax.enable_x64(dtype == "float64"):
            params, batch = draw(model, seed, batch_size, length, dtype, vocabulary)
            assert_methods_equal_vmap(
                lambda p, b: token_losses(model.apply(p, b["ids"]), b),
                params,
                batch,
                l2_clip_norm=2.0,
                tolerance=tolerance,
            )

    holds()


def test_zero_gradients_and_no_targets_at_all():
    model = Gpt(30)
    params, batch = draw(model, 0, 4, 5, "float32", 30)
    batch["is_target"] = np.array([[0] * 5, [1] * 5, [0] * 5, [0, 0, 1, 0, 0]])
    norms = assert_methods_equal_vmap(
        lambda p, b: token_losses(model.apply(p, b["ids"]), b), params, batch, l2_clip_norm=1.0, tolerance=1e-5
    )
    assert [bool(norm > 0) for norm in norms] == [False, True, False, True]
    for method in METHODS:
        function = ghost_clipped_grad(
            lambda p, b: 0.0 * token_losses(model.apply(p, b["ids"]), b), l2_clip_norm=1.0, method=method
        )
        assert not any(g.any() for g in jax.tree.leaves(jax.jit(function)(params, batch, is_padding_example=None)[0]))


def test_leaving_the_cross_term_out_would_be_noticed():
    """Of a tied table: the norm differs from the norms of its two parts by more than the tolerance of these tests."""
    model = Gpt(30)
    params, batch = draw(model, 0, 4, 5, "float32", 30)

    class Untied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Embed(30, 8, name="wte")(ids) @ nn.Embed(30, 8, name="head")(jnp.arange(30)).T

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            table = nn.Embed(30, 8, name="wte")
            return table.attend(table(ids))

    table = params["params"]["wte"]

    def norms(model, params):
        function = clipped_grad(lambda p, b: token_losses(model.apply(p, b["ids"]), b), l2_clip_norm=1.0)
        return jax.jit(function)({"params": params}, batch, is_padding_example=None)[1].grad_norm

    assert np.abs(norms(Untied(), {"wte": table, "head": table}) / norms(Tied(), {"wte": table}) - 1).max() > 1e-2
    assert_methods_equal_vmap(
        lambda p, b: token_losses(Tied().apply(p, b["ids"]), b),
        {"params": {"wte": table}},
        batch,
        l2_clip_norm=1.0,
        tolerance=1e-5,
    )


def test_a_frozen_tied_table_costs_nothing_and_changes_nothing():
    model = Gpt(30)
    params, batch = draw(model, 0, 3, 5, "float32", 30)
    table = params["params"].pop("wte")

    def losses(params, batch):
        return token_losses(model.apply({"params": {**params["params"], "wte": table}}, batch["ids"]), batch)

    assert_methods_equal_vmap(losses, params, batch, l2_clip_norm=1.0, tolerance=1e-5)


class Adapter(nn.Module):
    """A frozen projection with a trained low-rank update, scanned and rematerialised."""

    @nn.compact
    def __call__(self, h, _):
        update = nn.Dense(16, use_bias=False, name="lora_b")(nn.Dense(2, use_bias=False, name="lora_a")(h))
        return jnp.tanh(nn.Dense(16, name="base")(h) + 2.0 * update), None


@pytest.mark.parametrize("remat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_low_rank_factors(remat):
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
    model = nn.scan(nn.remat(Adapter) if remat else Adapter, length=3, **axes)()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 6, 16)).astype("float32")
    params = model.init(jax.random.key(0), x, None)["params"]
    base = params.pop("base")
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype("float32") / 4, params)

    def losses(params, x):
        return jnp.sum(model.apply({"params": {**params, "base": base}}, x, None)[0] ** 2, axis=(1, 2))

    assert_methods_equal_vmap(losses, params, x, l2_clip_norm=3.0, tolerance=1e-5)


class Turn(nn.Module):
    """A layer of a user's own, y = x W."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("turn", nn.initializers.orthogonal(), (x.shape[-1], x.shape[-1]))


def test_a_users_own_layer_can_be_given_a_rule(monkeypatch):
    model, x = nn.Sequential([nn.Dense(3), Turn()]), np.ones((4, 5, 2), "float32")
    params = model.init(jax.random.key(0), x)

    def losses(params, x):
        return jnp.sum(jnp.sin(model.apply(params, x)), axis=(1, 2))

    with pytest.raises(ValueError, match=r"no rule for .*\['turn'\].*LAYER_RULES"):
        ghost_clipped_grad(losses, l2_clip_norm=1.0)(params, x, is_padding_example=None)
    rule = LayerRule(lambda module, x: {"turn": Contraction("bti", "io", "bto")})
    monkeypatch.setitem(LAYER_RULES, (Turn, "__call__"), rule)
    assert_methods_equal_vmap(losses, params, x, l2_clip_norm=1.0, tolerance=1e-5)


def test_a_rule_that_leaves_a_parameter_out_is_refused(monkeypatch):
    """Otherwise its gradient would be zero, silently."""
    model, x = nn.Dense(3), np.ones((4, 2), "float32")
    monkeypatch.setitem(LAYER_RULES, (nn.Dense, "__call__"), LayerRule(lambda module, x: {"bias": Offset("bd", "d")}))
    with pytest.raises(ValueError, match=r"no rule for .*\['kernel'\], which goes into: the operation dot_general"):
        ghost_clipped_grad(lambda p, x: model.apply(p, x).sum(1), l2_clip_norm=1.0)(
            model.init(jax.random.key(0), x), x, is_padding_example=None
        )


@pytest.mark.parametrize(
    ("mix", "shown"),
    [
        (lambda h: h - h.mean(0), "reduce_sum"),
        (lambda h: jnp.roll(h, 1, axis=0), "slice"),
        (lambda h: jax.nn.softmax(h @ h.T) @ h, "dot_general"),
    ],
)
def test_refuses_a_model_that_mixes_examples(mix, shown):
    model, x = nn.Dense(3), np.ones((4, 2), "float32")

    def losses(params, x):
        return jnp.sum(mix(model.apply(params, x)), axis=1)

    with pytest.raises(ValueError, match=f"the losses mix examples: .*{shown}.*one example at a time"):
        ghost_clipped_grad(losses, l2_clip_norm=1.0)(model.init(jax.random.key(0), x), x, is_padding_example=None)


def test_refuses_layers_that_compute_with_complex_numbers():
    model, x = nn.Dense(3, dtype="complex64"), np.ones((4, 2), "float32")
    params = {"params": {"kernel": np.ones((2, 3), "float32"), "bias": np.zeros(3, "float32")}}
    with pytest.raises(ValueError, match=r"no rule for .*Dense '' computed in complex64"):
        ghost_clipped_grad(lambda p, x: jnp.abs(model.apply(p, x)).sum(1), l2_clip_norm=1.0)(
            params, x, is_padding_example=None
        )
