"""A clip norm that follows a quantile: its noise, its price, its state, and an audit."""

from __future__ import annotations

import dataclasses
import functools
import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting.pld import pld_privacy_accountant

from dp_rmt import accounting
from dp_rmt.auditing import lower_bounds
from dp_rmt.clipping.execution import Execution
from dp_rmt.clipping.per_example import PerExample, clipped_grad
from dp_rmt.clipping.quantile import (
    Counted,
    QuantileClipping,
    QuantileClippingState,
    centred_count,
    follow_quantile,
)
from dp_rmt.mechanism import DPSGD
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.training.train_step import make_train_step

ADAPTIVE = QuantileClipping(quantile=0.5, share=0.2, learning_rate=0.2)
MECHANISM = DPSGD(
    num_examples=64,
    expected_batch_size=64.0,
    num_steps=40,
    noise_multiplier=1.0,
    l2_clip_norm=0.05,
    clip_quantile=ADAPTIVE,
)


def losses(params, batch):
    return batch @ params["w"]


def rows(norms) -> np.ndarray:
    directions = np.random.default_rng(0).standard_normal((len(norms), 6))
    return (directions / np.linalg.norm(directions, axis=1, keepdims=True) * np.asarray(norms)[:, None]).astype(
        np.float32
    )


def trained(mechanism: DPSGD, batch: np.ndarray, steps: int, **options):
    transforms = Transforms(mechanism.noise(jax.random.key(3)), optax.identity(), optax.sgd(0.01))
    state = TrainState.create(transforms, {"w": jnp.zeros(6)}, {})
    step = jax.jit(make_train_step(mechanism, losses, transforms, execution=Execution("vmap"), **options))
    lines = []
    for _ in range(steps):
        state, metrics = step(state, [(batch, np.zeros(len(batch), bool))])
        lines.append(metrics)
    return state, lines


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_gradient_and_count_together_cost_what_one_gaussian_does(share: float) -> None:
    """By dp_accounting: the composition of both is the Gaussian that the run is accounted as."""
    of_sum, of_count = QuantileClipping(share=share).noise_multipliers(1.3)
    both = dp_accounting.ComposedDpEvent(
        [dp_accounting.GaussianDpEvent(of_sum), dp_accounting.GaussianDpEvent(of_count / 0.5)]
    )
    accountant = pld_privacy_accountant.PLDAccountant().compose(both, 10)
    ours = accounting.epsilon(noise_multiplier=1.3, delta=1e-5, sampling_probability=1.0, num_steps=10)
    assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=2e-3)
    plain = dataclasses.replace(MECHANISM, clip_quantile=None)
    assert MECHANISM.epsilon(40, 1e-5) == plain.epsilon(40, 1e-5)


def test_noise_of_gradient_and_count() -> None:
    """Over many keys: the std of an entry, and that of the count, read from the clip norm."""
    noise = MECHANISM.noise(jax.random.key(0))
    state = noise.init({})
    keys = jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(1), 4000))

    def released(words):
        own = state._replace(noise=state.noise._replace(key=words))
        noisy, after = noise.update(Counted({"w": jnp.zeros(4)}, jnp.float32(0.0)), own)
        return noisy["w"], -jnp.log(after.l2_clip_norm / state.l2_clip_norm) / ADAPTIVE.learning_rate

    entries, counts = jax.vmap(released)(keys)
    assert float(jnp.std(entries)) == pytest.approx(MECHANISM.noise_std, rel=5 / math.sqrt(2 * entries.size))
    assert MECHANISM.noise_std == pytest.approx(1 / math.sqrt(0.8) / 64, rel=1e-12)
    assert float(jnp.std(counts)) == pytest.approx(1 / (2 * math.sqrt(0.2)) / 64, rel=5 / math.sqrt(2 * 4000))
    correlation = np.corrcoef(np.asarray(entries[:, 0]), np.asarray(counts))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(4000)


