"""The bits that noise is made of: 64 for each entry of an array, of Threefry or of ChaCha20."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl

from dp_rmt.threefry import threefry2x32

NoiseGenerator = Literal["threefry2x32", "chacha20"]

_CONSTANTS = np.frombuffer(b"expand 32-byte k", np.uint32)
_DRAW, _FOLD, _SPLIT = 0, 1, 2
"""What a block is for, a word of its nonce, so that no block is used for two things."""
_BLOCK = 16  # words of 32 bits


def chacha20_block(key: jax.Array, counter: jax.Array, nonce: Sequence[jax.Array | int]) -> list[jax.Array]:
    """The ChaCha20 block function (RFC 8439, section 2.3), for many blocks at once.

    Args:
      key: 256 bits as eight uint32.
      counter: number of the block, uint32 of any shape.
      nonce: three uint32 that broadcast to that shape.

    Returns:
      The sixteen words of each block, in the order of the RFC, as arrays of the counter's shape.

    >>> words = chacha20_block(jnp.zeros(8, jnp.uint32), jnp.uint32(0), (0, 0, 0))
    >>> f"{int(words[0]):08x}"  # RFC 8439, appendix A.1, test vector 1
    'ade0b876'
    """
    parts = [*_CONSTANTS, *(key[i] for i in range(8)), counter, *nonce]
    first = tuple(jnp.broadcast_to(jnp.asarray(part, jnp.uint32), counter.shape) for part in parts)

    def two_rounds(_: int, words: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        state = list(words)
        for shift in (0, 1):  # columns, then diagonals
            for j in range(4):
                _quarter_round(state, *(4 * i + (j + i * shift) % 4 for i in range(4)))
        return tuple(state)

    # A loop: written out, the twenty rounds of each leaf of a model take XLA minutes.
    last = jax.lax.fori_loop(0, 10, two_rounds, first)
    return [x + y for x, y in zip(first, last, strict=True)]


def _quarter_round(state: list[jax.Array], a: int, b: int, c: int, d: int) -> None:
    for left, right in ((16, 12), (8, 7)):
        state[a] = state[a] + state[b]
        state[d] = _rotated(state[d] ^ state[a], left)
        state[c] = state[c] + state[d]
        state[b] = _rotated(state[b] ^ state[c], right)


def _rotated(word: jax.Array, by: int) -> jax.Array:
    return word << by | word >> (32 - by)


def _draw(key: jax.Array, shape: Sequence[int], num_words: int) -> list[jax.Array]:
    """`num_words` words for each entry of an array, 16 / num_words neighbours of a column sharing a block.

    A block is elementwise in its number, so that an array that is divided along other axes, or along this one by whole
    blocks, is drawn where it is needed.
    """
    sizes, sharing = tuple(shape) or (1,), _BLOCK // num_words
    whole = [axis for axis, size in enumerate(sizes) if size % sharing == 0]
    axis = whole[0] if whole else sizes.index(max(sizes))
    blocks = (*sizes[:axis], -(-sizes[axis] // sharing), *sizes[axis + 1 :])
    high, low = positions(blocks)
    words = chacha20_block(key, low, (_DRAW, high, 0))
    filled = (*sizes[:axis], blocks[axis] * sharing, *sizes[axis + 1 :])
    drawn = [jnp.stack(words[k::num_words], axis + 1).reshape(filled) for k in range(num_words)]
    return [jax.lax.slice_in_dim(part, 0, sizes[axis], axis=axis).reshape(tuple(shape)) for part in drawn]


def _random_bits(key: jax.Array, bit_width: int, shape: Sequence[int]) -> jax.Array:
    if bit_width == 64:
        high, low = (part.astype(jnp.uint64) for part in _draw(key, shape, 2))
        return high << 32 | low
    return _draw(key, shape, 1)[0].astype(f"uint{bit_width}")


def _fold_in(key: jax.Array, data: Any) -> jax.Array:
    return jnp.stack(chacha20_block(key, jnp.asarray(data, jnp.uint32), (_FOLD, 0, 0))[:8])


def _split(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    high, low = positions(tuple(shape))
    return jnp.stack(chacha20_block(key, low, (_SPLIT, high, 0))[:8], axis=-1)


def _seed(seed: jax.Array) -> jax.Array:
    """Of `jax.random.key(seed, impl=CHACHA20)`, which keeps 32 bits of a seed whatever the generator."""
    return jnp.zeros(8, jnp.uint32).at[0].set(jax.lax.convert_element_type(seed, jnp.uint32))


CHACHA20 = define_prng_impl(
    key_shape=(8,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="chacha20",
    tag="chacha20",
)
"""ChaCha20 for JAX's keys: ``jax.random.wrap_key_data(words, impl=CHACHA20)`` goes into every function of `jax.random`.

