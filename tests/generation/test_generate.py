"""Decoding with a real decoder and its cache: nothing depends on the batch or on padding."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import pytest

from dp_rmt import models
from dp_rmt.generation import Beam, Generated, Greedy, Method, Sampling, generate
from dp_rmt.generation.generate import _compiled, in_compute_dtype

pytestmark = pytest.mark.thorough

EOS, VOCAB, LIMIT = 7, 24, 64
SIZES: Any = {"max_new_tokens": 12, "eos_token_id": EOS}
METHODS = {
    "greedy": Greedy(**SIZES),
    "beam": Beam(**SIZES, num_beams=3, length_penalty=0.8, no_repeat_ngram_size=3),
    "sampling": Sampling(**SIZES, seed=3, temperature=0.7, top_k=8, top_p=0.9),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@functools.cache
def decoder() -> Any:
    config = models.DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        intermediate_size=24,
        max_position_embeddings=LIMIT,
    )
    module = models.CausalLanguageModel(config)
    # Far from uniform, so that rounding decides nothing.
    params = jax.tree.map(lambda leaf: 8 * leaf, models.init_params(module, jax.random.key(1)))
    return module, params


def prompts(length: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Five of 9, 4, 1, 6 and 9 tokens, padded on the left to `length`."""
    rng = np.random.default_rng(0)
    ids, mask = np.zeros((2, 5, length), np.int32)
    for row, count in enumerate((9, 4, 1, 6, 9)):
        ids[row, length - count :] = rng.integers(0, VOCAB, count)
        mask[row, length - count :] = 1
    return ids, mask


def continued(mask_BxL: np.ndarray) -> np.ndarray:
    return np.pad(mask_BxL, ((0, 0), (0, SIZES["max_new_tokens"])), constant_values=1)


@functools.cache
def apply() -> Any:
    """The whole sequence at once, without a cache."""
    module, params = decoder()
    return functools.partial(jax.jit(module.apply), {"params": params})


@functools.cache
def reference(method: Method) -> Generated:
    return jax.tree.map(np.asarray, generate(*decoder(), *prompts(), method))


def assert_equal(found: Generated, expected: Generated) -> None:
    np.testing.assert_array_equal(found.tokens_BxT, expected.tokens_BxT)
    np.testing.assert_array_equal(found.lengths_B, expected.lengths_B)
    np.testing.assert_allclose(found.scores_B, expected.scores_B, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.normalised_scores_B, expected.normalised_scores_B, rtol=1e-4, atol=1e-4)


@each_method
def test_padding_changes_nothing(method: Method) -> None:
    ids, mask = prompts(14)
    ids = np.where(mask, ids, 5)  # nor what the padding is
    assert_equal(generate(*decoder(), ids, mask, method), reference(method))


@each_method
def test_the_batch_changes_nothing(method: Method) -> None:
    ids, mask = prompts()
    expected = reference(method)
    rows = np.array([3, 1, 3, 0])
    found = generate(*decoder(), ids[rows], mask[rows], method, rows_B=rows)
    assert_equal(found, Generated(*(array[rows] for array in expected)))


@each_method
def test_the_score_is_that_of_the_tokens_without_a_cache(method: Method) -> None:
    ids, mask = prompts()
    found = reference(method)
    whole = np.concatenate([ids, found.tokens_BxT], axis=1)
    is_token = np.arange(whole.shape[1]) < ids.shape[1] + found.lengths_B[:, None]
    logits = apply()(whole, continued(mask) * is_token)[:, ids.shape[1] - 1 : -1]
    gained = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), found.tokens_BxT[:, :, None], axis=2)[..., 0]
    scores = np.where(is_token[:, ids.shape[1] :], gained, 0).sum(axis=1)
    np.testing.assert_allclose(found.scores_B, scores, rtol=1e-4, atol=1e-4)
    for row, length in enumerate(found.lengths_B):
        tokens = found.tokens_BxT[row]
        assert EOS not in tokens[: length - 1]
        assert length == 12 or (tokens[length - 1 :] == EOS).all()
    assert 1 <= found.lengths_B.min() < 12 == found.lengths_B.max()  # some rows end, some do not


