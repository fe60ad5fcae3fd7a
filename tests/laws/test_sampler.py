"""The law of Poisson sampling: what the accountant assumes is what the sampler does.

Each check is a statistic that is standard normal under the law. Seeds are fixed, so the tests are
deterministic; the threshold of 5 would reject a right sampler for one seed in two million, and
`test_checks_reject_wrong_samplers` shows that known mistakes (batches of one size from a shuffle, a batch
used for two steps, one example favoured) end far beyond it.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from scipy import stats
from small_run import included

from dp_rmt.batch_selection import PoissonSampling
from dp_rmt.noise_addition import noise_key

NUM_EXAMPLES, PROBABILITY, NUM_STEPS = 60, 0.15, 4000
THRESHOLD = 5.0


def chi_square_score(statistic: float, degrees: int) -> float:
    """A chi-square statistic as a standard normal one (Wilson & Hilferty 1931)."""
    variance = 2 / (9 * degrees)
    return float((np.cbrt(statistic / degrees) - (1 - variance)) / np.sqrt(variance))


def inclusion_score(present_TxN: np.ndarray, q: float) -> float:
    """Each example is in a step with probability q."""
    num_steps, num_examples = present_TxN.shape
    scores = (present_TxN.sum(0) - num_steps * q) / np.sqrt(num_steps * q * (1 - q))
    return chi_square_score(float((scores**2).sum()), num_examples)


def batch_size_score(present_TxN: np.ndarray, q: float) -> float:
    """Batch sizes are Binomial(N, q): chi-square over sizes, tails pooled to at least 20 expected counts."""
    num_steps, num_examples = present_TxN.shape
    sizes = present_TxN.sum(1)
    expected = num_steps * stats.binom.pmf(np.arange(num_examples + 1), num_examples, q)
    common = np.flatnonzero(expected >= 20)
    first, last = common[0], common[-1]
    edges = np.array([0, *range(first + 1, last + 1), num_examples + 1])
    observed = np.histogram(sizes, edges)[0]
    pooled = np.add.reduceat(expected, edges[:-1])
    return chi_square_score(float(((observed - pooled) ** 2 / pooled).sum()), len(pooled) - 1)


def pair_score(present_TxN: np.ndarray, q: float) -> float:
    """Two examples are in the same step independently of each other: all correlations off the diagonal."""
    num_steps, num_examples = present_TxN.shape
    standard = (present_TxN - q) / np.sqrt(q * (1 - q))
    scores = (standard.T @ standard / np.sqrt(num_steps))[np.triu_indices(num_examples, 1)]
    # The spread (some pairs repel, others attract) and the mean (all repel a little, as in shuffling).
    mean = scores.sum() / np.sqrt(len(scores))
    spread = chi_square_score(float((scores**2).sum()), len(scores))
    return float(max(abs(mean), abs(spread)))


def step_score(present_TxN: np.ndarray, q: float) -> float:
    """Batches of different steps are independent: correlations of an example with itself at lags 1 to 10."""
    standard = (present_TxN - q) / np.sqrt(q * (1 - q))
    products = [standard[lag:] * standard[:-lag] for lag in range(1, 11)]
    return float(max(abs(product.sum()) / np.sqrt(product.size) for product in products))


CHECKS = [inclusion_score, batch_size_score, pair_score, step_score]


@pytest.fixture(scope="module", params=[0, 2**127 + 1])
def present(request):
    return included(PoissonSampling(NUM_EXAMPLES, PROBABILITY, NUM_EXAMPLES, request.param), NUM_STEPS)


@pytest.mark.parametrize("check", CHECKS)
def test_poisson_law(check, present):
    assert abs(check(present, PROBABILITY)) < THRESHOLD


def shuffled() -> np.ndarray:
    """The usual mistake: shuffle each epoch and cut into batches of one size."""
    rng = np.random.default_rng(0)
    size = int(NUM_EXAMPLES * PROBABILITY)
    present = np.zeros((NUM_STEPS, NUM_EXAMPLES), bool)
    order: list[int] = []
    for step in range(NUM_STEPS):
        if len(order) < size:
            order = rng.permutation(NUM_EXAMPLES).tolist()
        present[step, [order.pop() for _ in range(size)]] = True
    return present


def repeated() -> np.ndarray:
    """Another mistake: the sampler forgets the step every other time."""
    present = np.random.default_rng(0).random((NUM_STEPS, NUM_EXAMPLES)) < PROBABILITY
    present[1::2] = present[::2]
    return present


def skewed() -> np.ndarray:
    """One example in sixty is sampled twice as often."""
    q = np.full(NUM_EXAMPLES, PROBABILITY)
    q[0] *= 2
    return np.random.default_rng(0).random((NUM_STEPS, NUM_EXAMPLES)) < q


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (shuffled, batch_size_score),
        (shuffled, pair_score),
        (shuffled, step_score),
        (repeated, step_score),
        (skewed, inclusion_score),
    ],
)
def test_checks_reject_wrong_samplers(wrong, check):
    assert abs(check(wrong(), PROBABILITY)) > 3 * THRESHOLD


def test_seeds_are_independent():
    first, second = (
        included(PoissonSampling(NUM_EXAMPLES, PROBABILITY, NUM_EXAMPLES, seed), 1000) for seed in (10, 11)
    )
    products = (first - PROBABILITY) * (second - PROBABILITY) / (PROBABILITY * (1 - PROBABILITY))
    assert abs(products.sum()) / np.sqrt(products.size) < THRESHOLD


@pytest.mark.parametrize("seed", [0, 5, 2**128 - 1])
def test_no_sample_comes_again(seed):
    """Steps t and t + 2^k, k up to 40, and the first 2^13: two independent samples are equal with probability 2^-256.

    That the generators of a seed's first 2^32 steps are all different is certain: of one word, the step, NumPy's hash
    is invertible for a given seed, as it is in the seed's four words for a given step.
    """
    sampling = PoissonSampling(num_examples=256, sampling_probability=0.5, max_batch_size=256, seed=seed)
    starts = [0, 1, 1000, 4095, 2**20 + 3]
    steps = {start + (1 << k) for start in starts for k in range(41)} | {*starts, *range(2**13)}
    samples = {sampling.indices(step).tobytes() for step in steps}
    assert len(samples) == len(steps)


def test_seeds_that_share_words_with_a_step_or_with_the_noise_share_no_stream():
    """NumPy hashes the words of seed and step one after the other: longer seeds could stand for another seed's step.

    So 5 + 2^128 * 7 as a seed of the noise was the stream of step 7 of the sampler's seed 5; now it is refused.
    """
    step_7 = np.random.SeedSequence(5, spawn_key=(7,)).generate_state(2, np.uint32)
    np.testing.assert_array_equal(step_7, np.random.SeedSequence(5 + (7 << 128)).generate_state(2, np.uint32))
    seeds = [0, 5, 7, 5 + (7 << 32), 5 + (7 << 96), 7 << 32, 7 << 64, 7 << 96, (1 << 128) - 1]
    streams = {tuple(np.asarray(jax.random.key_data(noise_key(seed))).tolist()) for seed in seeds}
    steps = [0, 1, 5, 7, 2**32, 2**32 + 7, 7 << 32]
    for seed in seeds:
        for step in steps:  # the first words of the generator of a step, as `PoissonSampling.indices` makes it
            words = np.random.SeedSequence(seed, spawn_key=(step,)).generate_state(2, np.uint32)
            streams.add(tuple(words.tolist()))
    assert len(streams) == len(seeds) * (1 + len(steps))
    for refuses in (noise_key, functools.partial(PoissonSampling, 256, 0.5, 256)):
        with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^128\)"):
            refuses(5 + (7 << 128))


def test_truncation_keeps_a_uniform_subset():
    """Given the full sample, every one of its members stays with the same probability, wherever it stands."""
    full = PoissonSampling(num_examples=50, sampling_probability=0.5, max_batch_size=50, seed=1)
    short = PoissonSampling(num_examples=50, sampling_probability=0.5, max_batch_size=10, seed=1)
    kept_NxT = included(short, NUM_STEPS).T
    sampled_NxT = included(full, NUM_STEPS).T
    assert (kept_NxT <= sampled_NxT).all()
    sizes_T = sampled_NxT.sum(0)
    overflowing = sizes_T > 10  # all but about one step in a hundred thousand
    keep_T = np.where(overflowing, 10 / np.maximum(sizes_T, 10), 1.0)
    # Excess of each member of the sample over its probability to be kept, by example and by rank.
    excess_NxT = np.where(sampled_NxT, kept_NxT - keep_T, 0.0)
    variance_NxT = np.where(sampled_NxT, keep_T * (1 - keep_T), 0.0)
    rank_NxT = np.where(sampled_NxT, np.cumsum(sampled_NxT, 0) - 1, -1)
    by_example = excess_NxT.sum(1) / np.sqrt(variance_NxT.sum(1))
    ranks = [rank_NxT == rank for rank in range(15)]
    by_rank = np.array([excess_NxT[rank].sum() / np.sqrt(variance_NxT[rank].sum()) for rank in ranks])
    # The largest of 65 standard normals stays below 5 but for one seed in 26,000.
    assert np.abs(by_example).max() < THRESHOLD
    assert np.abs(by_rank).max() < THRESHOLD
    # Keeping the first ten, as a cut without the random choice would, leaves ranks 10 and above empty.
    assert kept_NxT[rank_NxT >= 10].sum() > 1000
