"""A table that is an embedding and a head is known by itself, not by its module's name: right, or refused by name."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import clipped_grad

pytestmark = pytest.mark.thorough

METHODS = ("bookkeeping", "ghost")
ROWS, WIDTH, TOKENS, BATCH = 7, 4, 5, 3
RNG = np.random.default_rng(0)
IDS = {name: RNG.integers(0, ROWS, (BATCH, TOKENS)) for name in "ab"}


def table():
    return RNG.standard_normal((ROWS, WIDTH)).astype("float32")


TABLES = {"a": table(), "b": table()}


class Tower(nn.Module):
    def setup(self):
        self.embed = nn.Embed(ROWS, WIDTH)

    def lookup(self, ids):
        return self.embed(ids)

    def head(self, h):
        return self.embed.attend(h)

    def __call__(self, ids):
        return self.head(self.lookup(ids))


def call(method, table, x):
    return Tower().apply({"params": {"embed": {"embedding": table}}}, x, method=method)


def lookup(table, ids):
    return call("lookup", table, ids)


def head(table, h):
    return call("head", table, h)


def loss(first, second):
    return jnp.sum(0.3 * jnp.sin(first), (1, 2)) + jnp.sum(jnp.cos(second), (1, 2))


def lookups_before_heads(p, ids):
    h = {name: lookup(p[name], ids[name]) for name in "ab"}
    return loss(head(p["a"], h["a"]), head(p["b"], h["b"]))


def heads_in_the_other_order(p, ids):
    h = {name: lookup(p[name], ids[name]) for name in "ab"}
    second = head(p["b"], h["b"])
    return loss(head(p["a"], h["a"]), second)


def one_after_the_other(p, ids):
    return loss(*(head(p[name], lookup(p[name], ids[name])) for name in "ab"))


def frozen_first(p, ids):
    return heads_in_the_other_order({"a": TABLES["b"], "b": p["a"]}, ids)


def frozen_second(p, ids):
    return lookups_before_heads({"a": p["a"], "b": TABLES["b"]}, ids)


def frozen_head_alone(p, ids):
    h = lookup(p["a"], ids["a"])
    second = head(TABLES["b"], h**2)
    return loss(head(p["a"], h), second)


def second_looked_up_alone(p, ids):
    h = {name: lookup(p[name], ids[name]) for name in "ab"}
    return loss(head(p["a"], h["a"]), h["b"])


def frozen_positions(p, ids):
    """A frozen lookup of the same name that no rule holds for, since its input has no batch axis."""
    return loss(head(p["a"], lookup(p["a"], ids["a"]) + lookup(TABLES["b"], jnp.arange(TOKENS))), jnp.zeros((1, 1, 1)))


def jitted_towers(p, ids):
    tower = jax.jit(Tower().apply)
    return loss(*(tower({"params": {"embed": {"embedding": p[name]}}}, ids[name]) for name in "ab"))


def head_in_a_remat(p, ids):
    return loss(jax.checkpoint(head)(p["a"], lookup(p["a"], ids["a"])), jnp.zeros((1, 1, 1)))


class RematHead(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(ROWS, WIDTH, name="embed")
        return nn.remat(lambda embed, h: embed.attend(h))(embed, embed(ids))


def head_in_a_lifted_remat(p, ids):
    return loss(RematHead().apply({"params": {"embed": {"embedding": p["a"]}}}, ids["a"]), jnp.zeros((1, 1, 1)))


def modules_without_a_name(p, ids):
    """Modules that are not inside another have no path at all, whatever name they are given."""
    h = {name: nn.Embed(ROWS, WIDTH).apply({"params": {"embedding": p[name]}}, ids[name]) for name in "ab"}
    logits = [nn.Embed(ROWS, WIDTH, name="head").bind({"params": {"embedding": p[name]}}).attend(h[name]) for name in h]
    return loss(*logits)


class SharedScope(nn.Module):
    """Two modules with one path, the outer's own and the inner's."""

    @nn.compact
    def __call__(self, ids):
        inner = Tower()
        nn.share_scope(self, inner)
        return nn.Dense(2, name="dense")(inner(ids))


def shared_scope(p, ids):
    dense = {"kernel": np.ones((ROWS, 2), "float32"), "bias": np.ones(2, "float32")}
    params = {"embed": {"embedding": p["a"]}, "dense": dense}
    return loss(SharedScope().apply({"params": params}, ids["a"]), jnp.zeros((1, 1, 1)))


class StackedTowers(nn.Module):
    """A table for each iteration of a scan, used for lookup and head in it."""

    @nn.compact
    def __call__(self, ids):
        def body(tower, total, _):
            return total + jnp.sum(jnp.sin(tower(ids)), (1, 2)), None

        scanned = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scanned(Tower(name="tower"), jnp.zeros(len(ids)), None)[0]


def stacked_towers(p, ids):
    return StackedTowers().apply({"params": {"tower": {"embed": {"embedding": p["stack"]}}}}, ids["a"])


RIGHT = [
    lookups_before_heads,
    heads_in_the_other_order,
    one_after_the_other,
    frozen_first,
    frozen_second,
    frozen_head_alone,
    second_looked_up_alone,
    frozen_positions,
    jitted_towers,
    head_in_a_remat,
    head_in_a_lifted_remat,
    modules_without_a_name,
    shared_scope,
    stacked_towers,
]


@pytest.mark.parametrize("losses", RIGHT)
def test_tables_are_told_apart(losses):
    params = {"stack": np.stack(list(TABLES.values()))} if losses is stacked_towers else TABLES
    expected, norms = jax.jit(clipped_grad(losses, l2_clip_norm=1.0))(params, IDS, is_padding_example=None)
    assert norms.grad_norm.min() > 1
    for method in METHODS:
        function = jax.jit(ghost_clipped_grad(losses, l2_clip_norm=1.0, method=method))
        actual, ghost_norms = function(params, IDS, is_padding_example=None)
        np.testing.assert_allclose(ghost_norms.grad_norm, norms.grad_norm, rtol=1e-5)  # rounded upwards
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-5), actual, expected)


def second_head_alone(p, ids):
    h = lookup(p["a"], ids["a"])
    second = head(p["b"], h**2)
    return loss(head(p["a"], h), second)


def head_before_lookup(p, ids):
    return loss(head(p["a"], lookup(TABLES["b"], ids["b"])), lookup(p["a"], ids["a"]))


def converted_in_between(p, ids):
    h = {name: lookup(jnp.asarray(p[name]).T.T, ids[name]) for name in "ab"}
    return loss(head(p["a"], h["a"]), head(p["b"], h["b"]))


def lookup_in_a_jit(p, ids):
    return loss(head(p["a"], jax.jit(lookup)(p["a"], ids["a"])), jnp.zeros((1, 1, 1)))


class RematEmbed(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.remat(nn.Embed, methods=["__call__", "attend"])(ROWS, WIDTH, name="embed")
        return embed.attend(embed(ids))


def each_in_a_remat(p, ids):
    return loss(RematEmbed().apply({"params": {"embed": {"embedding": p["a"]}}}, ids["a"]), jnp.zeros((1, 1, 1)))


def one_head_traced_for_two_tables(p, ids):
    """The second call reuses the trace of the first, and with it the first table's ticket."""
    h, jitted = lookup(p["a"], ids["a"]), jax.jit(head)
    return loss(jitted(p["a"], h), jitted(p["b"], h))


