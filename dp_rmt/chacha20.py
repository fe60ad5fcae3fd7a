"""The ChaCha20 block function in JAX (Bernstein 2008; RFC 8439, section 2.3): keyed bits of cryptographic strength.

Only additions, exclusive ors and rotations of 32-bit words, for all blocks side by side: XLA fuses them into what uses
the bits, divides them among devices by position, and gives the same bits on every backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

KEY_WORDS = 8
"""Words of 32 bits of a key."""

WORDS_OF_BLOCK = 16
"""Words of 32 bits that one counter gives."""

_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"
_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def blocks(key: jax.Array, counter: jax.Array, nonce: Sequence[jax.Array | int]) -> list[jax.Array]:
    """The 16 words of every block.

    Args:
      key: uint32 (8,), secret.
      counter: uint32 of any shape, the number of each block.
      nonce: three uint32 scalars or arrays of that shape; no two uses of a key may share nonce and counter.

    Returns:
      16 arrays of uint32 in the shape of the counter.

    >>> words = blocks(jnp.zeros(8, jnp.uint32), jnp.uint32(0), (0, 0, 0))
    >>> hex(int(words[0]))
    '0xade0b876'
    """
    start = [jnp.uint32(word) for word in _CONSTANTS]
    start += [key[i] for i in range(KEY_WORDS)] + [counter] + [jnp.asarray(word, jnp.uint32) for word in nonce]
    start = [jnp.broadcast_to(word, jnp.shape(counter)) for word in start]

    def double_round(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        words = list(state)
        for quarter in (*_COLUMNS, *_DIAGONALS):
            _quarter_round(words, *quarter)
        return tuple(words)

    state = tuple(start)
    for number in range(10):
        state = double_round(number, state)
    return [a + b for a, b in zip(state, start, strict=True)]


def _quarter_round(words: list[jax.Array], a: int, b: int, c: int, d: int) -> None:
    """RFC 8439, section 2.1, in place."""
    for first, second, third, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        words[first] = words[first] + words[second]
        mixed = words[third] ^ words[first]
        words[third] = (mixed << bits) | (mixed >> (32 - bits))