@pytest.mark.parametrize("norm", [0.0, 0.3, 1.0, 1.5, 1e20, math.nan, math.inf])
def test_one_example_moves_the_count_by_a_half_and_padding_by_nothing(norm: float) -> None:
    others = PerExample(jnp.zeros(3), jnp.array([0.1, 2.0, 1.0]))
    more = PerExample(jnp.zeros(4), jnp.append(others.grad_norm, norm))
    without = centred_count(others, jnp.zeros(3, bool), 8.0)
    assert abs(float(centred_count(more, jnp.zeros(4, bool), 8.0) - without)) == 0.5 / 8
    assert float(centred_count(more, jnp.array([False, False, False, True]), 8.0)) == float(without)


def test_the_clip_norm_finds_the_quantile() -> None:
    norms = np.geomspace(0.5, 8.0, 64)
    mechanism = dataclasses.replace(MECHANISM, noise_multiplier=0.5, expected_batch_size=64.0)
    _, lines = trained(mechanism, rows(norms), 120)  # 40 to come near, at 0.1 a step, then 5 time constants of 14
    assert float(lines[0]["clipping/l2_clip_norm"]) == pytest.approx(0.05)
    late = np.array([float(line["clipping/l2_clip_norm"]) for line in lines[100:]])
    assert np.median(late) == pytest.approx(2.0, rel=0.15)  # the count's noise has 1 / 114 of the sample: 1% of a rank
    assert float(lines[-1]["nonprivate/clipped_fraction"]) == pytest.approx(0.5, abs=0.1)
    assert float(lines[-1]["nonprivate/grad_norm"]) == pytest.approx(norms.mean(), rel=1e-4)


