"""ChaCha20 as a generator of JAX keys: the vectors of RFC 8439, the same bits however drawn, no block twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.noise_addition import add_gaussian_noise, noise_key
from dp_rmt.random_bits import CHACHA20, chacha20_block, key_of_words, words_of_entries

ZERO = bytes(32)
# RFC 8439: section 2.3.2, and appendix A.1, test vectors 1 to 5, as (key, counter, nonce, block).
VECTORS = {
    "2.3.2": (
        bytes(range(32)),
        1,
        "000000090000004a00000000",
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    "A.1 #1": (
        ZERO,
        0,
        "000000000000000000000000",
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    "A.1 #2": (
        ZERO,
        1,
        "000000000000000000000000",
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    "A.1 #3": (
        bytes(31) + b"\x01",
        1,
        "000000000000000000000000",
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    "A.1 #4": (
        b"\x00\xff" + bytes(30),
        2,
        "000000000000000000000000",
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    "A.1 #5": (
        ZERO,
        0,
        "000000000000000000000002",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
}


def words(data):
    return jnp.asarray(np.frombuffer(data, "<u4"))


def block_of(key, counter, nonce):
    found = chacha20_block(words(key), jnp.uint32(counter), tuple(words(bytes.fromhex(nonce))))
    return np.asarray(jnp.stack(found)).astype("<u4").tobytes().hex()


@pytest.mark.parametrize("name", VECTORS)
def test_the_block_function_is_that_of_the_rfc(name):
    key, counter, nonce, block = VECTORS[name]
    assert block_of(key, counter, nonce) == block


def test_drawn_bits_are_the_key_stream():
    """Under a nonce of zeros; the sixteen words of a block lie side by side, and 64 bits are two of them."""
    key = key_of_words(words(ZERO), "chacha20")
    stream = VECTORS["A.1 #1"][3] + VECTORS["A.1 #2"][3]
    for shape in ((32,), (32, 1), (1, 32)):
        drawn = np.asarray(jax.random.bits(key, shape)).ravel()
        assert drawn.astype("<u4").tobytes().hex() == stream
    high, low = words_of_entries(key, (16,))
    assert np.asarray(jnp.stack([high, low], 1)).astype("<u4").tobytes().hex() == stream
    assert np.asarray(jax.random.bits(key, (5,))).astype("<u4").tobytes().hex() == stream[:40]  # the end is cut off
    np.testing.assert_array_equal(jax.random.bits(key, (7,), "uint8"), [0x76, 0xA0, 0x40, 0x53, 0xBD, 0xA0, 0xA8])
    with jax.enable_x64(True):
        assert int(jax.random.bits(key, (), "uint64")) == 0xADE0B876_903DF1A0


@pytest.mark.parametrize("shape", [(), (3,), (8,), (5, 7), (16, 5), (5, 16), (2, 3, 8), (0, 3), (8, 0)])
def test_no_two_entries_share_their_bits(shape):
    high, low = words_of_entries(noise_key(1, "chacha20"), shape)
    assert high.shape == low.shape == shape
    assert len(set(zip(np.ravel(high).tolist(), np.ravel(low).tolist(), strict=True))) == high.size


def test_bits_splits_and_folds_are_blocks_of_their_own():
    """No two of what a key gives share a block: the key of a step is not among the noise of another."""
    key = noise_key(1, "chacha20")
    folded = np.asarray(jax.vmap(lambda t: jax.random.key_data(jax.random.fold_in(key, t)))(jnp.arange(40)))
    parts = np.asarray(jax.random.key_data(jax.random.split(key, (4, 10)))).reshape(40, 8)
    drawn = np.asarray(jax.random.bits(key, (80 * 16,))).reshape(-1, 8)
    rows = np.concatenate([folded, parts, drawn])
    assert len(np.unique(rows)) == rows.size  # 32 bits each: by chance two of 1,920 words agree once in 2,300 keys


def test_bits_are_the_same_alone_mapped_scanned_and_compiled():
    keys = jax.random.split(noise_key(2, "chacha20"), 3)
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, 5), (6, 16))  # noqa: E731
    alone = np.stack([draw(key) for key in keys])
    np.testing.assert_array_equal(jax.vmap(draw)(keys), alone)
    np.testing.assert_array_equal(jax.jit(jax.vmap(draw))(keys), alone)
    np.testing.assert_array_equal(jax.lax.scan(lambda _, key: (None, draw(key)), None, keys)[1], alone)


def test_a_key_has_all_bits_of_its_seed():
    """All seeds that differ from 0 in one bit; and each word of the key follows the seed."""
    data = np.array([jax.random.key_data(noise_key(seed, "chacha20")) for seed in (0, *(2**k for k in range(128)))])
    assert data.shape == (129, 8)
    assert all(len(np.unique(data[:, j])) == 129 for j in range(8))
    assert [str(jax.random.key_impl(key)) for key in (noise_key(0), noise_key(0, "chacha20"))] == [
        "threefry2x32",
        "chacha20",
    ]
    assert str(jax.random.key_impl(jax.random.key(0, impl=CHACHA20))) == "chacha20"
    with pytest.raises(ValueError, match="generator must be one of threefry2x32, chacha20"):
        noise_key(0, "rbg")


def test_every_bit_of_the_key_matters_to_every_step():
    key, length = noise_key(5, "chacha20"), 4
    data = np.asarray(jax.random.key_data(key))
    flips = np.array([np.eye(8, dtype=np.uint32)[j] << np.uint32(k) for k in range(32) for j in range(8)])
    noise, zeros = add_gaussian_noise(1.0, key), jnp.zeros(length)
    state = noise.init(zeros)
    at = lambda t, key: noise.update(zeros, state._replace(step=t, key=key))[0]  # noqa: E731
    keys = jnp.asarray(np.concatenate([data[None], data ^ flips]))
    rows = jax.jit(jax.vmap(lambda key: jnp.stack([at(jnp.int32(t), key) for t in (0, 1)])))(keys)
    assert len({row.tobytes() for row in np.asarray(rows).reshape(-1, length)}) == 2 * 257
