"""The split into trained and frozen parameters, and the state as a pytree."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_rmt.denoising.gradient import denoise_matrices
from dp_rmt.noise_addition import add_gaussian_noise
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.trees import leaves_by_path, merge_params, split_params

NAMES = st.sampled_from(["a", "b", "kernel", "layers"])
# Nested dicts without empty ones; leaves are numbers.
TREES = st.dictionaries(
    NAMES,
    st.recursive(st.integers(), lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=8),
    min_size=1,
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(TREES, st.sampled_from(["", "kernel", "a/", "/b$", "^layers", "a|b", "^[^/]*$"]))
def test_split_and_merge_are_inverse(params, trainable):
    matching = [path for path, _ in leaves_by_path(params) if re.search(trainable, path)]
    if not matching:
        with pytest.raises(ValueError, match="matches no parameter"):
            split_params(params, trainable)
        return
    trained, frozen = split_params(params, trainable)
    assert merge_params(trained, frozen) == merge_params(frozen, trained) == params
    assert [path for path, _ in leaves_by_path(trained)] == matching
    assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(params)) - len(matching)


def test_split_matches_anywhere_in_the_path():
    params = {"encoder": {"layers": {"kernel": 1, "bias": 2}, "embedding": 3}, "classifier": {"kernel": 4}}
    trained, frozen = split_params(params, "layers/kernel|^classifier")
    assert trained == {"encoder": {"layers": {"kernel": 1}}, "classifier": {"kernel": 4}}
    assert frozen == {"encoder": {"layers": {"bias": 2}, "embedding": 3}}
    assert split_params(params, "") == (params, {})


def test_split_does_not_touch_its_input():
    params = {"a": {"b": 1, "c": 2}}
    trained, _ = split_params(params, "b")
    trained["a"]["b"] = 5
    assert params == {"a": {"b": 1, "c": 2}}


def test_split_errors_say_what_there_is():
    params = {"a": {"kernel": 1}, "b": 2}
    with pytest.raises(ValueError, match=r"trainable='\(' is not a regular expression"):
        split_params(params, "(")
    with pytest.raises(ValueError, match=r"'bias' matches no parameter; there are a/kernel, b"):
        split_params(params, "bias")


@pytest.mark.parametrize(
    ("one", "other"), [({"a": 1}, {"a": 2}), ({"a": {"b": 1}}, {"a": 2}), ({"a": 1}, {"a": {"b": 2}})]
)
def test_merge_refuses_what_is_both_trained_and_frozen(one, other):
    with pytest.raises(ValueError, match="both trained and frozen"):
        merge_params({"x": one}, {"x": other})


def make_state():
    transforms = Transforms(
        add_gaussian_noise(0.1, jax.random.key(3)), denoise_matrices(0.1), optax.adamw(lambda step: 0.1 / (1 + step))
    )
    params, frozen = {"dense": {"kernel": jnp.ones((8, 9))}}, {"dense": {"bias": jnp.zeros(9)}}
    return TrainState.create(transforms, params, frozen)


def test_only_trained_parameters_have_optimizer_state():
    state = make_state()
    assert int(state.step) == int(state.noise.step) == int(state.denoise.step) == 0
    paths = [path for path, _ in leaves_by_path(state.optimizer)]
    assert sum("dense/kernel" in path for path in paths) == 2  # both moments of Adam
    assert not any("bias" in path for path in paths)
    assert list(state.denoise.diagnostics) == ["dense/kernel"]


def test_state_is_a_pytree_of_plain_arrays():
    """So that a checkpoint can hold it: no typed keys, no Python numbers, nothing lost on the way."""
    state = make_state()
    leaves, structure = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype.kind in "fiu" for leaf in leaves)
    again = jax.jit(lambda s: s)(jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in leaves]))
    assert jax.tree.structure(again) == structure
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert {path.split("/")[0] for path, _ in leaves_by_path(state)} == {
        "step",
        "params",
        "frozen",
        "noise",
        "denoise",
        "optimizer",
    }