def swapped_in_a_jit(p, ids):
    """Each table is looked up in one call of a jitted function and is the head in the other."""
    both = jax.jit(lambda first, second, ids: head(second, lookup(first, ids)))
    return loss(both(p["a"], p["b"], ids["a"]), both(p["b"], p["a"], ids["b"]))


class TwoNames(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Embed(ROWS, WIDTH, name="lm_head").attend(nn.Embed(ROWS, WIDTH, name="wte")(ids))


def one_leaf_under_two_names(p, ids):
    params = {"wte": {"embedding": p["a"]}, "lm_head": {"embedding": p["a"]}}
    return loss(TwoNames().apply({"params": params}, ids["a"]), jnp.zeros((1, 1, 1)))


def called_twice(p, ids):
    return loss(lookup(p["a"], ids["a"]), lookup(p["a"], ids["b"]))


def lifted_vmap(p, ids):
    towers = nn.vmap(Tower, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=1, out_axes=1)
    return jnp.sum(towers().apply({"params": {"embed": {"embedding": p["a"]}}}, ids["a"][:, :, None]), (1, 2, 3))


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (second_head_alone, r"Embed 'embed'\.attend is called before the lookup.*names of their own"),
        (head_before_lookup, r"Embed 'embed'\.attend is called before the lookup"),
        (converted_in_between, r"Embed 'embed'\.attend is called before the lookup.*converted in between"),
        (lookup_in_a_jit, r"params\['a'\] is looked up by Embed 'embed' inside a jit, a remat or a scan"),
        (each_in_a_remat, r"params\['a'\] is looked up by Embed 'embed' inside a jit, a remat or a scan"),
        (one_head_traced_for_two_tables, r"Embed 'embed'\.attend is called before the lookup"),
        (swapped_in_a_jit, r"params\['a'\] is looked up by Embed 'embed' inside a jit"),
        (one_leaf_under_two_names, r"params\['a'\] is used 2 times, by Embed 'wte'; Embed 'lm_head'\.attend"),
        (called_twice, r"params\['a'\] is used 2 times, by Embed 'embed'; Embed 'embed'"),
        (lifted_vmap, r"params\['a'\], which goes into: Embed '.*embed' inside a vmap"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_told_apart_is_refused_by_name(method, losses, message):
    jax.eval_shape(losses, TABLES, IDS)  # the loss itself is right
    with pytest.raises(ValueError, match=message):
        ghost_clipped_grad(losses, l2_clip_norm=1.0, method=method)(TABLES, IDS, is_padding_example=None)
