"""Threefry, which is written out here: the published vectors, JAX's own words, and that nothing of it is kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.random import threefry2x32_p

from dp_rmt.noise_addition import add_gaussian_noise, noise_key
from dp_rmt.threefry import threefry2x32


# Random123 1.09, tests/kat_vectors: threefry2x32 with 20 rounds; counters, keys, expected words.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_published_vectors(counter, key, expected):
    words = threefry2x32(jnp.array(key, jnp.uint32), *(jnp.uint32(word) for word in counter))
    assert tuple(map(int, words)) == expected


def test_the_words_are_those_of_jax_for_any_key_and_counter():
    key, *counters = np.random.default_rng(0).integers(0, 2**32, (3, 1000), np.uint32)
    found = threefry2x32(jnp.asarray(key[:2]), *counters)
    for words, expected in zip(found, threefry2x32_p.bind(key[0], key[1], *counters), strict=True):
        np.testing.assert_array_equal(words, expected)


SHAPE, BYTES = (300, 512), 4 * 300 * 512


def compiled_update(transform):
    leaf = jnp.zeros(SHAPE)
    return jax.jit(transform.update).lower(leaf, transform.init(leaf)).compile()


def test_noise_is_added_in_one_pass_over_memory():
    """It reads the updates and writes them; with JAX's loop it kept 3 arrays as large and moved 16 times as much."""
    program = compiled_update(add_gaussian_noise(0.5, noise_key(0)))
    assert program.memory_analysis().temp_size_in_bytes < BYTES / 10
    assert program.cost_analysis()["bytes accessed"] < 2.1 * BYTES


def test_noise_is_drawn_once_for_both_moments_of_adam():
    """Both read the noisy gradient. XLA would draw the noise for each, and most of it four times, left to itself."""
    program = compiled_update(optax.chain(add_gaussian_noise(0.5, noise_key(0)), optax.scale_by_adam()))
    rounds_of_a_leaf = program.as_text().count(f" = u32[{SHAPE[0]},{SHAPE[1]}]{{1,0}} shift-left(")
    assert rounds_of_a_leaf == 20
    # Adam alone moves 9 times the leaf: 3 in, 3 out, and the moments again.
    assert program.cost_analysis()["bytes accessed"] < 11.1 * BYTES