def test_the_gradient_is_that_of_flat_clipping_in_units_of_the_norm() -> None:
    batch = rows(np.geomspace(0.5, 8.0, 64))
    unit = MECHANISM.clipped_grad(losses, Execution("vmap"), clip_norm=jnp.float32(2.0))
    flat = clipped_grad(losses, l2_clip_norm=2.0, normalize_by=64.0)
    params = {"w": jnp.zeros(6)}
    ours, ours_raw = unit(params, batch, is_padding_example=None)
    theirs, raw = flat(params, batch, is_padding_example=None)
    np.testing.assert_allclose(ours["w"] * 2, theirs["w"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours_raw.grad_norm * 2, raw.grad_norm, rtol=1e-6)
    assert unit.l2_norm_bound == 1 / 64


USERS, ROWS = 6, 3
OF_USERS = dataclasses.replace(
    MECHANISM, num_examples=USERS, expected_batch_size=float(USERS), l2_clip_norm=1.0, rows_per_user=ROWS
)


@functools.cache
def released_before_noise():
    """``(rows of users, mask) -> Counted``: what a step of `OF_USERS` gives its noise, compiled."""
    seen = optax.GradientTransformation(
        lambda params: QuantileClippingState(None, jnp.float32(OF_USERS.l2_clip_norm)),  # type: ignore[arg-type]
        lambda clean, state, params=None: ({"w": jnp.append(clean.gradient["w"], clean.num_below)}, state),
    )
    keeps = optax.GradientTransformation(lambda params: {"w": jnp.zeros(7)}, lambda g, state, params=None: (g, g))
    forgets = optax.stateless(lambda g, params: jax.tree.map(jnp.zeros_like, params))
    transforms = Transforms(seen, keeps, forgets)
    state = TrainState.create(transforms, {"w": jnp.zeros(6)}, {})
    step = jax.jit(make_train_step(OF_USERS, losses, transforms, execution=Execution("vmap"), nonprivate_metrics=False))
    return lambda batch, mask: np.asarray(step(state, [(batch, mask)])[0].denoise["w"])


@pytest.mark.parametrize("norms", [(9.0, 9.0, 9.0), (0.5, 0.5, 0.5), (0.1, 50.0, 0.2), (0.3, 0.9, 0.9)])
@pytest.mark.parametrize("size", [1, 2, ROWS])
def test_a_user_with_all_rows_moves_the_sum_by_at_most_one_and_the_count_by_a_half(norms, size) -> None:
    """Rows clipped or counted apart would move them by as many as there are."""
    batch = rows(np.geomspace(0.2, 5.0, USERS * ROWS)).reshape(USERS, ROWS, 6)
    batch[2] = rows(norms)
    present = np.zeros((USERS, ROWS), bool)
    present[2, size:] = True
    absent = present.copy()
    absent[2] = True
    moved = (released_before_noise()(batch, present) - released_before_noise()(batch, absent)) * USERS
    mean = batch[2, :size].mean(axis=0)
    assert np.linalg.norm(moved[:6]) <= 1 + 1e-6
    np.testing.assert_allclose(moved[:6], mean / max(1.0, np.linalg.norm(mean)), rtol=1e-4, atol=1e-6)
    assert moved[6] == pytest.approx(0.5 if np.linalg.norm(mean) <= 1 else -0.5, abs=1e-6)


def test_a_step_that_is_repeated_repeats_clip_norm_and_noise() -> None:
    batch = rows(np.geomspace(0.5, 8.0, 64))
    once, _ = trained(MECHANISM, batch, 5)
    again, _ = trained(MECHANISM, batch, 5)
    jax.tree.map(np.testing.assert_array_equal, once, again)


def test_what_does_not_go_together_is_refused() -> None:
    for change in ({"noise_multiplier": 0.0}, {"clip": "automatic"}, {"l2_clip_norm": 1e7}):
        with pytest.raises(ValueError, match="clip_quantile needs noise"):
            dataclasses.replace(MECHANISM, **change)
    for name in ("quantile", "share"):
        with pytest.raises(ValueError, match=name):
            QuantileClipping(**{name: 1.0})
    with pytest.raises(ValueError, match="clip_norm belongs to clip_quantile"):
        MECHANISM.clipped_grad(losses)
    with pytest.raises(ValueError, match="clip_norm belongs to clip_quantile"):
        dataclasses.replace(MECHANISM, clip_quantile=None).clipped_grad(losses, clip_norm=jnp.float32(1.0))


# ---- An audit --------------------------------------------------------------------------------------------------------


class Unpaid(QuantileClipping):
    """The typical mistake: the gradient keeps the whole budget, and the count comes on top."""

    def noise_multipliers(self, noise_multiplier: float) -> tuple[float, float]:
        return noise_multiplier, super().noise_multipliers(noise_multiplier)[1]


class Unnoised(QuantileClipping):
    """The other one: the count follows the norms without noise."""

    def noise_multipliers(self, noise_multiplier: float) -> tuple[float, float]:
        return super().noise_multipliers(noise_multiplier)[0], 1e-3


def audited(clipping: QuantileClipping, size: float = 40.0, runs: int = 60_000) -> float:
    """The bound of an attack on one step that looks at both: a long gradient moves the sum by 1, the count by -1/2."""
    noise = follow_quantile(clipping, noise_multiplier=1.0, l2_clip_norm=1.0, normalize_by=size, key=jax.random.key(0))
    state = noise.init(())
    of_sum, of_count = clipping.noise_multipliers(1.0)

    @jax.jit
    @jax.vmap
    def score(words, is_in):
        own = state._replace(noise=state.noise._replace(key=words))
        clean = Counted({"w": is_in / size}, -0.5 * is_in / size)
        noisy, after = noise.update(clean, own)
        count = (clipping.quantile - jnp.log(after.l2_clip_norm) / clipping.learning_rate - 0.5) * size
        return noisy["w"] * size / of_sum**2 - 0.5 * count / of_count**2

    words = np.random.SeedSequence(5).generate_state(4 * runs, np.uint32).reshape(2, runs, 2)
    scores = [np.asarray(score(words[side], jnp.full(runs, float(side)))) for side in (0, 1)]
    tuning = runs // 10
    threshold, _ = lower_bounds.best_threshold(scores[1][:tuning], scores[0][:tuning], delta=1e-3)
    counted = lower_bounds.count(scores[1][tuning:], scores[0][tuning:], threshold)
    return lower_bounds.repeated_runs_epsilon(counted, delta=1e-3)


def test_an_audit_lies_below_the_proven_epsilon_and_above_it_where_the_count_is_not_paid_for() -> None:
    proven = accounting.epsilon(noise_multiplier=1.0, delta=1e-3, sampling_probability=1.0, num_steps=1)
    assert 0.6 * proven < audited(QuantileClipping(share=0.9)) < proven
    assert audited(Unpaid(share=0.9)) > proven
    assert audited(Unnoised(share=0.01)) > proven
