"""What optax holds for its own transformations, held for all of ours: one table of transformations, one of laws."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt import add_gaussian_noise, denoise_matrices, gates, matrix_groups, scale_by_denoised_adam
from dp_rmt.filters import kalman_filter, low_pass_filter
from dp_rmt.muon import private_muon
from dp_rmt.residual_stream import layers_side_by_side, reads_the_stream
from dp_rmt.truncation import truncate_rank

STD = 0.5


class Case(NamedTuple):
    """A factory, its numbers that may be traced, and its other arguments."""

    factory: Callable[..., optax.GradientTransformation]
    numbers: dict[str, float]
    others: Mapping[str, Any] = MappingProxyType({})
    static: tuple[str, ...] = ()

    def make(self) -> optax.GradientTransformation:
        return self.factory(**self.others, **self.numbers)


def denoise(**options: Any) -> Case:
    return Case(denoise_matrices, {"noise_std": STD}, options, ("join", "matrix_rule"))


def noise(noise_std: float, seed: int = 7) -> optax.GradientTransformation:
    return add_gaussian_noise(noise_std, jax.random.key(seed))


CASES = {
    "noise": Case(noise, {"noise_std": STD}),
    "exact": denoise(),
    "gram": denoise(svd="gram", rescale="signal_norm", below_edge="keep", shrinker="operator"),
    "subspace": denoise(svd="subspace", gate=gates.TracyWidom(0.01)),
    "stein": denoise(blend="stein", rescale="none"),
    "optshrink": denoise(shrinker="optshrink", rescale="none"),
    "joined": denoise(join=matrix_groups.shared_inputs),
    "stream": denoise(join=reads_the_stream, matrix_rule=layers_side_by_side),
    "adam": Case(scale_by_denoised_adam, {"noise_std": STD, "b1": 0.9, "b2": 0.99, "eps": 1e-8}),
    "adam_bc": Case(scale_by_denoised_adam, {"noise_std": STD, "noise_correction": 0.1}, {"svd": "gram"}),
    "adam_own": Case(scale_by_denoised_adam, {"noise_std": STD}, {"second_moment": "denoised", "svd": "subspace"}),
    "low_pass": Case(low_pass_filter, {}),
    "kalman": Case(kalman_filter, {"kappa": 0.7}, {"optimizer": optax.adam(1e-2)}),
    "truncate": Case(truncate_rank, {}, {"rank": 2}, ("rank",)),
    "muon": Case(private_muon, {"learning_rate": 0.02, "beta": 0.9}, {"others": optax.sgd(0.1)}),
}
STATELESS = {"truncate"}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def tree(seed: int = 0, dtype: Any = np.float32) -> dict[str, Any]:
    """A model of layers that share their input, of other leaves, with components well above the noise."""
    rng = np.random.default_rng(seed)

    def leaf(*shape: int) -> jax.Array:
        x = STD * rng.standard_normal(shape)
        return jnp.asarray(x + 4 * STD if len(shape) > 1 else x, dtype)

    attention = {name: {"kernel": leaf(2, 8, 12), "bias": leaf(2, 12)} for name in ("query", "key", "value")}
    return {
        "embedding": leaf(20, 8),
        "layers": {"attention": attention, "scale": leaf(2, 8)},
        "head": {"kernel": leaf(8, 2), "bias": leaf(2)},
        "wide": {"kernel": leaf(5, 9)},
    }


def run(transform: optax.GradientTransformation, *gradients: Any, jit: bool = True, params: Any = None) -> tuple:
    """The last output and state; parameters are the first gradients unless given."""
    params = gradients[0] if params is None else params
    state, update = transform.init(params), jax.jit(transform.update) if jit else transform.update
    for gradient in gradients:
        out, state = update(gradient, state, params)
    return out, state


def assert_same(found: Any, expected: Any, **tolerance: float) -> None:
    """Structure, dtypes, and values: to the last bit unless there is a tolerance."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, b), a in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        name = jax.tree_util.keystr(path)
        assert jnp.result_type(a) == jnp.result_type(b), name
        if tolerance:
            np.testing.assert_allclose(a, b, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


def is_wide(leaf: Any) -> bool:
    return jnp.result_type(leaf) == jnp.promote_types(jnp.result_type(leaf), jnp.float32)


@ALL
def test_structure_and_shapes_are_kept_and_states_have_one_type(case: Case) -> None:
    gradients, transform = tree(), case.make()
    state = transform.init(gradients)
    out, after = transform.update(gradients, state, gradients)
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, gradients)
    describe = functools.partial(jax.tree.map, lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert describe(after) == describe(state)  # so that it is the carry of a scan
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))  # so that it can be saved
    restored = jax.tree.unflatten(jax.tree.structure(state), [np.array(leaf) for leaf in jax.tree.leaves(state)])
    assert_same(transform.update(gradients, restored, gradients)[0], out)


@ALL
def test_no_leaf_of_a_state_has_two_names(case: Case) -> None:
    gradients, transform = tree(), case.make()
    state = transform.init(gradients)
    for at in (state, transform.update(gradients, state, gradients)[1]):
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(at)]
        assert len(set(names)) == len(names)
        buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((at, gradients))]
        assert len(set(buffers)) == len(buffers)


