"""Laws of correlated noise: who takes part when, what the denoisers see of noise alone, and audits."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from small_run import included

from dp_rmt import accounting, denoise_matrices, scale_by_denoised_adam
from dp_rmt.auditing import lower_bounds
from dp_rmt.baselines.muon_bc import muon_bc
from dp_rmt.batch_selection import PoissonSampling
from dp_rmt.correlated_noise import BandedToeplitz, add_correlated_noise, square_root
from dp_rmt.mechanism import DPSGD

BANDS, STEPS = 4, 12
RUN = {"num_examples": 1000, "expected_batch_size": 50.0, "num_steps": STEPS, "l2_clip_norm": 0.1}


# ---- Participation ---------------------------------------------------------------------------------------------------


def shortest_gap(present_TxN: np.ndarray) -> int:
    """The fewest steps between two turns of an example."""
    return min(int(np.diff(np.flatnonzero(turns)).min(initial=10**9)) for turns in present_TxN.T)


def test_nobody_is_sampled_twice_in_as_many_steps_as_there_are_bands() -> None:
    mechanism = DPSGD(noise_multiplier=1.0, noise_strategy=square_root(BANDS), **(RUN | {"expected_batch_size": 200.0}))
    turns = included(mechanism.sampling(5), 80)
    assert shortest_gap(turns) == BANDS  # with probability 0.8 in each turn, some take two in a row
    assert shortest_gap(included(PoissonSampling(300, 0.2, 300, seed=5), 80)) == 1
    assert shortest_gap(included(PoissonSampling(300, 0.2, 300, seed=5, num_groups=BANDS - 1), 80)) == BANDS - 1


def test_turns_are_independent_draws_of_the_right_probability() -> None:
    """The groups are uniform, and a member is in the batch with probability b q, whatever it was in before."""
    sampling = PoissonSampling(4000, 0.1, 4000, seed=8, num_groups=BANDS)
    sizes = np.bincount(sampling.groups, minlength=BANDS)
    assert stats.chisquare(sizes).pvalue > 1e-6
    turns = included(sampling, 2 * BANDS)
    for group in range(BANDS):
        first, second = (turns[step][sampling.groups == group] for step in (group, group + BANDS))
        table = np.array([[np.sum(first & second), np.sum(first & ~second)], [np.sum(~first & second), 0]])
        table[1, 1] = sizes[group] - table.sum()
        expected = sizes[group] * np.outer([0.4, 0.6], [0.4, 0.6])
        assert stats.chi2.sf(((table - expected) ** 2 / expected).sum(), 4) > 1e-6


def test_one_example_more_moves_nobody_else() -> None:
    fewer, more = (PoissonSampling(size, 0.2, 300, seed=5, num_groups=BANDS) for size in (199, 200))
    np.testing.assert_array_equal(included(fewer, 20), included(more, 20)[:, :199])


def test_one_group_is_poisson_sampling_bit_for_bit() -> None:
    plain, one = PoissonSampling(300, 0.2, 90, seed=5), PoissonSampling(300, 0.2, 90, seed=5, num_groups=1)
    for step in range(5):
        np.testing.assert_array_equal(plain.indices(step), one.indices(step))
    with pytest.raises(ValueError, match="num_groups must be at least 1, at most 1 / sampling_probability = 5"):
        PoissonSampling(300, 0.2, 90, seed=5, num_groups=6)


# ---- What the denoisers see of noise alone ---------------------------------------------------------------------------

SHAPE = (160, 240)


def top_over_edge(mechanism: DPSGD, moment: bool, level: float | optax.Schedule | None = None) -> np.ndarray:
    """``y_1 / e`` at every step of a run on gradients of zero."""
    transform = mechanism.denoised_adam() if moment else mechanism.denoiser()
    if level is not None:
        transform = (scale_by_denoised_adam if moment else denoise_matrices)(level)
    noise, zeros = mechanism.noise(jax.random.key(11)), {"kernel": jnp.zeros(SHAPE)}

    @jax.jit
    def step(noise_state, state):
        noisy, noise_state = noise.update(zeros, noise_state)
        _, state = transform.update(noisy, state, zeros)
        return noise_state, state

    noise_state, state, found = noise.init(zeros), transform.init(zeros), []
    for _ in range(mechanism.num_steps):
        noise_state, state = step(noise_state, state)
        found.append(float(getattr(state, "denoise", state).diagnostics["kernel"].top_over_edge[0]))
    return np.array(found)


@pytest.mark.parametrize("moment", [False, True], ids=["gradient", "moment"])
def test_noise_alone_stands_at_the_edge_in_every_step(moment: bool) -> None:
    """The largest value of 160 x 240 noise is .987 of the edge, with a standard deviation of .012 (Johnstone 2001)."""
    mechanism = DPSGD(noise_multiplier=1.5, noise_strategy=square_root(BANDS), **RUN)
    found = top_over_edge(mechanism, moment)
    assert np.abs(found - 0.987).max() < 5 * 0.012
    # What the levels of independent noise would say: too much in a gradient, and too little left in the moment.
    level = mechanism.noise_level
    wrong = top_over_edge(mechanism, moment, level.std if not moment else lambda step: level(step))
    assert np.abs(wrong - 0.987).max() > 0.1


def test_muon_knows_the_noise_of_its_momentum() -> None:
    mechanism = DPSGD(noise_multiplier=1.5, noise_strategy=square_root(BANDS), **RUN)
    muon = muon_bc(0.1, mechanism.noise_level, optax.sgd(0.1), beta=0.9)
    noise, zeros = mechanism.noise(jax.random.key(12)), {"kernel": jnp.zeros((32, 48))}
    noise_state, state, momentum = noise.init(zeros), muon.init(zeros), np.zeros((32, 48))
    update = jax.jit(muon.update)
    for _ in range(STEPS):
        noisy, noise_state = noise.update(zeros, noise_state)
        _, state = update(noisy, state, zeros)
        momentum = 0.9 * momentum + np.asarray(noisy["kernel"])
        said = float(optax.tree.get(state, "noise_std"))
        assert momentum.std() == pytest.approx(said, rel=5 / math.sqrt(2 * momentum.size))


# ---- Audits ----------------------------------------------------------------------------------------------------------

STRATEGY, NOISE, DELTA, RUNS = square_root(3), 1.5, 1e-3, 40_000
LENGTH = 6


def participations(num_groups: int) -> np.ndarray:
    """The steps in which the one example takes part, at the highest probability: all turns of the first group."""
    sampling = next(
        sampling
        for seed in range(1000)
        if (sampling := PoissonSampling(1, 1 / num_groups, 1, seed, num_groups)).groups[0] == 0
    )
    return included(sampling, LENGTH)[:, 0]


def audited(turns: np.ndarray, strategy: BandedToeplitz = STRATEGY) -> float:
    """The bound of the best attack on the released gradients of one coordinate, where the example's are all 1."""
    noise = add_correlated_noise(NOISE * strategy.column_norm, strategy, jax.random.key(0))
    whitened = np.zeros((LENGTH, LENGTH), np.float32)  # C, by its definition
    for k, c in enumerate(strategy.coefficients):
        whitened += c * np.eye(LENGTH, k=-k, dtype=np.float32)
    direction = whitened @ turns

    @jax.jit
    @jax.vmap
    def score(words: jax.Array, is_in: jax.Array) -> jax.Array:
        state = noise.init(jnp.zeros(1))
        state = state._replace(white=state.white._replace(key=words))
        released = []
        for turn in turns:
            noisy, state = noise.update(jnp.full(1, turn * is_in), state)
            released.append(noisy[0])
        return direction @ whitened @ jnp.stack(released)

    words = np.random.SeedSequence(5).generate_state(4 * RUNS, np.uint32).reshape(2, RUNS, 2)
    scores = [np.asarray(score(words[side], jnp.full(RUNS, float(side)))) for side in (0, 1)]
    return bound(scores[1], scores[0])