Bits, ``fold_in`` and ``split`` are blocks under the key, with nonces that differ. Whoever does not know the key of 256
bits cannot tell them from chance, unless ChaCha20 is broken. They are integers computed entry by entry, so that they
are the same on every backend and mesh, and under `jax.vmap`."""

_SPECS: dict[str, Any] = {"threefry2x32": "threefry2x32", "chacha20": CHACHA20}


def key_of_seed(seed: int, generator: NoiseGenerator) -> jax.Array:
    """The key of a seed in [0, 2^128).

    Threefry's key has 64 bits of the seed, by NumPy's `SeedSequence`. ChaCha20's is the SHA-256 of the seed, so that it
    takes 2^128 attempts to find.
    """
    if generator == "chacha20":
        words = np.frombuffer(hashlib.sha256(b"dp_rmt noise" + seed.to_bytes(16, "little")).digest(), "<u4")
    else:
        words = np.random.SeedSequence(seed).generate_state(2, np.uint32)
    return key_of_words(jnp.asarray(words), generator)


def key_of_words(words: jax.Array, generator: NoiseGenerator) -> jax.Array:
    """The typed key with these data."""
    return jax.random.wrap_key_data(words, impl=_SPECS[generator])


def generator_of(key: Any) -> NoiseGenerator:
    """The generator of a key that noise can be made of.

    Raises:
      ValueError: it is no typed key, not one key, or one of another generator.
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ValueError(f"key must be a typed key such as noise_key(seed), got {key!r}")
    if key.shape != ():
        raise ValueError(f"key must be one key such as noise_key(seed), got an array of keys of shape {key.shape}")
    for generator in get_args(NoiseGenerator):
        if str(jax.random.key_impl(key)) == generator:
            return generator
    raise ValueError(
        f"key must be a threefry2x32 key or a chacha20 key such as noise_key(seed), got one of "
        f"{jax.random.key_impl(key)!r}: bits of other generators may depend on the backend and the mesh, and a run "
        "that is resumed elsewhere would release a step again with other noise"
    )


def words_of_entries(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The 64 bits of every entry as two uint32.

    Args:
      key: one typed key, of `generator_of`'s.
      shape: the shape of both.
    """
    data = jax.random.key_data(key)
    if generator_of(key) == "chacha20":
        high, low = _draw(data, shape, 2)
    else:  # one Threefry hash of the entry's position gives both
        high, low = threefry2x32(data, *positions(shape))
    return high, low


def positions(shape: tuple[int, ...], words: int = 2**32) -> tuple[jax.Array, jax.Array]:
    """A pair of uint32 for each entry, no pair twice: the block, of at most `words` entries, and the place in it."""
    split = 0
    while math.prod(shape[split:]) > words:
        split += 1
    if math.prod(shape[:split]) > words or max(shape, default=0) > words:
        raise ValueError(
            f"standard_normal: shape {shape} has an axis of more than {words} entries, or more than {words} blocks of "
            "as many: divide the array into several"
        )
    return _linear_index(shape, range(split)), _linear_index(shape, range(split, len(shape)))


def _linear_index(shape: tuple[int, ...], axes: range) -> jax.Array:
    """Row-major index over some axes, broadcast over the others. XLA divides iotas among devices without sending."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in axes:
        stride = math.prod(shape[axis + 1 : axes.stop])
        index += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index
