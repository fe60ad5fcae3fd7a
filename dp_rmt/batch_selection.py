"""Poisson sampling into batches of a fixed shape (NumPy).

Each step samples every example independently with the same probability, as the accounting says. Shuffling the data and
cutting it into batches is another mechanism with another guarantee. The batch of a step is a pure function of (seed,
step). Nothing is drawn ahead, so a resumed run sees the batches of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from dp_rmt.arguments import integer, real


def fresh_seed() -> int:
    """A 128-bit seed from the operating system's entropy. It tells who was sampled, so it is as secret as the data."""
    return secrets.randbits(128)


def max_batch_size_for(num_examples: int, sampling_probability: float, *, multiple_of: int = 1) -> int:
    """A batch shape that Poisson sampling hardly ever overflows: q N + 5 sqrt(q (1 - q) N), rounded up.

    Args:
      num_examples: examples in the data set, N.
      sampling_probability: probability with which a step samples each example, q in (0, 1].
      multiple_of: round up to a multiple of this, such as a microbatch size or a number of devices.

    Returns:
      The batch size in examples, a multiple of `multiple_of`. It never exceeds num_examples rounded up to that
      multiple.

    Raises:
      ValueError: an argument is out of its range.

    >>> max_batch_size_for(67_349, 1000 / 67_349, multiple_of=8)
    1160
    """
    num_examples, sampling_probability = _validated(num_examples, sampling_probability)
    multiple_of = integer("multiple_of", multiple_of, "be at least 1 and an integer", lambda n: n >= 1)
    mean = sampling_probability * num_examples
    std = math.sqrt(mean * (1 - sampling_probability))
    # The factor takes off a rounding error of q * N, which could otherwise cost a whole row or a whole multiple.
    size = min(num_examples, math.ceil((mean + 5 * std) * (1 - 1e-12)))
    return -(-size // multiple_of) * multiple_of


@dataclasses.dataclass(frozen=True)
class PoissonSampling:
    """Samples each example with probability `sampling_probability`, independently in each step.

    Of a sample of more than `max_batch_size` examples, a uniformly random subset of that size is kept. The accountant
    must be told of it (`accounting.Truncation`).

    With `num_groups` b above 1 this is cyclic Poisson sampling (Choquette-Choo et al. 2023, arXiv 2306.08153), which
    correlated noise needs. Each example is put into one of b groups for the whole run, uniformly and independently of
    all others, so that one example more moves nobody. Step t samples from group ``t mod b`` alone, with probability
    ``b sampling_probability``: no example is sampled twice in any b steps.

    ======================================  ==================================================
    edge case                               result
    ======================================  ==================================================
    nothing sampled                         all padding; the step still adds its noise
    more sampled than fit                   a uniformly random subset of `max_batch_size`
    max_batch_size above num_examples       at least the excess is padding
    sampling_probability = 1                all examples, in order
    num_groups = 1 / sampling_probability   all examples of the group, in order
    ======================================  ==================================================

    Args:
      num_examples: examples in the data set.
      sampling_probability: in (0, 1]; the mean over all steps.
      max_batch_size: length of every batch, in examples; see `max_batch_size_for`.
      seed: in [0, 2^128), see `fresh_seed`. It must not be the seed of the noise.
      num_groups: b, at most ``1 / sampling_probability``.

    Raises:
      ValueError: an argument is out of its range.

    >>> sampling = PoissonSampling(num_examples=10, sampling_probability=0.3, max_batch_size=6, seed=0)
    >>> sampling.indices(0)
    array([ 1,  4,  5, -1, -1, -1], dtype=int32)
    """

    num_examples: int
    sampling_probability: float
    max_batch_size: int
    seed: int
    num_groups: int = 1

    def __post_init__(self) -> None:
        num_examples, sampling_probability = _validated(self.num_examples, self.sampling_probability)
        object.__setattr__(self, "num_examples", num_examples)
        object.__setattr__(self, "sampling_probability", sampling_probability)
        size = integer("max_batch_size", self.max_batch_size, "be at least 1 and an integer", lambda n: n >= 1)
        object.__setattr__(self, "max_batch_size", size)
        wanted = "be in [0, 2^128), an integer; see fresh_seed()"
        object.__setattr__(self, "seed", integer("seed", self.seed, wanted, lambda n: 0 <= n < 2**128))
        wanted = f"be at least 1, at most 1 / sampling_probability = {1 / sampling_probability:.6g}, and an integer"
        most = 1 / sampling_probability + 1e-9  # a rounding error of the quotient is no group too many
        object.__setattr__(self, "num_groups", integer("num_groups", self.num_groups, wanted, lambda b: 1 <= b <= most))

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """The group of each example, for the whole run, int32 (num_examples,). It is as secret as the seed."""
        if self.num_groups == 1:
            return np.zeros(self.num_examples, np.int32)
        # The stream of (seed, 0, 0, 0). No step and no user's rows have these words; see `UserSampling.indices`.
        (of_groups,) = _entropy(self.seed, 0).spawn(1)[0].spawn(1)
        rng = np.random.Generator(np.random.Philox(of_groups))
        return rng.integers(self.num_groups, size=self.num_examples, dtype=np.int32)

    def indices(self, step: int) -> np.ndarray:
        """Returns the examples of one step.

        Args:
          step: number of the step, from 0.

        Returns:
          An int32 array (max_batch_size,): distinct indices in ascending order, then -1 for padding.

        Raises:
          ValueError: the step is negative.
        """
        rng = np.random.Generator(np.random.Philox(_entropy(self.seed, step)))
        is_sampled = rng.random(self.num_examples) < self.num_groups * self.sampling_probability
        if self.num_groups > 1:
            is_sampled &= self.groups == step % self.num_groups
        sampled = np.flatnonzero(is_sampled)
        if len(sampled) > self.max_batch_size:
            sampled = np.sort(rng.choice(sampled, self.max_batch_size, replace=False, shuffle=False))
        padded = np.full(self.max_batch_size, -1, np.int32)
        padded[: len(sampled)] = sampled
        return padded


@dataclasses.dataclass(frozen=True, eq=False)
class UserSampling:
    """Samples each user with probability `sampling_probability`, and at most `rows_per_user` of a sampled user's rows.

    Users are drawn as `PoissonSampling` draws examples, numbered by their first rows; with one row a user it is the
    same sample. The rows of a user are a uniformly random subset, drawn anew in each step and independently of who else
    is there. Their mean gradient is therefore an unbiased estimate of the mean over all rows of the user.

    ====================================  ==================================================
    edge case                             result
    ====================================  ==================================================
    a user has at most rows_per_user      all rows, in order
    a user has more                       a uniformly random subset, without repetition
    no user has that many                 the second axis is as long as the largest user
    more users sampled than fit           a uniformly random subset of `max_batch_size` users
    ====================================  ==================================================

    Args:
      users: an id for each row of the data, (rows,): integers or strings.
      sampling_probability: in (0, 1], of each user.
      max_batch_size: length of every batch, in users; see `max_batch_size_for`.
      rows_per_user: k, the most rows of a user in one step.
      seed: in [0, 2^128), see `fresh_seed`. It must not be the seed of the noise.

    Raises:
      ValueError: an argument is out of its range, or a row has no user.

    >>> sampling = UserSampling(["ann", "bob", "ann", "ann"], 1.0, max_batch_size=3, rows_per_user=2, seed=0)
    >>> sampling.indices(0)
    array([[ 0,  3],
           [ 1, -1],
           [-1, -1]], dtype=int32)
    """

    users: Sequence[Any] | np.ndarray
    sampling_probability: float
    max_batch_size: int
    rows_per_user: int
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "users", number_users(self.users))
        wanted = "be at least 1 and an integer"
        rows = integer("rows_per_user", self.rows_per_user, wanted, lambda n: n >= 1)
        object.__setattr__(self, "rows_per_user", min(rows, max(map(len, self._rows))))
        assert self._of_users  # its checks are this sampler's, too

    @functools.cached_property
    def _rows(self) -> list[np.ndarray]:
        """The rows of each user, ascending."""
        order = np.argsort(self.users, kind="stable").astype(np.int32)
        return np.split(order, np.cumsum(np.bincount(self.users))[:-1])

    @functools.cached_property
    def _of_users(self) -> PoissonSampling:
        return PoissonSampling(self.num_users, self.sampling_probability, self.max_batch_size, self.seed)

    @property
    def num_users(self) -> int:
        """How many users the data has."""
        return len(self._rows)

    def indices(self, step: int) -> np.ndarray:
        """Returns the rows of one step.

        Args:
          step: number of the step, from 0.

        Returns:
          An int32 array (max_batch_size, rows_per_user). Each line holds distinct rows of one user in ascending order,
          then -1 for padding; lines of users that were not sampled come last.

        Raises:
          ValueError: the step is negative.
        """
        sampled = self._of_users.indices(step)
        # The stream of (seed, step, 0). No step has these words, since the last word of a number is not zero.
        rng = np.random.Generator(np.random.Philox(_entropy(self.seed, step).spawn(1)[0]))
        chosen = np.full((len(sampled), self.rows_per_user), -1, np.int32)
        for line, user in enumerate(sampled[sampled >= 0]):
            of_user = self._rows[user]
            if len(of_user) > self.rows_per_user:
                of_user = of_user[np.sort(rng.choice(len(of_user), self.rows_per_user, replace=False, shuffle=False))]
            chosen[line, : len(of_user)] = of_user
        return chosen