@ALL
def test_states_can_be_donated_again_and_again(case: Case) -> None:
    gradients, transform = tree(), case.make()
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
    gradients, transform = tree(), case.make()
    found, expected = run(transform, gradients, gradients), run(transform, gradients, gradients, jit=False)
    assert_same(found, expected, rtol=2e-4, atol=2e-5)
    state = jax.jit(transform.init)(gradients)
    assert_same(state, transform.init(gradients))


def test_noise_and_what_passes_are_the_same_bit_for_bit_compiled_or_not() -> None:
    for case in (CASES["noise"], CASES["exact"]):
        found, expected = (run(case.make(), tree(), jit=jit)[0] for jit in (True, False))
        assert_same(found if case.factory is noise else found["layers"]["scale"],
                    expected if case.factory is noise else expected["layers"]["scale"])  # fmt: skip


@ALL
def test_shapes_are_known_without_values(case: Case) -> None:
    gradients, transform = tree(), case.make()
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
    assert_same(out, run(case.make(), gradients, gradients)[0], rtol=1e-4, atol=1e-5)
    for name in set(case.numbers) & {"noise_std", "learning_rate"}:  # what is changed is used
        state.hyperparams[name] = jnp.asarray(4 * case.numbers[name])
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
    gradients, transform = tree(), case.make()
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
    copies = sum(a.shape == b.shape and bool((a != b).any()) for a, b in
                 zip(jax.tree.leaves(mapped), jax.tree.leaves(state), strict=True))  # fmt: skip
    assert copies == len(seen)
    is_matrix = {"muon": 4}  # momentum is kept of the matrices alone
    trees = {"adam": 2, "adam_bc": 2, "adam_own": 2, "low_pass": 1, "kalman": 4}
    name = next(name for name, other in CASES.items() if other is case)
    assert len(seen) == is_matrix.get(name, trees.get(name, 0) * len(jax.tree.leaves(gradients)))
    # As for `NamedSharding`s of a state: fields that are no parameters get one value for all that is in them.
    specs = optax.tree_map_params(
        transform, lambda leaf, name: "parameter", state, gradients,
        transform_non_params=lambda field: "other", is_leaf=is_masked,
    )  # fmt: skip
    assert {*jax.tree.leaves(specs)} <= {"parameter", "other"}


@ALL
def test_it_composes(case: Case) -> None:
    gradients, alone = tree(), run(case.make(), tree(), tree())[0]
    scaled = jax.tree.map(lambda leaf: -0.5 * leaf, alone)
    chained = optax.chain(case.make(), optax.scale(-0.5))
    assert_same(run(chained, gradients, gradients)[0], scaled, rtol=1e-5, atol=1e-6)
    guarded = optax.apply_if_finite(chained, 3)
    assert_same(run(guarded, gradients, gradients)[0], scaled, rtol=1e-5, atol=1e-6)
    accepts = optax.with_extra_args_support(case.make())
    accepts.update(gradients, accepts.init(gradients), gradients, unexpected=1.0)


@ALL
def test_an_update_that_is_not_finite_can_be_left_out(case: Case) -> None:
    gradients = tree()
    bad = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), gradients)
    guarded = optax.apply_if_finite(case.make(), 3)
    skipped, state = run(guarded, gradients, bad)
    assert all(not leaf.any() for leaf in jax.tree.leaves(skipped))
    expected = run(guarded, gradients)[1].inner_state
    assert_same(state.inner_state, expected, rtol=1e-5, atol=1e-6)


@ALL
def test_accumulated_steps_are_steps_of_the_mean(case: Case) -> None:
    several = optax.MultiSteps(case.make(), every_k_schedule=2)
    params = tree()
    state, update = several.init(params), jax.jit(several.update)
    nothing, state = update(tree(1), state, params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(nothing))
    out, _ = update(tree(2), state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, tree(1), tree(2))
    assert_same(out, run(case.make(), mean, params=params)[0], rtol=1e-3, atol=1e-4)


@ALL
def test_masked_leaves_are_not_touched(case: Case) -> None:
    gradients = tree()
    mask = {"embedding": True, "layers": True, "head": False, "wide": {"kernel": False}}
    out, state = run(optax.masked(case.make(), mask), gradients)
    assert_same({name: out[name] for name in ("head", "wide")}, {name: gradients[name] for name in ("head", "wide")})
    kept = {name: gradients[name] for name in ("embedding", "layers")}
    alone, _ = run(case.make(), kept)
    assert_same({name: out[name] for name in kept}, alone, rtol=1e-5, atol=1e-6)
    diagnosed = [path for path, _ in jax.tree_util.tree_leaves_with_path(state) if "wide" in jax.tree_util.keystr(path)]
    assert not diagnosed