def test_greedy_is_greedy() -> None:
    """Every token is the most probable one after those before it, all read at once."""
    ids, mask = prompts()
    found = reference(METHODS["greedy"])
    whole = np.concatenate([ids, found.tokens_BxT], axis=1)
    logits = apply()(whole, continued(mask))
    best = np.asarray(logits).argmax(axis=-1)[:, ids.shape[1] - 1 : -1]
    is_generated = np.arange(12) < found.lengths_B[:, None]
    np.testing.assert_array_equal(best[is_generated], found.tokens_BxT[is_generated])


def test_seeds_share_a_program_and_differ() -> None:
    before = _compiled.cache_info().misses
    method = METHODS["sampling"]
    reference(method)
    programs = _compiled.cache_info().misses
    other = generate(*decoder(), *prompts(), dataclasses.replace(method, seed=4))
    assert _compiled.cache_info().misses == programs <= before + 1
    assert (np.asarray(other.tokens_BxT) != reference(method).tokens_BxT).any()


def test_half_precision_runs_with_float32_scores() -> None:
    module, params = decoder()
    half = models.CausalLanguageModel(dataclasses.replace(module.config, dtype="bfloat16"))
    found = generate(half, params, *prompts(), METHODS["greedy"])
    assert found.scores_B.dtype == np.float32
    assert np.isfinite(found.scores_B).all()


def test_matrices_rounded_beforehand_give_the_same_logits_bit_for_bit() -> None:
    module, params = decoder()
    half = models.CausalLanguageModel(dataclasses.replace(module.config, dtype="bfloat16"))
    # Norms that are not exact in bfloat16: they must stay as they are.
    params = jax.tree.map(lambda leaf: leaf * 1.001, params)
    rounded = in_compute_dtype(params, half.config.dtype)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(rounded)}
    assert dtypes == {"bfloat16", "float32"}
    expected, found = (jax.jit(half.apply)({"params": tree}, *prompts()) for tree in (params, rounded))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_the_loop_writes_into_the_cache_in_place() -> None:
    """The compiled program copies no cache inside of a loop; a copy at each token would cost as much as attention."""
    module, params = decoder()
    ids, mask = prompts()
    arguments = (params, jax.random.key(0), ids, mask != 0, np.arange(5, dtype=np.int32))
    program = _compiled(module, METHODS["greedy"], None).lower(*arguments).compile().as_text()
    cache = r"f32\[2,5,2,20,4\]\S*"  # layers, rows, heads, 9 + 12 - 1 tokens, width
    computations = re.split(r"\n(?=\S)", program)
    updates = [text for text in computations if re.search(rf"= {cache} dynamic-update-slice", text)]
    copies = [text for text in computations if re.search(rf"= {cache} copy\(", text)]
    assert len(updates) >= 2
    assert all(text.startswith("ENTRY") for text in copies)


def test_what_cannot_be_decoded_is_refused() -> None:
    module, params = decoder()
    ids, mask = prompts()
    method = METHODS["greedy"]
    with pytest.raises(ValueError, match="row 1 has padding behind a token"):
        generate(module, params, ids, np.where(np.arange(5)[:, None] == 1, mask[:, ::-1], mask), method)
    with pytest.raises(ValueError, match=r"9 tokens and 60 new ones are more than the 64.*shorten"):
        generate(module, params, ids, mask, Greedy(max_new_tokens=60))
    with pytest.raises(ValueError, match="eos_token_id 24 is not among the model's 24 tokens"):
        generate(module, params, ids, mask, Greedy(max_new_tokens=2, eos_token_id=(1, 24)))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Greedy, {"max_new_tokens": 0}, "Greedy: max_new_tokens is 0; give 1 or more"),
        (Greedy, {"max_new_tokens": 1, "no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        (Greedy, {"max_new_tokens": 1, "eos_token_id": -1}, "eos_token_id is -1"),
        (Sampling, {"max_new_tokens": 1, "seed": 0, "temperature": 0.0}, "temperature is 0.0; .* or use Greedy"),
        (Sampling, {"max_new_tokens": 1, "seed": 0, "top_k": -1}, "top_k is -1"),
        (Sampling, {"max_new_tokens": 1, "seed": 0, "top_p": 1.5}, "top_p is 1.5"),
        (Sampling, {"max_new_tokens": 1, "seed": 2**32}, "seed is 4294967296"),
        (Beam, {"max_new_tokens": 1, "num_beams": 0}, "num_beams is 0"),
        (Beam, {"max_new_tokens": 1, "num_beams": 2, "early_stopping": "always"}, "early_stopping is 'always'"),
    ],
)
def test_methods_refuse_what_is_out_of_range(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)
