"""What optax holds for its own transformations, held for all of ours: states, dtypes, trees, traced numbers."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt import denoise_matrices, scale_by_denoised_adam
from dp_rmt.baselines.iterates import average_iterates
from dp_rmt.baselines.muon import private_muon
from dp_rmt.baselines.muon_bc import muon_bc
from dp_rmt.baselines.truncation import truncate_rank

_shared = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("transformations.py"))))
ALL, CASES, STD, Case, noise = _shared.ALL, _shared.CASES, _shared.STD, _shared.Case, _shared.noise
ANY_TREE = _shared.ANY_TREE
assert_same, is_wide, run, tree = _shared.assert_same, _shared.is_wide, _shared.run, _shared.tree


@ALL
def test_structure_and_shapes_are_kept_and_states_have_one_type(case: Case) -> None:
    gradients, state, out, after = case.first_step
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, gradients)
    describe = functools.partial(jax.tree.map, lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert describe(after) == describe(state)  # so that it is the carry of a scan
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))  # so that it can be saved
    restored = jax.tree.unflatten(jax.tree.structure(state), [np.array(leaf) for leaf in jax.tree.leaves(state)])
    assert_same(case.transform.update(gradients, restored, gradients)[0], out)


@ALL
def test_no_leaf_of_a_state_has_two_names(case: Case) -> None:
    gradients, state, out, after = case.first_step
    for at, given in ((state, gradients), (after, gradients), (after, out)):
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(at)]
        assert len(set(names)) == len(names)
        buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((at, given))]
        assert len(set(buffers)) == len(buffers)


@ALL
def test_states_can_be_donated_again_and_again(case: Case) -> None:
    gradients, transform = tree(), case.transform
    expected, _ = run(transform, gradients, gradients, gradients)
    step = jax.jit(transform.update, donate_argnums=1)
    for _ in range(2):  # a second run of the same transformation, after the state of the first is gone
        state = transform.init(gradients)
        for _ in range(3):
            out, state = step(gradients, state, gradients)
        assert_same(out, expected, rtol=1e-5, atol=1e-6)  # a program of its own


@ALL
def test_compiled_is_the_same_as_not(case: Case) -> None:
    """To rounding: compiled, a sum of products is one fused operation."""
    gradients, state, out, after = case.first_step
    assert_same(jax.jit(case.transform.init)(gradients), state)
    found = run(case.transform, gradients)
    assert_same(found, (out, after), rtol=2e-4, atol=2e-5)
    if case.factory is noise:  # the noise, and what passes, to the last bit
        assert_same(found[0], out)
    elif case.factory in (denoise_matrices, truncate_rank):
        assert_same(found[0]["layers"]["scale"], out["layers"]["scale"])


@ALL
def test_shapes_are_known_without_values(case: Case) -> None:
    gradients, transform = tree(), case.transform
    shapes = jax.eval_shape(lambda: gradients)
    state = jax.eval_shape(transform.init, shapes)
    assert jax.tree.structure(state) == jax.tree.structure(transform.init(shapes))
    out, after = jax.eval_shape(transform.update, shapes, state, shapes)
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, gradients)
    assert jax.tree.structure(after) == jax.tree.structure(state)


@ALL
def test_numbers_may_be_traced(case: Case) -> None:
    gradients = tree()
    injected = optax.inject_hyperparams(case.factory, static_args=case.static)(**case.others, **case.numbers)
    if case.static != ("rank",):
        assert set(case.numbers) <= set(injected.init(gradients).hyperparams)
    state, update = jax.jit(injected.init)(gradients), jax.jit(injected.update)
    for _ in range(2):
        out, state = update(gradients, state, gradients)
    assert_same(out, run(case.transform, gradients, gradients)[0], rtol=1e-4, atol=1e-5)
    for name in set(case.numbers) & {"noise_std", "learning_rate"}:  # what is changed is used
        state.hyperparams[name] = jnp.asarray(100 * case.numbers[name])  # above all: where a gate alone reads it, too
        changed, _ = update(gradients, state, gradients)
        as_before = state._replace(hyperparams=state.hyperparams | {name: case.numbers[name]})
        same, _ = update(gradients, as_before, gradients)
        assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), changed, same)))


def test_without_static_arguments_where_no_rule_is_given() -> None:
    for factory in (denoise_matrices, scale_by_denoised_adam):
        injected = optax.inject_hyperparams(factory)(noise_std=lambda step: STD / (step + 1))
        assert_same(run(injected, tree())[0], run(factory(STD), tree())[0], rtol=1e-5, atol=1e-6)


@ALL
def test_trees_like_the_parameters_are_found_in_states(case: Case) -> None:
    gradients, transform = tree(), case.transform
    state = transform.init(gradients)
    seen: list[Any] = []
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731

    def add_one(leaf: Any, name: Any) -> Any:
        if is_masked(leaf):  # as optax says: what a transformation masks, it masks in its state
            return leaf
        seen.append(name)
        return leaf + 1

    mapped = optax.tree_map_params(transform, add_one, state, gradients, is_leaf=is_masked)
    names = {id(leaf) for leaf in jax.tree.leaves(gradients)}
    assert all(id(leaf) in names for leaf in seen)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    copies = sum(
        a.shape == b.shape and bool((a != b).any())
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(state), strict=True)
    )
    assert copies == len(seen)
    is_matrix = {"muon": 3, "muon_bc": 3}  # momentum is kept of the matrices alone
    trees = {"adam": 2, "adam_bc": 2, "adam_own": 2, "low_pass": 1, "kalman": 4, "average": 1, "plain_adam_bc": 2}
    trees |= {"measured": 1, "correlated_noise": 2}
    name = next(name for name, other in CASES.items() if other is case)
    assert len(seen) == is_matrix.get(name, trees.get(name, 0) * len(jax.tree.leaves(gradients)))
    # As for `NamedSharding`s of a state: fields that are no parameters get one value for all that is in them.
    specs = optax.tree_map_params(
        transform,
        lambda leaf, name: "parameter",
        state,
        gradients,
        transform_non_params=lambda field: "other",
        is_leaf=is_masked,
    )
    assert {*jax.tree.leaves(specs)} <= {"parameter", "other"}


@ALL
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes(case: Case, dtype: str) -> None:
    """States are float32 or wider; so is what is computed, and a leaf that passes has its own dtype."""
    with jax.enable_x64(dtype == "float64"):
        gradients, transform = tree(dtype=dtype), case.transform
        if dtype == "bfloat16":
            gradients["wide"] = tree(dtype="float16")["wide"]
        out, state = run(transform, gradients, gradients)
        for leaf in jax.tree.leaves((out["layers"]["attention"]["key"]["kernel"], out["wide"])):
            # All of it passes through an average of the iterates, which is in the state.
            assert case.factory is average_iterates or leaf.dtype == jnp.promote_types(dtype, jnp.float32)
        assert all(is_wide(leaf) for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))
        passes = case.factory in (denoise_matrices, truncate_rank)
        assert out["embedding"].dtype == (dtype if passes else out["embedding"].dtype)
        exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)
        # What was rounded on its way in is float32 from there on; with 64 bits nothing is but the noise's own digits.
        if dtype != "float64":
            expected, _ = run(case.transform, exact, exact)
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), out)
            assert_same(wide, expected, rtol=1e-2, atol=1e-3)


@ANY_TREE
def test_numbers_scalars_and_nothing_are_leaves(case: Case) -> None:
    gradients = {"temperature": 0.5, "gain": jnp.asarray(2.0), "unused": None, "kernel": tree()["wide"]["kernel"]}
    if "join" in case.others:
        gradients["layers"] = {"query": {"kernel": jnp.ones((8, 8))}}
    out, _ = run(case.transform, gradients, jit=False)
    assert out["unused"] is None
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, gradients)
    if case.factory in (denoise_matrices, truncate_rank):
        assert out["temperature"] == 0.5
    arrays = jax.tree.map(jnp.asarray, gradients)
    assert_same(jax.tree.map(jnp.asarray, out), run(case.transform, arrays, jit=False)[0])


@ANY_TREE
def test_empty_trees_and_leaves(case: Case) -> None:
    for empty in ({}, [], (), {"a": None}):
        out, _ = run(case.transform, empty)
        assert jax.tree.structure(out) == jax.tree.structure(empty)
    nothing = {"kernel": jnp.zeros((0, 8, 8)), "other": {"kernel": jnp.zeros((8, 0))}, "bias": jnp.zeros(0)}
    out, _ = run(case.transform, nothing)
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, nothing)


@ANY_TREE
def test_biases_alone_are_no_error(case: Case) -> None:
    biases = {"layers": {"query": {"bias": jnp.ones((6, 64))}, "norm": {"scale": jnp.ones((6, 64))}}}
    out, _ = run(case.transform, biases)
    assert jax.tree.structure(out) == jax.tree.structure(biases)


@ALL
def test_parameters_are_not_needed(case: Case) -> None:
    gradients = tree()
    # Muon decays weights, as optax.contrib.muon does: by 0 unless told otherwise.
    if case.factory in (private_muon, muon_bc, average_iterates):
        with pytest.raises(ValueError, match="params"):
            case.transform.update(gradients, case.transform.init(gradients))
        return
    out, _ = case.transform.update(gradients, case.transform.init(gradients))
    assert_same(out, case.first_step[2])


def test_two_leaves_of_one_path_are_refused() -> None:
    ambiguous = {"a/b": {"kernel": jnp.ones((8, 8))}, "a": {"b": {"kernel": jnp.zeros((8, 8))}}}
    with pytest.raises(ValueError, match=r"'a/b/kernel'.*slash"):
        denoise_matrices(STD).init(ambiguous)
