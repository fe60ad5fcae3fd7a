"""All of our transformations inside those of optax, and inside vmap and scan."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytestmark = pytest.mark.slow

_shared = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("transformations.py"))))
EACH_KIND, Case, noise = _shared.EACH_KIND, _shared.Case, _shared.noise
assert_same, run, tree = _shared.assert_same, _shared.run, _shared.tree


@EACH_KIND
def test_it_composes(case: Case) -> None:
    gradients, alone = tree(), run(case.transform, tree(), tree())[0]
    scaled = jax.tree.map(lambda leaf: -0.5 * leaf, alone)
    chained = optax.chain(case.transform, optax.scale(-0.5))
    assert_same(run(chained, gradients, gradients)[0], scaled, rtol=1e-5, atol=1e-6)
    guarded = optax.apply_if_finite(chained, 3)
    assert_same(run(guarded, gradients, gradients)[0], scaled, rtol=1e-5, atol=1e-6)
    accepts = optax.with_extra_args_support(case.transform)
    accepts.update(gradients, accepts.init(gradients), gradients, unexpected=1.0)


@EACH_KIND
def test_an_update_that_is_not_finite_can_be_left_out(case: Case) -> None:
    gradients = tree()
    bad = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), gradients)
    guarded = optax.apply_if_finite(case.transform, 3)
    skipped, state = run(guarded, gradients, bad)
    assert all(not leaf.any() for leaf in jax.tree.leaves(skipped))
    expected = run(guarded, gradients)[1].inner_state
    assert_same(state.inner_state, expected, rtol=1e-5, atol=1e-6)


@EACH_KIND
def test_accumulated_steps_are_steps_of_the_mean(case: Case) -> None:
    several = optax.MultiSteps(case.transform, every_k_schedule=2)
    params = tree()
    state, update = several.init(params), jax.jit(several.update)
    nothing, state = update(tree(1), state, params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(nothing))
    out, _ = update(tree(2), state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, tree(1), tree(2))
    assert_same(out, run(case.transform, mean, params=params)[0], rtol=1e-3, atol=1e-4)


@EACH_KIND
def test_masked_leaves_are_not_touched(case: Case) -> None:
    gradients = tree()
    mask = {"embedding": True, "layers": True, "head": False, "wide": {"kernel": False}}
    if case is _shared.CASES["whitened"]:  # of the head, too
        with pytest.raises(ValueError, match="the coordinates are those of head/kernel"):
            run(optax.masked(case.transform, mask), gradients)
        return
    out, state = run(optax.masked(case.transform, mask), gradients)
    assert_same({name: out[name] for name in ("head", "wide")}, {name: gradients[name] for name in ("head", "wide")})
    kept = {name: gradients[name] for name in ("embedding", "layers")}
    alone, _ = run(case.transform, kept)
    assert_same({name: out[name] for name in kept}, alone, rtol=1e-5, atol=1e-6)
    diagnosed = [path for path, _ in jax.tree_util.tree_leaves_with_path(state) if "wide" in jax.tree_util.keystr(path)]
    assert not diagnosed


@EACH_KIND
def test_parts_of_a_tree_may_have_transformations_of_their_own(case: Case) -> None:
    gradients = tree()
    labels = {"embedding": "sgd", "layers": "ours", "head": "ours", "wide": "ours"}
    both = optax.partition({"ours": case.transform, "sgd": optax.sgd(1.0)}, labels)
    out, _ = run(both, gradients)
    np.testing.assert_array_equal(out["embedding"], -gradients["embedding"])
    rest = {name: leaf for name, leaf in gradients.items() if name != "embedding"}
    if case.factory is not noise:  # whose draws are numbered by leaf
        assert_same({name: out[name] for name in rest}, run(case.transform, rest)[0], rtol=1e-5, atol=1e-6)


@EACH_KIND
def test_a_stack_of_trees_is_transformed_tree_by_tree(case: Case) -> None:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), tree(0), tree(1))
    transform = case.transform
    state = jax.vmap(transform.init)(stacked)
    out, after = jax.jit(jax.vmap(transform.update))(stacked, state, stacked)
    for number in range(2):
        expected, _ = run(transform, tree(number))
        assert_same(jax.tree.map(lambda leaf, i=number: leaf[i], out), expected, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(after) == jax.tree.structure(state)


@EACH_KIND
def test_a_scan_over_steps_is_a_loop(case: Case) -> None:
    transform, gradients = case.transform, tree()

    def step(state: Any, number: jax.Array) -> tuple[Any, Any]:
        out, state = transform.update(jax.tree.map(lambda leaf: leaf * (1 + number), gradients), state, gradients)
        return state, out

    state, outs = jax.jit(lambda: jax.lax.scan(step, transform.init(gradients), jnp.arange(2.0)))()
    loop = run(transform, gradients, jax.tree.map(lambda leaf: 2 * leaf, gradients), params=gradients)
    assert_same((jax.tree.map(lambda leaf: leaf[-1], outs), state), loop, rtol=1e-3, atol=1e-4)