@ALL
def test_parts_of_a_tree_may_have_transformations_of_their_own(case: Case) -> None:
    gradients = tree()
    labels = {"embedding": "sgd", "layers": "ours", "head": "ours", "wide": "ours"}
    both = optax.partition({"ours": case.make(), "sgd": optax.sgd(1.0)}, labels)
    out, _ = run(both, gradients)
    np.testing.assert_array_equal(out["embedding"], -gradients["embedding"])
    rest = {name: leaf for name, leaf in gradients.items() if name != "embedding"}
    if case.factory is not noise:  # whose draws are numbered by leaf
        assert_same({name: out[name] for name in rest}, run(case.make(), rest)[0], rtol=1e-5, atol=1e-6)


@ALL
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(case: Case, dtype: str) -> None:
    """States are float32 or wider; so is what is computed, and a leaf that passes has its own dtype."""
    with jax.enable_x64(dtype == "float64"):
        gradients, transform = tree(dtype=dtype), case.make()
        out, state = run(transform, gradients, gradients)
        for leaf in jax.tree.leaves((out["layers"]["attention"]["key"]["kernel"], out["wide"])):
            assert leaf.dtype == jnp.promote_types(dtype, jnp.float32)
        assert all(is_wide(leaf) for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))
        passes = case.factory in (denoise_matrices, truncate_rank)
        assert out["embedding"].dtype == (dtype if passes else out["embedding"].dtype)
        exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)
        # What was rounded on its way in is float32 from there on; with 64 bits nothing is but the noise's own digits.
        if dtype != "float64":
            expected, _ = run(case.make(), exact, exact)
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), out)
            assert_same(wide, expected, rtol=1e-2, atol=1e-3)


@ALL
def test_numbers_scalars_and_nothing_are_leaves(case: Case) -> None:
    gradients = {"temperature": 0.5, "gain": jnp.asarray(2.0), "unused": None, "kernel": tree()["wide"]["kernel"]}
    if "join" in case.others:
        gradients["layers"] = {"query": {"kernel": jnp.ones((8, 8))}}
    out, _ = run(case.make(), gradients, jit=False)
    assert out["unused"] is None
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, gradients)
    if case.factory in (denoise_matrices, truncate_rank):
        assert out["temperature"] == 0.5
    arrays = jax.tree.map(jnp.asarray, gradients)
    assert_same(jax.tree.map(jnp.asarray, out), run(case.make(), arrays, jit=False)[0])


@ALL
def test_empty_trees_and_leaves(case: Case) -> None:
    for empty in ({}, [], (), {"a": None}):
        out, _ = run(case.make(), empty)
        assert jax.tree.structure(out) == jax.tree.structure(empty)
    nothing = {"kernel": jnp.zeros((0, 8, 8)), "other": {"kernel": jnp.zeros((8, 0))}, "bias": jnp.zeros(0)}
    out, _ = run(case.make(), nothing)
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, nothing)


@ALL
def test_biases_alone_are_no_error(case: Case) -> None:
    biases = {"layers": {"query": {"bias": jnp.ones((6, 64))}, "norm": {"scale": jnp.ones((6, 64))}}}
    out, _ = run(case.make(), biases)
    assert jax.tree.structure(out) == jax.tree.structure(biases)


@ALL
def test_parameters_are_not_needed(case: Case) -> None:
    gradients = tree()
    if case.factory is private_muon:  # decays weights, as optax.contrib.muon does: by 0 unless told otherwise
        with pytest.raises(ValueError, match="params"):
            case.make().update(gradients, case.make().init(gradients))
        return
    out, _ = case.make().update(gradients, case.make().init(gradients))
    assert_same(out, run(case.make(), gradients, jit=False)[0])


@ALL
def test_a_stack_of_trees_is_transformed_tree_by_tree(case: Case) -> None:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), tree(0), tree(1))
    transform = case.make()
    state = jax.vmap(transform.init)(stacked)
    out, after = jax.jit(jax.vmap(transform.update))(stacked, state, stacked)
    for number in range(2):
        expected, _ = run(transform, tree(number))
        assert_same(jax.tree.map(lambda leaf, i=number: leaf[i], out), expected, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(after) == jax.tree.structure(state)


@ALL
def test_a_scan_over_steps_is_a_loop(case: Case) -> None:
    transform, gradients = case.make(), tree()

    def step(state: Any, number: jax.Array) -> tuple[Any, Any]:
        out, state = transform.update(jax.tree.map(lambda leaf: leaf * (1 + number), gradients), state, gradients)
        return state, out

    state, outs = jax.jit(lambda: jax.lax.scan(step, transform.init(gradients), jnp.arange(2.0)))()
    loop = run(transform, gradients, jax.tree.map(lambda leaf: 2 * leaf, gradients), params=gradients)
    assert_same((jax.tree.map(lambda leaf: leaf[-1], outs), state), loop, rtol=1e-3, atol=1e-4)


def test_two_leaves_of_one_path_are_refused() -> None:
    ambiguous = {"a/b": {"kernel": jnp.ones((8, 8))}, "a": {"b": {"kernel": jnp.zeros((8, 8))}}}
    with pytest.raises(ValueError, match=r"'a/b/kernel'.*slash"):
        denoise_matrices(STD).init(ambiguous)
