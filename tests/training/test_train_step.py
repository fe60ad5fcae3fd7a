"""The step: its metrics by hand, the switch for the nonprivate ones, groups, frozen parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt.mechanism import DPSGD
from dp_rmt.training import train_step as train_step_module
from dp_rmt.training.advice import measure_steps
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.training.train_step import make_train_step, mean_matrix_cosine

BATCH, ROWS, COLS = 6, 12, 20
MECHANISM = DPSGD(
    num_examples=60, expected_batch_size=4.0, num_steps=3, noise_multiplier=0.5, l2_clip_norm=1.0, max_batch_size=BATCH
)
PARAMS = {"dense": {"kernel": jnp.ones((ROWS, COLS)), "bias": jnp.zeros(5)}}
FROZEN = {"dense": {"scale": jnp.asarray(2.0)}, "embedding": jnp.ones(3)}


def losses(params, batch):
    """Linear, so gradients are ``scale`` times the rows of the batch."""
    dense = params["dense"]
    kernel_part = jnp.sum(dense["kernel"] * batch["kernel"], (1, 2))
    return dense["scale"] * (kernel_part + jnp.sum(dense["bias"] * batch["bias"], 1) + params["embedding"][0])


def make_batch(seed=0, norms=(0.1, 0.2, 0.3, 0.6, 2.0, 9.0)):
    rng = np.random.default_rng(seed)
    kernel, bias = rng.standard_normal((BATCH, ROWS, COLS)), rng.standard_normal((BATCH, 5))
    scale = np.asarray(norms) / np.sqrt((kernel**2).sum((1, 2)) + (bias**2).sum(1))
    return {
        "kernel": (kernel * scale[:, None, None]).astype(np.float32),
        "bias": (bias * scale[:, None]).astype(np.float32),
    }


def build(*, mechanism=MECHANISM, denoise=None, **options):
    transforms = Transforms(mechanism.noise(jax.random.key(0)), denoise or mechanism.denoiser(), optax.adamw(1e-2))
    state = TrainState.create(transforms, PARAMS, FROZEN)
    return state, make_train_step(mechanism, losses, transforms, **options), transforms


def by_hand(groups, transforms, state):
    """Clean, noisy and denoised gradient, from the definition."""
    clean = jax.tree.map(lambda p: np.zeros(p.shape), PARAMS["dense"])
    for batch, is_padding in groups:
        norms = 2 * np.sqrt((batch["kernel"] ** 2).sum((1, 2)) + (batch["bias"] ** 2).sum(1))
        factors = np.where(is_padding, 0, 2 * np.minimum(1, 1 / norms)) / 4
        clean = {name: clean[name] + np.einsum("b,b...->...", factors, batch[name]) for name in clean}
    clean = {"dense": jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), clean)}
    noisy, _ = transforms.noise.update(clean, state.noise)
    denoised, denoise_state = transforms.denoise.update(noisy, state.denoise)
    return clean, noisy, denoised, denoise_state


def test_step_and_metrics_by_hand():
    state, step, transforms = build()
    is_padding = np.array([False, False, True, False, False, False])
    groups = [(make_batch(0), is_padding), (make_batch(1), ~is_padding)]
    after, metrics = jax.jit(step)(state, groups)
    clean, noisy, denoised, denoise_state = by_hand(groups, transforms, state)

    updates, _ = transforms.optimizer.update(denoised, state.optimizer, PARAMS)
    expected = optax.apply_updates(PARAMS, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), after.params, expected)
    jax.tree.map(np.testing.assert_array_equal, after.frozen, FROZEN)
    assert int(after.step) == int(after.noise.step) == int(after.denoise.step) == 1

    norms = 2 * np.array([0.1, 0.2, 0.6, 2.0, 9.0, 0.3])  # the examples of both groups, padding left out
    example_losses = [
        losses({"dense": {**PARAMS["dense"], **FROZEN["dense"]}, "embedding": FROZEN["embedding"]}, b)
        for b, _ in groups
    ]
    loss = np.concatenate([np.asarray(x)[~p] for x, (_, p) in zip(example_losses, groups)]).mean()
    expected_metrics = {
        "nonprivate/loss": loss,
        "nonprivate/grad_norm": norms.mean(),
        "nonprivate/clipped_fraction": 3 / 6,
        "nonprivate/nonfinite_examples": 0,
        "nonprivate/batch_size": 6,
        "nonprivate/cosine_noisy": mean_matrix_cosine(noisy, clean),
        "nonprivate/cosine_denoised": mean_matrix_cosine(denoised, clean),
        "nonprivate/cosine_update": mean_matrix_cosine(jax.tree.map(jnp.negative, updates), clean),
    }
    assert metrics.keys() == expected_metrics.keys() | {"denoise/kept_rank", "denoise/top_over_edge"}
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    diagnostics = denoise_state.diagnostics["dense/kernel"]
    np.testing.assert_array_equal(metrics["denoise/kept_rank"]["dense/kernel"], diagnostics.kept_rank)
    np.testing.assert_allclose(metrics["denoise/top_over_edge"]["dense/kernel"], diagnostics.top_over_edge, rtol=1e-5)


def test_nonfinite_examples_are_counted_and_left_out():
    state, step, _ = build()
    batch = make_batch(norms=(1.0,) * BATCH)
    batch["bias"][3, 0] = np.nan
    after, metrics = jax.jit(step)(state, [(batch, np.arange(BATCH) > 3)])
    without, _ = jax.jit(step)(state, [(batch, np.arange(BATCH) > 2)])
    jax.tree.map(np.testing.assert_array_equal, after.params, without.params)
    assert int(metrics["nonprivate/nonfinite_examples"]) == 1
    assert int(metrics["nonprivate/batch_size"]) == 4
    np.testing.assert_allclose(metrics["nonprivate/grad_norm"], 2.0, rtol=1e-5)


def test_an_empty_sample_moves_by_noise_alone_and_gives_finite_metrics():
    state, step, _ = build()
    after, metrics = jax.jit(step)(state, [(make_batch(), np.ones(BATCH, bool))])
    assert (after.params["dense"]["kernel"] != PARAMS["dense"]["kernel"]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, metrics)))
    assert metrics["nonprivate/batch_size"] == metrics["nonprivate/loss"] == 0


def flops(step, state, groups):
    return jax.jit(step).lower(state, groups).compile().cost_analysis()["flops"]


def test_nonprivate_metrics_can_be_switched_off_and_are_then_not_computed(monkeypatch):
    groups = [(make_batch(), np.zeros(BATCH, bool))]
    state, with_them, _ = build()
    _, without, transforms = build(nonprivate_metrics=False)
    private_state, metrics = jax.jit(without)(state, groups)
    assert set(metrics) == {"denoise/kept_rank", "denoise/top_over_edge"}
    # Two programs, in which XLA may fuse the same products into other loops. The last bit may differ, and what is small
    # beside the largest entry of a denoised matrix differs as much as that does.
    same = jax.jit(with_them)(state, groups)[0]
    for one, two in zip(jax.tree.leaves(private_state), jax.tree.leaves(same), strict=True):
        if jnp.issubdtype(one.dtype, jnp.inexact):
            np.testing.assert_allclose(one, two, rtol=3e-7, atol=3e-6 * float(np.max(np.abs(two))))
        else:
            np.testing.assert_array_equal(one, two)

    def bare_step(state, groups):
        gradient, _ = MECHANISM.clipped_grad(
            lambda p, b: losses({"dense": {**p["dense"], **FROZEN["dense"]}, "embedding": FROZEN["embedding"]}, b)
        )(state.params, groups[0][0], is_padding_example=groups[0][1])
        noisy, noise = transforms.noise.update(gradient, state.noise)
        denoised, denoise = transforms.denoise.update(noisy, state.denoise)
        updates, optimizer = transforms.optimizer.update(denoised, state.optimizer, state.params)
        return optax.apply_updates(state.params, updates), noise, denoise, optimizer

    bare = flops(bare_step, state, groups)
    assert flops(without, state, groups) == pytest.approx(bare, rel=1e-3)
    assert flops(with_them, state, groups) > 1.01 * bare

    def must_not_run(*_):
        raise AssertionError("computed though switched off")

    monkeypatch.setattr(train_step_module, "_raw_metrics", must_not_run)
    monkeypatch.setattr(train_step_module, "mean_matrix_cosine", must_not_run)
    jax.eval_shape(lambda *inputs: without(*inputs), state, groups)  # the lambda: not from the cache of traces
    with pytest.raises(AssertionError, match="switched off"):
        jax.eval_shape(lambda *inputs: with_them(*inputs), state, groups)


def test_no_metric_of_raw_values_has_another_name():
    """Whatever changes with the data at the same noisy update is named nonprivate."""
    target = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), PARAMS)
    constant = optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda updates, state, params=None: (target, state)
    )
    transforms = Transforms(constant, MECHANISM.denoiser(), optax.sgd(1.0))
    step = jax.jit(make_train_step(MECHANISM, losses, transforms))
    state = TrainState.create(transforms, PARAMS, FROZEN)
    first, one = step(state, [(make_batch(1, (0.1,) * BATCH), np.arange(BATCH) > 1)])
    second, two = step(state, [(make_batch(3, (5.0,) * BATCH), np.arange(BATCH) > 3)])
    jax.tree.map(np.testing.assert_array_equal, first, second)
    for name in one:
        if not name.startswith("nonprivate/"):
            jax.tree.map(np.testing.assert_array_equal, one[name], two[name])
        elif name != "nonprivate/nonfinite_examples":
            assert one[name] != two[name]


def test_the_advice_reads_the_noisy_gradient_and_not_the_denoised_one():
    """The same gradient twice, doubled by what denoises: behind the step -2 g the slope is |g| / s, not twice that."""
    target = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), PARAMS)
    constant = optax.stateless(lambda updates, params: target)
    optimizer = measure_steps(optax.sgd(1.0), MECHANISM.noise_std)
    transforms = Transforms(constant, optax.scale(2.0), optimizer)
    step = jax.jit(make_train_step(MECHANISM, losses, transforms, nonprivate_metrics=False))
    state = TrainState.create(transforms, PARAMS, FROZEN)
    for _ in range(2):
        state, metrics = step(state, [(make_batch(), np.zeros(BATCH, bool))])
    np.testing.assert_allclose(metrics["advice/slope"], optax.tree.norm(target) / MECHANISM.noise_std, rtol=1e-5)


def test_without_a_denoiser_there_are_no_diagnostics():
    state, step, _ = build(denoise=optax.identity(), nonprivate_metrics=False)
    after, metrics = jax.jit(step)(state, [(make_batch(), np.zeros(BATCH, bool))])
    assert metrics == {}
    assert int(after.step) == 1


def test_groups_add_up_before_the_noise():
    """One group of six examples or three groups of two: the same gradient, the same noise."""
    batch = make_batch()
    state, step, _ = build(denoise=optax.identity())
    whole, whole_metrics = jax.jit(step)(state, [(batch, np.zeros(BATCH, bool))])
    parts = [(batch, ~np.isin(np.arange(BATCH), rows)) for rows in ((0, 1), (2, 3), (4, 5))]
    split, metrics = jax.jit(step)(state, parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), split.optimizer, whole.optimizer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), metrics, whole_metrics)


def test_mean_matrix_cosine():
    kernel = np.zeros((2, 8, 8), np.float32)
    kernel[0, 0, :2], kernel[1, 0, 0] = (3, 4), 2
    other = np.zeros_like(kernel)
    other[0, 0, 0], other[1, 3, 3] = 7, 1
    assert mean_matrix_cosine({"kernel": kernel}, {"kernel": other}) == pytest.approx((0.6 + 0) / 2)
    # Zero matrices count as 0; leaves that are no matrices do not count.
    assert mean_matrix_cosine({"kernel": kernel, "bias": np.ones(3)}, {"kernel": 0 * kernel, "bias": np.ones(3)}) == 0
    assert mean_matrix_cosine({"bias": np.ones(3)}, {"bias": np.ones(3)}) == 0


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_mean_matrix_cosine_of_small_and_large_matrices(size):
    """The product of two squared norms would leave float32 at 1e-10 and 1e9."""
    kernel = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    assert mean_matrix_cosine({"kernel": size * kernel}, {"kernel": size * kernel}) == pytest.approx(1.0, rel=1e-5)
