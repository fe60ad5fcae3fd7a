"""Reading a prompt at once, in pieces or token by token is the same."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt import models

LENGTH = 9
PIECES = {"at once": [9], "in pieces": [4, 1, 3, 1], "token by token": [1] * 9}


@functools.cache
def build() -> tuple[Any, Any]:
    config = models.DecoderConfig(
        vocab_size=30,
        hidden_size=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    module = models.CausalLanguageModel(config)
    params = models.init_params(module, jax.random.key(0))
    rng = np.random.default_rng(0)
    return module, jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32), params)


@functools.cache
def apply(module: Any) -> Any:
    return jax.jit(module.apply, static_argnames="last_only")


def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Without padding, padded on the left, on the right, on both sides, nothing but padding."""
    index, starts, ends = np.arange(LENGTH), np.array([0, 3, 0, 2, 0])[:, None], np.array([9, 9, 5, 7, 0])[:, None]
    ids = np.random.default_rng(1).integers(0, 30, (5, LENGTH))
    return ids, ((starts <= index) & (index < ends)).astype(np.int32)


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_a_prompt_in_pieces_has_the_logits_of_the_whole(pieces: list[int]) -> None:
    module, params = build()
    ids, mask = prompts()
    expected = np.asarray(apply(module)({"params": params}, ids, mask))
    cache = models.init_cache(module.config, len(ids), 12)
    shapes, start, logits = jax.tree.map(jnp.shape, cache), 0, []
    for size in pieces:
        part = slice(start, start + size)
        some, cache = apply(module)({"params": params}, ids[:, part], mask[:, part], cache)
        logits.append(some)
        start += size
        assert int(cache.length) == start
    assert jax.tree.map(jnp.shape, cache) == shapes
    np.testing.assert_array_equal(cache.mask_BxS, np.pad(mask, ((0, 0), (0, 3))))
    together = np.concatenate(logits, axis=1)
    np.testing.assert_allclose(together[mask == 1], expected[mask == 1], rtol=0, atol=2e-5)
    assert np.isfinite(together).all()


def test_rows_of_the_cache_can_be_reordered() -> None:
    """As beams do: the batch is axis 1 of keys and values, and axis 0 of the mask."""
    module, params = build()
    ids, mask = prompts()
    order = np.array([3, 1, 1, 0, 2])
    _, cache = apply(module)({"params": params}, ids, mask, models.init_cache(module.config, len(ids), 12))
    moved = cache._replace(keys=cache.keys[:, order], values=cache.values[:, order], mask_BxS=cache.mask_BxS[order])
    token, one = np.full((5, 1), 7), np.ones((5, 1), np.int32)
    expected, _ = apply(module)({"params": params}, token, one, cache)
    logits, _ = apply(module)({"params": params}, token, one, moved)
    np.testing.assert_allclose(logits, np.asarray(expected)[order], rtol=0, atol=1e-5)


def test_the_last_token_s_logits_alone() -> None:
    module, params = build()
    ids, mask = prompts()
    whole = apply(module)({"params": params}, ids, mask)
    last = apply(module)({"params": params}, ids, mask, last_only=True)
    assert last.shape == (5, 1, 30)
    np.testing.assert_allclose(last, whole[:, -1:], rtol=0, atol=1e-5)


@pytest.mark.thorough
def test_the_cache_is_in_the_compute_dtype() -> None:
    module, params = build()
    module = models.CausalLanguageModel(dataclasses.replace(module.config, dtype=jnp.bfloat16))
    cache = models.init_cache(module.config, 1, 4)
    assert cache.keys.shape == cache.values.shape == (3, 1, 2, 4, 6)
    _, cache = module.apply({"params": params}, np.array([[3, 4]]), np.array([[1, 1]]), cache)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16


@pytest.mark.thorough
def test_generation_goes_without_flash_attention() -> None:
    """Which would be refused here, where there is no GPU."""
    module, params = build()
    ids, mask = prompts()
    plain, flash = (
        models.CausalLanguageModel(dataclasses.replace(module.config, dtype="bfloat16", flash_attention=on))
        for on in (False, True)
    )
    expected, found = (
        apply(m)({"params": params}, ids, mask, models.init_cache(m.config, len(ids), 12))[0] for m in (plain, flash)
    )
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="flash_attention is cuDNN's"):
        flash.apply({"params": params}, ids, mask)


def test_what_does_not_fit_is_refused() -> None:
    module, params = build()
    with pytest.raises(ValueError, match="a cache of 17 tokens, but this model has positions for 16; shorten the pro"):
        models.init_cache(module.config, 1, 17)
    with pytest.raises(ValueError, match="5 tokens for a cache of 4; give init_cache a larger max_length"):
        module.apply(
            {"params": params}, np.ones((1, 5), int), np.ones((1, 5), int), models.init_cache(module.config, 1, 4)
        )
