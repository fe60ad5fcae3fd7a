"""The law of user sampling: users are Poisson, and the rows of a sampled user are a uniform subset, anew in each step.

Statistics, seeds and the threshold are those of `test_sampler`; wrong samplers end far beyond it.
"""

from __future__ import annotations

import runpy
import time
from pathlib import Path

import numpy as np
import pytest

from dp_rmt.batch_selection import PoissonSampling, UserSampling, bounded_rows, number_users

SAMPLER = runpy.run_path(str(Path(__file__).parent / "test_sampler.py"))
THRESHOLD, CHECKS = SAMPLER["THRESHOLD"], SAMPLER["CHECKS"]
NUM_USERS, PROBABILITY, NUM_STEPS, ROWS_PER_USER = 40, 0.15, 3000, 3
# User u has 1 + u % 8 rows, and the rows of all users are mixed up.
OWNERS = np.random.default_rng(0).permutation(np.repeat(np.arange(NUM_USERS), 1 + np.arange(NUM_USERS) % 8))


@pytest.fixture(scope="module")
def sampling():
    return UserSampling(OWNERS, PROBABILITY, NUM_USERS, ROWS_PER_USER, seed=1)


@pytest.fixture(scope="module")
def included(sampling):
    """Bool (steps, rows): the rows of each step, checked for all that must hold of each line."""
    present = np.zeros((NUM_STEPS, len(OWNERS)), bool)
    sizes = np.bincount(OWNERS)
    for step in range(NUM_STEPS):
        lines = sampling.indices(step)
        assert lines.shape == (NUM_USERS, ROWS_PER_USER)
        assert lines.dtype == np.int32
        real = [line[line >= 0] for line in lines]
        users = [int(OWNERS[rows[0]]) for rows in real if len(rows)]
        assert len({*users}) == len(users) == sum(len(rows) > 0 for rows in real[: len(users)])
        for rows, line in zip(real, lines):
            if len(rows):
                assert (OWNERS[rows] == OWNERS[rows[0]]).all()
                assert (np.diff(rows) > 0).all()
                assert len(rows) == min(ROWS_PER_USER, sizes[OWNERS[rows[0]]])
                np.testing.assert_array_equal(line[: len(rows)], rows)
        present[step, np.concatenate(real)] = True
    return present


def users_of(present_TxR: np.ndarray) -> np.ndarray:
    """Bool (steps, users)."""
    return np.stack([present_TxR[:, user == OWNERS].any(axis=1) for user in range(NUM_USERS)], axis=1)


@pytest.mark.parametrize("check", CHECKS)
def test_users_are_poisson_samples(check, included):
    assert abs(check(users_of(included), PROBABILITY)) < THRESHOLD


def row_scores(present_TxR: np.ndarray) -> dict[str, float]:
    """Given its user was sampled, each of n > k rows is there with probability k / n, whoever and whenever else.

    By row, by pairs of rows of a user (k (k - 1) / (n (n - 1)) for a uniform subset), and from one sampling of the user
    to its next. Each is a sum of independent terms of known variance, so standard normal but for the pairs of one step,
    which are taken one pair at a time.
    """
    sizes, k = np.bincount(OWNERS), ROWS_PER_USER
    by_row, by_pair, by_time = [], [], []
    for user in np.flatnonzero(sizes > k):
        n, rows = sizes[user], np.flatnonzero(user == OWNERS)
        sampled = present_TxR[present_TxR[:, rows].any(axis=1)][:, rows].astype(float)
        p, times = k / n, len(sampled)
        by_row += list((sampled.sum(0) - times * p) / np.sqrt(times * p * (1 - p)))
        pair = k * (k - 1) / (n * (n - 1))
        together = (sampled.T @ sampled)[np.triu_indices(n, 1)]
        by_pair += list((together - times * pair) / np.sqrt(times * pair * (1 - pair)))
        by_time += list(((sampled[1:] - p) * (sampled[:-1] - p)).sum(0) / (p * (1 - p) * np.sqrt(times - 1)))
    return {name: float(np.abs(scores).max()) for name, scores in
            {"row": by_row, "pair": by_pair, "time": by_time}.items()}  # fmt: skip


def test_rows_of_a_user_are_a_uniform_subset_in_each_step(included):
    """The largest of 155 and 430 standard normals stays below 5 but for one seed in 4,000."""
    assert max(row_scores(included).values()) < THRESHOLD