def number_users(users: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Numbers users from 0 in the order of their first rows.

    Args:
      users: an id for each row, integers or strings.

    Returns:
      The number of each row's user, int32 (rows,).

    Raises:
      ValueError: there is no row, ids are not integers or strings, or a row has no id.

    >>> number_users(["bob", "ann", "bob"])
    array([0, 1, 0], dtype=int32)
    """
    ids = np.asarray(users)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iuUS":
        raise ValueError(
            f"users must be one integer or string for each row, all of one kind, got {ids.dtype} of shape {ids.shape}: "
            "give the id of the person whose row it is"
        )
    if ids.dtype.kind in "US" and not (present := np.char.str_len(ids) > 0).all():
        raise ValueError(
            f"row {int(np.argmin(present))} has no user: rows without an id would all count as one person's, or as "
            "many persons'. Give each row its person's id, or leave it out"
        )
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    numbers: np.ndarray = np.argsort(np.argsort(first))[inverse].astype(np.int32)
    return numbers


def bounded_rows(users: Sequence[Any] | np.ndarray, rows_per_user: int) -> np.ndarray:
    """The first rows of each user, at most so many, for training that protects examples.

    Data that is cut in this way has groups of at most `rows_per_user` rows, which
    `dp_rmt.accounting.epsilon_of_group` accounts for. What is kept of a user depends on no other user.

    Args:
      users: an id for each row.
      rows_per_user: how many rows of a user are kept, at least 1.

    Returns:
      The rows that are kept, ascending.

    Raises:
      ValueError: an argument is out of its range, or a row has no user.

    >>> bounded_rows(["ann", "bob", "ann", "ann"], 2)
    array([0, 1, 2])
    """
    most = integer("rows_per_user", rows_per_user, "be at least 1 and an integer", lambda n: n >= 1)
    numbers = number_users(users)
    order = np.argsort(numbers, kind="stable")
    starts = np.append(0, np.cumsum(np.bincount(numbers)))
    rank = np.arange(len(numbers)) - starts[numbers[order]]
    kept: np.ndarray = np.sort(order[rank < most])
    return kept


def microbatch_order(batch_size: int, microbatch_size: int) -> np.ndarray:
    """Says where to take each row from, so that consecutive rows form a microbatch.

    Microbatch j of M holds the rows j, j + M, j + 2M, ... of a batch (`optax.microbatching`).
    If the padding of a batch stands at its end, ``batch[order]`` has that padding in its last microbatches, where it
    costs nothing.

    Args:
      batch_size: rows; a multiple of microbatch_size.
      microbatch_size: rows of one microbatch.

    Returns:
      A permutation, (batch_size,).

    Raises:
      ValueError: microbatch_size does not divide batch_size.

    >>> microbatch_order(6, 2)
    array([0, 2, 4, 1, 3, 5])
    """
    if batch_size % microbatch_size:
        raise ValueError(
            f"microbatch_size {microbatch_size} does not divide the batch size {batch_size}: round "
            "max_batch_size up to a multiple (max_batch_size_for(..., multiple_of=microbatch_size))"
        )
    return np.arange(batch_size).reshape(-1, microbatch_size).T.reshape(-1)


def _entropy(seed: int, step: int) -> np.random.SeedSequence:
    """The entropy of a step, which has a counter-based generator of its own: steps are independent and need no order.

    NumPy hashes the four words of the seed and then those of the step. A seed of more words could collide with the step
    of another seed.
    """
    step = integer("step", step, "not be negative, and an integer", lambda n: n >= 0)
    return np.random.SeedSequence(entropy=seed, spawn_key=(step,))


def _validated(num_examples: int, sampling_probability: float) -> tuple[int, float]:
    wanted = "be at least 1, fit int32 and be an integer"
    return (
        integer("num_examples", num_examples, wanted, lambda n: 1 <= n < 2**31),
        real(
            "sampling_probability (batch size / data size)", sampling_probability, "be in (0, 1]", lambda q: 0 < q <= 1
        ),
    )