def bound(scores_in: np.ndarray, scores_out: np.ndarray) -> float:
    tuning = len(scores_in) // 10
    threshold, _ = lower_bounds.best_threshold(scores_in[:tuning], scores_out[:tuning], delta=DELTA)
    counted = lower_bounds.count(scores_in[tuning:], scores_out[tuning:], threshold)
    return lower_bounds.repeated_runs_epsilon(counted, delta=DELTA)


def proven() -> float:
    mechanism = DPSGD(
        num_examples=3,
        expected_batch_size=1.0,
        num_steps=LENGTH,
        noise_multiplier=NOISE,
        l2_clip_norm=1.0,
        noise_strategy=STRATEGY,
    )
    claimed = mechanism.epsilon(LENGTH, DELTA)
    assert claimed == pytest.approx(
        accounting.epsilon(noise_multiplier=NOISE, delta=DELTA, sampling_probability=1.0, num_steps=2), rel=1e-3
    )
    return claimed


def test_an_audit_lies_below_the_proven_epsilon_and_above_it_with_the_typical_mistakes() -> None:
    right = audited(participations(STRATEGY.bands))
    assert 0.6 * proven() < right < proven()
    # The band one too short: two groups for three bands. And sampling as if the noise were independent.
    assert audited(participations(STRATEGY.bands - 1)) > proven()
    assert audited(participations(1)) > proven()
    # The same example twice in a window, once in the run.
    assert audited(np.array([1, 1, 0, 1, 0, 0])) > proven()


def test_a_history_that_is_lost_on_resume_gives_the_noise_away() -> None:
    """A step that is repeated without the noise before it: the difference of the two releases is that noise."""
    noise = add_correlated_noise(NOISE * STRATEGY.column_norm, STRATEGY, jax.random.key(0))

    def attacked(keeps_history: bool) -> float:
        @jax.jit
        @jax.vmap
        def score(words: jax.Array, is_in: jax.Array) -> jax.Array:
            state = noise.init(jnp.zeros(1))
            state = state._replace(white=state.white._replace(key=words))
            first, saved = noise.update(jnp.full(1, is_in), state)
            once, _ = noise.update(jnp.zeros(1), saved)
            lost = saved._replace(earlier=jax.tree.map(jnp.zeros_like, saved.earlier))
            again, _ = noise.update(jnp.zeros(1), saved if keeps_history else lost)
            c_1 = STRATEGY.coefficients[1] / STRATEGY.coefficients[0]
            return (first - (again - once) / c_1)[0]

        words = np.random.SeedSequence(6).generate_state(4 * RUNS, np.uint32).reshape(2, RUNS, 2)
        return bound(*(np.asarray(score(words[side], jnp.full(RUNS, float(side)))) for side in (1, 0)))

    assert attacked(keeps_history=True) < proven()
    assert attacked(keeps_history=False) > 2 * proven()
    assert math.isfinite(attacked(keeps_history=False))
