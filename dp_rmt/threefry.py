"""The bits of the noise, written out so that XLA computes them where they are used and keeps none of them in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


@jax.jit
def threefry2x32(key: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011, section 3.3) of a pair of words for each entry.

    The words are those of ``jax.extend.random.threefry2x32_p``. On the CPU, JAX lowers that primitive to a loop, which
    writes both words of all entries to memory five times over and reads them again. Here the rounds stand in a row:
    XLA fuses them with what the words are made of and with what is made of them, on every backend.

    Args:
      key: two uint32.
      first: the first word of each entry, uint32.
      second: the second word, of the same shape.

    Returns:
      Both words, uint32 of that shape.

    >>> words = threefry2x32(jnp.zeros(2, jnp.uint32), jnp.zeros(1, jnp.uint32), jnp.zeros(1, jnp.uint32))
    >>> [f"{int(word[0]):08x}" for word in words]  # Random123, kat_vectors
    ['6b200159', '99ba4efe']
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = first + keys[0], second + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ (y << rotation | y >> (32 - rotation))
        x = x + keys[(group + 1) % 3]
        y = y + (keys[(group + 2) % 3] + jnp.uint32(group + 1))
    return x, y
