"""No noise twice: not in two steps, however far apart, nor in two leaves, nor from two seeds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.noise_addition import add_gaussian_noise, noise_key, standard_normal
from dp_rmt.random_bits import positions, words_of_entries

LENGTH = 4  # entries looked at; by chance alone all four agree once in 2^100 pairs


def noise_of_steps(steps, key):
    """What is added at each of the steps, one row each; steps are 32-bit counters, the upper half wraps to negative."""
    noise, zeros = add_gaussian_noise(1.0, key), jnp.zeros(LENGTH)
    state = noise.init(zeros)
    steps = jnp.asarray(np.array(steps, np.uint32).view(np.int32))
    return np.asarray(jax.jit(jax.vmap(lambda t: noise.update(zeros, state._replace(step=t))[0]))(steps))


def num_distinct(rows):
    return len({row.tobytes() for row in rows})


def test_no_step_repeats_another():
    """Any period up to 10,000, and any power of two that a counter of fewer bits would have."""
    steps = {*range(10_000)} | {start + 2**k for start in (0, 1, 777) for k in range(32)} | {2**32 - 1}
    rows = noise_of_steps(sorted(steps), noise_key(0))
    assert num_distinct(rows) == len(steps)


def test_the_counter_of_steps_goes_on_past_its_sign():
    """After 2^31 - 1 comes a new number, not the same one again."""
    noise, zeros = add_gaussian_noise(1.0, noise_key(0)), jnp.zeros(LENGTH)
    state = noise.init(zeros)
    state, rows = state._replace(step=jnp.asarray(2**31 - 2, jnp.int32)), []
    for _ in range(4):
        updates, state = noise.update(zeros, state)
        rows.append(np.asarray(updates))
    assert num_distinct(rows) == 4


def test_leaves_of_one_shape_have_their_own_noise():
    noise, zeros = add_gaussian_noise(1.0, noise_key(0)), [jnp.zeros(LENGTH)] * 300
    assert num_distinct(np.asarray(noise.update(zeros, noise.init(zeros))[0])) == 300


def test_every_bit_of_the_key_matters_to_every_step():
    words = np.asarray(jax.random.key_data(noise_key(5)))
    flips = np.array([np.eye(2, dtype=np.uint32)[j] << np.uint32(k) for k in range(32) for j in (0, 1)])
    keys = jnp.asarray(np.concatenate([words[None], words ^ flips]))
    noise, zeros = add_gaussian_noise(1.0, noise_key(0)), jnp.zeros(LENGTH)
    state = noise.init(zeros)
    for step in (0, 1):
        at_step = state._replace(step=jnp.asarray(step))
        rows = jax.vmap(lambda key, at_step=at_step: noise.update(zeros, at_step._replace(key=key))[0])(keys)
        assert num_distinct(np.asarray(rows)) == 65


@pytest.mark.parametrize(("first", "second", "same"), [(41_780, 104_948, 0), (7_004, 34_429, 1)])
def test_a_key_has_64_bits_of_its_seed(first, second, same):
    """Two seeds whose keys agree in one word, found among 2^18; of 32 bits in all, the keys would be the same."""
    a, b = (np.asarray(jax.random.key_data(noise_key(seed))) for seed in (first, second))
    assert a[same] == b[same]
    assert a[1 - same] != b[1 - same]


def test_seeds_that_differ_in_high_bits_alone_have_other_keys():
    seeds = [0, *(2**k for k in range(128))]
    words = np.array([jax.random.key_data(noise_key(seed)) for seed in seeds])
    assert all(len(np.unique(words[:, j])) == len(seeds) for j in (0, 1))


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (4, 4), (3, 4, 5), (2, 3, 1, 8), (0, 3), (3, 0)])
def test_no_two_entries_share_a_position(shape):
    """Whatever the size of a block: 2^32 in earnest, 16 here."""
    for words in (16, 2**32):
        if max(shape, default=0) <= words:
            high, low = (np.asarray(part) for part in positions(shape, words))
            assert high.shape == low.shape == shape
            assert max(high.max(initial=0), low.max(initial=0)) < words
            assert len(set(zip(high.ravel().tolist(), low.ravel().tolist(), strict=True))) == high.size


def test_the_words_are_those_of_jax():
    """One hash gives 64 bits; `jax.random.bits` is their exclusive or. Either setting of partitionable Threefry."""
    for partitionable in (True, False):
        with jax.threefry_partitionable(partitionable):
            drawn = standard_normal(noise_key(0), (4,))
        np.testing.assert_array_equal(drawn, standard_normal(noise_key(0), (4,)))
    for shape in ((), (5,), (3, 4, 5)):
        key = noise_key(1)
        high, low = words_of_entries(key, shape)
        with jax.threefry_partitionable(True):
            np.testing.assert_array_equal(high ^ low, jax.random.bits(key, shape, "uint32"))


def test_leaves_of_more_than_a_word_of_entries():
    """Shapes alone: 2^33 entries. The upper word counts rows where the lower one would start again."""
    shape = (2**20, 2**13)
    assert jax.eval_shape(lambda key: standard_normal(key, shape), noise_key(0)).shape == shape
    corners = jax.jit(lambda: [part[:: 2**20 - 1, :: 2**13 - 1] for part in positions(shape)]).lower().compile()
    assert corners.memory_analysis().temp_size_in_bytes < 10**6  # XLA computes the corners alone; all would be 64 GB
    high, low = (np.asarray(part, np.int64) for part in corners())
    np.testing.assert_array_equal(high, [[0, 0], [2**20 - 1, 2**20 - 1]])
    np.testing.assert_array_equal(low, [[0, 2**13 - 1], [0, 2**13 - 1]])
    for wrong in ((2**33,), (2**31, 2**31, 4)):
        with pytest.raises(ValueError, match="divide the array"):
            jax.eval_shape(lambda key, wrong=wrong: standard_normal(key, wrong), noise_key(0))