def wrong(kind: str) -> np.ndarray:
    """Rows by samplers with a mistake; users are drawn rightly."""
    rng, sizes = np.random.default_rng(3), np.bincount(OWNERS)
    present = np.zeros((NUM_STEPS, len(OWNERS)), bool)
    fixed = [rng.permutation(np.flatnonzero(user == OWNERS))[:ROWS_PER_USER] for user in range(NUM_USERS)]
    for step in range(NUM_STEPS):
        for user in np.flatnonzero(rng.random(NUM_USERS) < PROBABILITY):
            rows, take = np.flatnonzero(user == OWNERS), min(ROWS_PER_USER, sizes[user])
            start = rng.integers(len(rows))
            chosen = {
                "first": rows[:take],
                "once for all": fixed[user],
                "neighbours": np.roll(rows, start)[:take],
                "right": rng.permutation(rows)[:take],
            }[kind]
            present[step, chosen] = True
    return present


@pytest.mark.parametrize(("kind", "score"), [("first", "row"), ("once for all", "time"), ("neighbours", "pair")])
def test_scores_reject_wrong_choices_of_rows(kind, score):
    with np.errstate(divide="ignore"):
        assert row_scores(wrong(kind))[score] > 2 * THRESHOLD


def test_users_of_one_row_are_the_samples_of_examples():
    """Whatever their ids are, and whatever k is: the same rows in the same order."""
    ids = np.random.default_rng(1).permutation(500)
    for users in (ids, [f"customer {i}" for i in ids]):
        by_user = UserSampling(users, 0.1, 70, rows_per_user=8, seed=5)
        by_example = PoissonSampling(500, 0.1, 70, seed=5)
        for step in range(20):
            np.testing.assert_array_equal(by_user.indices(step), by_example.indices(step)[:, None])


def test_a_user_with_a_million_rows_is_one_user():
    """Sampled as often as another, with k rows of all its range, in no time; its rows never fill a batch."""
    users = np.append(np.zeros(1_000_000, np.int64), np.arange(1, 100))
    sampling = UserSampling(users, 0.2, 40, rows_per_user=4, seed=2)
    start, times, rows = time.process_time(), 0, []
    for step in range(400):
        lines = sampling.indices(step)
        assert lines.shape == (40, 4)
        of_user = lines[(lines >= 0).all(axis=1)]
        assert len(of_user) <= 1
        times += len(of_user)
        rows += of_user.ravel().tolist()
    assert abs(times - 80) / np.sqrt(400 * 0.2 * 0.8) < THRESHOLD
    assert len({*rows}) == len(rows)
    assert max(rows) > 900_000
    assert time.process_time() - start < 2


def test_the_stream_of_the_rows_is_no_step_of_anything_else():
    """`(seed, step, 0)`: never the words of another step, of the users' draw, or of the noise's key."""
    streams = set()
    for seed in (0, 5, 5 + (7 << 96), 2**128 - 1):
        streams.add(tuple(np.random.SeedSequence(seed).generate_state(2, np.uint32)))
        for step in (0, 1, 7, 2**32, 2**32 + 7, 7 << 32):
            of_step = np.random.SeedSequence(seed, spawn_key=(step,))
            streams.add(tuple(of_step.generate_state(2, np.uint32)))
            streams.add(tuple(of_step.spawn(1)[0].generate_state(2, np.uint32)))
    assert len(streams) == 4 * (1 + 2 * 6)
    first, again = (UserSampling([0, 0, 0, 0, 1], 1.0, 2, 2, seed=4) for _ in range(2))
    np.testing.assert_array_equal(first.indices(3), again.indices(3))
    assert any((first.indices(0) != first.indices(step)).any() for step in range(1, 6))


def test_bounded_rows_keeps_the_first_rows_of_each_user():
    kept = bounded_rows(OWNERS, ROWS_PER_USER)
    assert (np.diff(kept) > 0).all()
    for user in range(NUM_USERS):
        rows = np.flatnonzero(user == OWNERS)[:ROWS_PER_USER]
        np.testing.assert_array_equal(kept[OWNERS[kept] == user], rows)


@pytest.mark.parametrize("users", [[], [1.0, 2.0], ["ann", ""], [[1, 2]], [None, "ann"], [True, False]])
def test_rows_without_an_id_are_refused(users):
    with pytest.raises(ValueError, match="user"):
        number_users(users)
