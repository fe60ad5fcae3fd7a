"""Beam search on a model whose continuations can all be counted."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_rmt.generation import Beam, Generated, Greedy
from dp_rmt.generation.beam_search import beam_search
from dp_rmt.generation.token_by_token import most_probable, token_by_token

network = runpy.run_path(str(Path(__file__).with_name("recurrent.py")))
END, random_params = network["END"], network["random_params"]


@functools.partial(jax.jit, static_argnums=0)
def search(method: Beam, params: Any, prompt_BxL: Any, mask_BxL: Any) -> Generated:
    hidden = jnp.zeros((len(prompt_BxL) * method.num_beams, network["WIDTH"]))
    return beam_search(
        functools.partial(network["step"], params), hidden, network["reorder"], prompt_BxL, mask_BxL, method
    )


@functools.partial(jax.jit, static_argnums=0)
def greedy(method: Greedy, params: Any, prompt_BxL: Any, mask_BxL: Any) -> Generated:
    hidden = jnp.zeros((len(prompt_BxL), network["WIDTH"]))
    return token_by_token(
        functools.partial(network["step"], params), hidden, prompt_BxL, mask_BxL, most_probable, method
    )


def prompts(*last_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array(last_tokens, np.int32)[:, None]
    return ids, np.ones_like(ids)


def row(generated: Generated, number: int) -> tuple[int, ...]:
    return tuple(np.asarray(generated.tokens_BxT)[number, : int(generated.lengths_B[number])].tolist())


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.8, 2.0])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_as_many_beams_as_continuations_find_the_best(seed: int, length_penalty: float) -> None:
    vocab_size, length = 3, 3
    params = random_params(seed, vocab_size)
    method = Beam(max_new_tokens=length, eos_token_id=END, num_beams=vocab_size**length, length_penalty=length_penalty)
    found = search(method, params, *prompts(1, 2))
    for number, first in enumerate((1, 2)):
        scores = {
            tokens: network["score"](params, first, tokens)
            for tokens in network["all_continuations"](vocab_size, length)
        }
        normalised = {tokens: score / len(tokens) ** length_penalty for tokens, score in scores.items()}
        best = max(normalised.values())
        # By score: the two best may be equal to rounding, a few float32 units of sums of about ten.
        np.testing.assert_allclose(found.normalised_scores_B[number], best, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(normalised[row(found, number)], best, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(found.scores_B[number], scores[row(found, number)], rtol=2e-5, atol=2e-5)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_one_beam_is_greedy(seed: int) -> None:
    params, batch = random_params(seed, 6), prompts(1, 2, 3)
    sizes: Any = {"max_new_tokens": 7, "eos_token_id": (END, 4), "no_repeat_ngram_size": 3}
    expected = greedy(Greedy(**sizes), params, *batch)
    for method in (Beam(**sizes, num_beams=1, early_stopping=True), Beam(**sizes, num_beams=1, length_penalty=0.0)):
        found = search(method, params, *batch)
        np.testing.assert_array_equal(found.tokens_BxT, expected.tokens_BxT)
        np.testing.assert_array_equal(found.lengths_B, expected.lengths_B)
        np.testing.assert_allclose(found.scores_B, expected.scores_B, rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_a_score_is_that_of_the_tokens_and_rows_do_not_mix(seed: int) -> None:
    params = random_params(seed, 6, scale=1.0)
    method = Beam(max_new_tokens=6, eos_token_id=END, num_beams=3, length_penalty=0.9)
    together = search(method, params, *prompts(1, 2, 3, 4))
    alone = search(method, params, *prompts(3, 3, 3, 3))
    for number, first in enumerate((1, 2, 3, 4)):
        tokens = row(together, number)
        score = network["score"](params, first, tokens)
        np.testing.assert_allclose(together.scores_B[number], score, rtol=2e-5, atol=2e-5)
        normalised = score / len(tokens) ** 0.9
        np.testing.assert_allclose(together.normalised_scores_B[number], normalised, rtol=2e-5, atol=2e-5)
        assert (np.asarray(together.tokens_BxT)[number, len(tokens) :] == END).all()
    assert row(together, 2) == row(alone, 0) == row(alone, 3)


def test_never_stopping_early_finds_what_the_rule_of_thumb_misses() -> None:
    """Where long rows are favoured, an open beam may win that at its present length does not."""
    gains = []
    for seed in range(30):
        params = random_params(seed, 4, scale=1.0)
        scores = [
            search(
                Beam(
                    max_new_tokens=10, eos_token_id=END, num_beams=2, length_penalty=2.0, early_stopping=early_stopping
                ),
                params,
                *prompts(1, 2, 3),
            ).normalised_scores_B
            for early_stopping in (True, False, "never")
        ]
        gains.append(np.diff(scores, axis=0))
    assert np.min(gains) >= 0
    assert (np.max(gains, axis=(0, 2)) > 0.1).all()


def test_a_row_of_padding_ends_at_once_and_changes_nothing() -> None:
    params, (ids, mask) = random_params(0, 6), prompts(1, 2, 3)
    method = Beam(max_new_tokens=5, eos_token_id=END, num_beams=2, pad_token_id=5)
    expected = search(method, params, ids, mask)
    mask[1] = 0
    found = search(method, params, ids, mask)
    assert found.lengths_B[1] == 0
    assert found.scores_B[1] == -np.inf
    assert (np.asarray(found.tokens_BxT)[1] == 5).all()
    for number in (0, 2):
        assert row(found, number) == row(expected, number) != ()


def test_where_no_token_is_allowed_nothing_is_returned() -> None:
    """Two tokens, neither of which may come twice, and no end."""
    method = Beam(max_new_tokens=4, num_beams=2, no_repeat_ngram_size=1)
    found = search(method, random_params(0, 2), *prompts(1))
    assert found.lengths_B.tolist() == [0]
    assert found.scores_B.tolist() == [-np.inf]
