"""All of our transformations as one table, and the tree that the laws of optax are tried on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt import add_gaussian_noise, denoise_matrices, scale_by_denoised_adam
from dp_rmt.baselines.adam_bc import scale_by_adam_bc
from dp_rmt.baselines.filters import kalman_filter, low_pass_filter
from dp_rmt.baselines.iterates import average_iterates
from dp_rmt.baselines.muon import private_muon
from dp_rmt.baselines.muon_bc import muon_bc
from dp_rmt.baselines.truncation import truncate_rank
from dp_rmt.clipping.coordinates import AxisMap, Coordinates, LeafAxes
from dp_rmt.correlated_noise import add_correlated_noise, square_root
from dp_rmt.denoising import gates
from dp_rmt.denoising.joins import layers_side_by_side, reads_the_stream, shared_inputs
from dp_rmt.geometry import whiten_inputs
from dp_rmt.training.advice import measure_steps
from dp_rmt.trees import wide

STD = 0.5


@dataclass(eq=False)
class Case:
    """A factory, its numbers that may be traced, and its other arguments."""

    factory: Callable[..., optax.GradientTransformation]
    numbers: dict[str, float]
    others: Mapping[str, Any] = field(default_factory=dict)
    static: tuple[str, ...] = ()

    @functools.cached_property
    def transform(self) -> optax.GradientTransformation:
        """One for all laws: it must remember nothing, and JAX compiles it once for each tree."""
        return self.factory(**self.others, **self.numbers)

    @functools.cached_property
    def first_step(self) -> tuple[Any, Any, Any, Any]:
        """``(gradients, state, output, next state)`` of `tree()`, not compiled; no law may change them."""
        gradients = tree()
        state = self.transform.init(gradients)
        return gradients, state, *self.transform.update(gradients, state, gradients)


def denoise(**options: Any) -> Case:
    return Case(denoise_matrices, {"noise_std": STD}, options, ("join", "matrix_rule"))


def noise(noise_std: float, seed: int = 7) -> optax.GradientTransformation:
    return add_gaussian_noise(noise_std, jax.random.key(seed))


def correlated_noise(noise_std: float) -> optax.GradientTransformation:
    return add_correlated_noise(noise_std, square_root(3), jax.random.key(7))


def measured(noise_std: float) -> optax.GradientTransformation:
    """`measure_steps` in a loop that denoises nothing: what the optimizer is given is the noisy gradient."""
    widen = optax.stateless(lambda updates, params: jax.tree.map(wide, updates))
    optimizer = measure_steps(optax.chain(widen, optax.sgd(0.1)), noise_std)
    return optax.GradientTransformation(
        optimizer.init, lambda updates, state, params=None: optimizer.update(updates, state, params, noisy=updates)
    )


def whitened() -> optax.GradientTransformation:
    """Coordinates of some leaves: a stack with two inputs' maps, and both sides of the head."""
    maps = {
        name: AxisMap(jnp.full(stack, 2.0), jnp.full((*stack, side, 1), 0.3))
        for name, stack, side in (("stack", (2,), 8), ("in", (), 8), ("out", (), 2))
    }
    leaves = (
        LeafAxes("layers/attention/key/kernel", (-2,), (-1,), "stack"),
        LeafAxes("head/kernel", (-2,), (-1,), "in", "out"),
    )
    return whiten_inputs(Coordinates(maps, leaves))


CASES = {
    "noise": Case(noise, {"noise_std": STD}),
    "correlated_noise": Case(correlated_noise, {"noise_std": STD}),
    "exact": denoise(),
    "gram": denoise(svd="gram", rescale="signal_norm", below_edge="keep", shrinker="operator"),
    "subspace": denoise(svd="subspace", gate=gates.TracyWidom(0.01)),
    "stein": denoise(blend="stein", rescale="none"),
    "optshrink": denoise(shrinker="optshrink", rescale="none"),
    "joined": denoise(join=shared_inputs),
    "stream": denoise(join=reads_the_stream, matrix_rule=layers_side_by_side),
    "adam": Case(scale_by_denoised_adam, {"noise_std": STD, "b1": 0.9, "b2": 0.99, "eps": 1e-8}),
    "adam_bc": Case(scale_by_denoised_adam, {"noise_std": STD, "noise_correction": 0.1}, {"svd": "gram"}),
    "adam_own": Case(scale_by_denoised_adam, {"noise_std": STD}, {"second_moment": "denoised", "svd": "subspace"}),
    "low_pass": Case(low_pass_filter, {}),
    "kalman": Case(kalman_filter, {"kappa": 0.7}, {"optimizer": optax.adam(1e-2)}),
    "average": Case(average_iterates, {"decay": 0.7}),
    "truncate": Case(truncate_rank, {}, {"rank": 2}, ("rank",)),
    "muon": Case(private_muon, {"learning_rate": 0.02, "beta": 0.9}, {"others": optax.sgd(0.1)}),
    "plain_adam_bc": Case(scale_by_adam_bc, {"noise_std": STD, "b1": 0.9, "b2": 0.99, "floor": 0.01}),
    "muon_bc": Case(
        muon_bc, {"learning_rate": 0.02, "noise_std": STD, "beta": 0.9}, {"others": optax.sgd(0.1)}, ("num_probes",)
    ),
    "whitened": Case(whitened, {}),
    "measured": Case(measured, {}, {"noise_std": STD}),
}
# By default the laws are tried on each kind and each backend; the other options seldom change what they say.
_OPTIONS = {"stein", "optshrink", "joined", "stream", "adam_bc", "adam_own", "muon_bc"}


def _each(cases: Mapping[str, Case]) -> pytest.MarkDecorator:
    params = [
        pytest.param(case, id=name, marks=pytest.mark.slow if name in _OPTIONS else ()) for name, case in cases.items()
    ]
    return pytest.mark.parametrize("case", params)


ALL = _each(CASES)
ANY_TREE = _each({name: case for name, case in CASES.items() if name != "whitened"})
"""Without coordinates, which name the leaves that a tree must have."""
_OF_EACH_KIND = {
    "noise",
    "correlated_noise",
    "subspace",
    "adam",
    "low_pass",
    "kalman",
    "truncate",
    "muon",
    "measured",
    "whitened",
}
# What optax puts around a transformation sees its interface alone, and options seldom change that: the rest is slow.
EACH_KIND = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in _OF_EACH_KIND else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)


def tree(seed: int = 0, dtype: Any = np.float32) -> dict[str, Any]:
    """A model of layers that share their input, of other leaves, with components well above the noise."""
    rng = np.random.default_rng(seed)

    def leaf(*shape: int) -> jax.Array:
        x = STD * rng.standard_normal(shape)
        return jnp.asarray(x + 4 * STD if len(shape) > 1 else x, dtype)

    attention = {name: {"kernel": leaf(2, 8, 12)} for name in ("query", "key")}
    return {
        "embedding": leaf(20, 8),
        "layers": {"attention": attention, "scale": leaf(2, 8)},
        "head": {"kernel": leaf(8, 2)},
        "wide": {"kernel": leaf(8, 12)},
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
