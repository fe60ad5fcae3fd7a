"""The average of the iterates: the formula, exact cases, dtypes, what it refuses, and what a run does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt import DPSGD
from dp_rmt.baselines.filters import kalman_filter, without_look_ahead
from dp_rmt.baselines.iterates import average_iterates, averaged_params
from dp_rmt.clipping.execution import Execution
from dp_rmt.noise_addition import noise_key
from dp_rmt.training import Run, Seeds, Task, Transforms, prepare_run

MECHANISM = DPSGD(
    num_examples=24, expected_batch_size=6.0, num_steps=4, noise_multiplier=2.0, l2_clip_norm=0.5, accountant="rdp"
)
DECAY = 0.7


def params(dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(3, 4)), rng.normal(size=4)
    return {"layer": {"kernel": jnp.asarray(kernel, dtype)}, "bias": jnp.asarray(bias, dtype)}


def train(optimizer: optax.GradientTransformation, steps: int, x: Any) -> tuple[Any, Any, list[Any]]:
    """The last parameters, the state, and all iterates after the start, with gradients that are never the same."""
    state, update, iterates = optimizer.init(x), jax.jit(optimizer.update), []
    for step in range(steps):
        gradient = jax.tree.map(lambda leaf, t=step: jnp.cos(leaf * (t + 1)), x)
        updates, state = update(gradient, state, x)
        x = optax.apply_updates(x, updates)
        iterates.append(x)
    return x, state, iterates


@pytest.mark.parametrize("decay", [0.3, 0.7, 0.99])
def test_it_is_the_weighted_mean_of_all_iterates(decay: float) -> None:
    """In double precision, by the sum and not by the recursion."""
    optimizer = optax.chain(optax.adam(0.1), average_iterates(decay))
    last, state, iterates = train(optimizer, 6, params())
    weights = decay ** np.arange(5, -1, -1.0)
    for path in (("layer", "kernel"), ("bias",)):
        found, trees = averaged_params(state, last), iterates
        for name in path:
            found, trees = found[name], [tree[name] for tree in trees]
        expected = np.average(np.array(trees, np.float64), axis=0, weights=weights)
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)  # some roundings of numbers of about 1


def test_updates_pass_and_the_run_goes_on_from_the_iterate() -> None:
    plain, _, _ = train(optax.adam(0.1), 5, params())
    averaged, state, _ = train(optax.chain(optax.adam(0.1), average_iterates(DECAY)), 5, params())
    jax.tree.map(np.testing.assert_array_equal, averaged, plain)
    assert not np.allclose(averaged_params(state, averaged)["bias"], averaged["bias"])


@pytest.mark.parametrize(("decay", "steps"), [(0.0, 4), (0.9, 1), (0.9, 0)])
def test_where_it_is_the_iterate_it_is_so_to_the_last_bit(decay: float, steps: int) -> None:
    """With decay 0, after the first update, and before it."""
    optimizer = optax.chain(optax.adam(0.1), average_iterates(decay))
    last, state, _ = train(optimizer, steps, params())
    jax.tree.map(np.testing.assert_array_equal, averaged_params(state, last), last)


def test_the_average_of_iterates_that_stand_still_is_where_they_stand() -> None:
    """At once: the bias of the start is corrected."""
    x = params()
    _, state, _ = train(optax.chain(optax.sgd(0.0), average_iterates(0.999)), 3, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), averaged_params(state, x), x)


def test_it_is_kept_in_float32_and_given_in_the_dtype_of_the_parameters() -> None:
    average, x = average_iterates(0.9), params(jnp.bfloat16)
    small = jax.tree.map(lambda leaf: jnp.full_like(leaf, 2.0**-10), x)  # lost in the sum of two bfloat16
    state = average.init(x)
    for _ in range(3):
        _, state = average.update(small, state, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    assert averaged_params(state, x)["bias"].dtype == jnp.bfloat16
    np.testing.assert_allclose(state.average["bias"], np.float32(x["bias"]) + 2.0**-10, rtol=1e-6)


def test_it_is_found_in_a_chain_of_any_shape() -> None:
    inner = optax.chain(optax.identity(), optax.chain(optax.adam(0.1), average_iterates(DECAY)))
    wrapped = optax.apply_if_finite(optax.chain(optax.clip(1.0), inner), 3)
    last, state, _ = train(wrapped, 3, params())
    plain, alone, _ = train(optax.chain(optax.clip(1.0), optax.adam(0.1), average_iterates(DECAY)), 3, params())
    jax.tree.map(np.testing.assert_array_equal, averaged_params(state, last), averaged_params(alone, plain))


def test_inside_a_kalman_filter_the_average_is_of_its_iterates() -> None:
    filtered = kalman_filter(optax.chain(optax.adam(0.1), average_iterates(DECAY)), kappa=0.5)
    x, state, iterates = params(), filtered.init(params()), []
    for _ in range(4):
        updates, state = filtered.update(jax.tree.map(jnp.cos, x), state, x)
        x = optax.apply_updates(x, updates)
        iterates.append(without_look_ahead(state, x)["bias"])
    expected = np.average(np.array(iterates, np.float64), axis=0, weights=DECAY ** np.arange(3, -1, -1.0))
    np.testing.assert_allclose(averaged_params(state, x)["bias"], expected, rtol=2e-6, atol=1e-6)


def test_what_cannot_be_averaged_is_refused() -> None:
    for decay in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
            average_iterates(decay)
    average = average_iterates(0.5)
    with pytest.raises(ValueError, match=r"call update\(updates, state, params\)"):
        average.update(params(), average.init(params()))
    for optimizer, message in (
        (optax.adam(0.1), "has 0 averages, not one"),
        (optax.chain(average, average), "has 2 averages, not one"),
        (optax.chain(kalman_filter(optax.adam(0.1)), average), "average inside the filter"),
    ):
        with pytest.raises(ValueError, match=message):
            averaged_params(optimizer.init(params()), params())


def make_run(seen: list[Any]) -> Run:
    """A run whose evaluator keeps what it is given; new objects, as in a process of its own."""
    rng = np.random.default_rng(0)
    rows = {"x": rng.normal(size=(24, 3)).astype(np.float32), "y": rng.normal(size=24).astype(np.float32)}

    def losses(params: Any, batch: Any) -> jax.Array:
        return jnp.square(batch["x"] @ params["weight"] - batch["y"])

    def evaluate(params: Any) -> dict[str, float]:
        seen.append(np.array(params["weight"]))
        return {"loss": float(jnp.mean(losses(params, rows)))}

    def transforms(mechanism: DPSGD, noise_seed: int, mesh: jax.sharding.Mesh) -> Transforms:
        optimizer = optax.chain(optax.adam(0.1), average_iterates(DECAY))
        noise = mechanism.noise(noise_key(noise_seed))
        return Transforms(noise, optax.identity(), optimizer, published=averaged_params)

    return prepare_run(
        Task(rows, losses, {"weight": np.zeros(3, np.float32)}, evaluators={"dev": evaluate}),
        MECHANISM,
        transforms,
        delta=1e-3,
        seeds=Seeds(3, 4),
        execution=Execution("vmap", 2),
        eval_every=1,
        checkpoint_every=1,
    )


@pytest.mark.slow
def test_a_run_evaluates_and_publishes_the_average_and_resumes_it_bit_for_bit(tmp_path: Path) -> None:
    seen: list[Any] = []
    saved: list[Any] = []
    run = make_run(seen)
    state = run.train(tmp_path / "whole", write_results=lambda step, params, metrics: saved.append(params))
    kept = optax.tree.get(state.optimizer, "average")["weight"]
    published = run.published_params(state)["weight"]
    np.testing.assert_array_equal(published, kept)
    np.testing.assert_array_equal(saved[-1]["weight"], kept)
    np.testing.assert_array_equal(seen[-1], kept)
    np.testing.assert_array_equal(seen[0], np.zeros(3))  # before the first step
    assert not np.allclose(kept, state.params["weight"])

    again: list[Any] = []
    make_run(again).train(tmp_path / "parts", until=2)
    resumed = make_run(again).train(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(state))
    np.testing.assert_array_equal(again[-1], seen[-1])
