"""Greedy decoding and sampling: the tokens, their probabilities, the end."""

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

from dp_rmt.generation import Generated, Greedy, Sampling
from dp_rmt.generation.token_by_token import draw, log_probabilities, most_probable, token_by_token

network = runpy.run_path(str(Path(__file__).with_name("recurrent.py")))
END, random_params = network["END"], network["random_params"]


@functools.partial(jax.jit, static_argnums=0)
def greedy(method: Greedy, params: Any, prompt_BxL: Any, mask_BxL: Any) -> Generated:
    hidden = jnp.zeros((len(prompt_BxL), network["WIDTH"]))
    return token_by_token(
        functools.partial(network["step"], params), hidden, prompt_BxL, mask_BxL, most_probable, method
    )


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_greedy_is_a_loop_of_argmax(seed: int) -> None:
    params, length = random_params(seed, 6, scale=1.0), 8
    firsts = np.array([1, 2, 3], np.int32)
    found = greedy(
        Greedy(max_new_tokens=length, eos_token_id=(END, 5), pad_token_id=4),
        params,
        firsts[:, None],
        np.ones((3, 1), np.int32),
    )
    for number, last in enumerate(firsts):
        hidden, tokens = np.zeros((1, network["WIDTH"]), np.float32), []
        while len(tokens) < length and not (tokens and tokens[-1] in (END, 5)):
            logits, hidden = network["step"](params, np.array([last]), hidden, np)
            last = int(logits[0].argmax())
            tokens.append(last)
        assert np.asarray(found.tokens_BxT)[number].tolist() == tokens + [4] * (length - len(tokens))
        assert found.lengths_B[number] == len(tokens)
        score = network["score"](params, int(firsts[number]), tuple(tokens))
        np.testing.assert_allclose(found.scores_B[number], score, rtol=2e-5, atol=2e-5)
        assert found.normalised_scores_B[number] == found.scores_B[number]


def test_the_loop_ends_with_the_last_row() -> None:
    """Counted by the cache: no step more than the longest row has tokens."""

    def step(tokens_R: Any, count: Any) -> Any:  # each token is followed by the next lower one
        return jax.nn.one_hot(jnp.maximum(tokens_R - 1, 0), 8), count + 1

    steps = []
    for last in (2, 4):

        @jax.jit
        def run(prompt: Any) -> Any:
            def choose(logits: Any, step: Any) -> Any:
                jax.debug.callback(lambda s: steps.append(int(s)), step)
                return most_probable(logits, step)

            method = Greedy(max_new_tokens=100, eos_token_id=0)
            return token_by_token(step, jnp.int32(0), prompt, jnp.ones((2, 1), jnp.int32), choose, method)

        steps.clear()
        found = jax.block_until_ready(run(np.array([[1], [last]], np.int32)))
        jax.effects_barrier()
        assert found.lengths_B.tolist() == [1, last]
        assert steps == list(range(last))


def test_a_row_of_padding_gets_no_token() -> None:
    mask = np.array([[1], [0]], np.int32)
    method = Greedy(max_new_tokens=4, eos_token_id=END, pad_token_id=3)
    found = greedy(method, random_params(1, 6), np.ones((2, 1), np.int32), mask)
    assert found.lengths_B[0] > 0
    assert found.lengths_B[1] == found.scores_B[1] == 0
    assert np.asarray(found.tokens_BxT)[1].tolist() == [3, 3, 3, 3]


@functools.partial(jax.jit, static_argnums=0)
def draws(method: Sampling, key: Any, logits_BxV: Any, step: Any) -> Any:
    return draw(logits_BxV, step, method=method, key=key, rows_B=jnp.arange(len(logits_BxV)))


def sample(logits_V: np.ndarray, count: int, *, step: int = 0, seed: int = 0, **options: Any) -> np.ndarray:
    logits_BxV = np.broadcast_to(logits_V.astype(np.float32), (count, len(logits_V)))
    return np.asarray(draws(Sampling(max_new_tokens=1, seed=0, **options), jax.random.key(seed), logits_BxV, step))


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.7}]
)
def test_frequencies_are_those_of_the_truncated_softmax(options: dict[str, Any]) -> None:
    logits, count = np.log([0.05, 0.4, 0.1, 0.3, 0.15]), 20_000
    scaled = logits / options.get("temperature", 1.0)
    probabilities = np.exp(scaled) / np.exp(scaled).sum()
    kept = np.zeros(5, bool)
    kept[np.argsort(-probabilities)[: options.get("top_k") or 5]] = True
    probabilities = np.where(kept, probabilities, 0) / probabilities[kept].sum()
    # top_p of what top_k leaves: 0.8 of all is {1, 3, 4}, 0.7 of the first four is {1, 3}.
    sizes = {0.8: 3, 0.7: 2}
    smallest = np.argsort(-probabilities)[: sizes.get(options.get("top_p", 1.0), 5)]
    expected = np.zeros(5)
    expected[smallest] = probabilities[smallest] / probabilities[smallest].sum()
    observed = np.bincount(sample(logits, count, **options), minlength=5)
    assert (observed[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = (((observed - count * expected) ** 2)[possible] / (count * expected[possible])).sum()
    assert chi_square < 25  # at most 4 degrees of freedom: exceeded with probability 5e-5, and the seed is fixed


@given(seed=st.integers(0, 10**6), top_p=st.sampled_from([0.1, 0.5, 0.9]))
@settings(max_examples=15, deadline=None)
def test_top_p_keeps_the_smallest_set(seed: int, top_p: float) -> None:
    logits = 2 * np.random.default_rng(seed).standard_normal(6)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-probabilities)
    size = int(np.argmax(np.cumsum(probabilities[order]) >= top_p)) + 1
    drawn = sample(logits, 1000, top_p=top_p)
    assert set(drawn) <= set(order[:size])
    # Enough draws to see all of the set that are not rare: a token of 3 % is missed with probability e^-30.
    assert {token for token in order[:size] if probabilities[token] > 0.03} <= set(drawn)


def test_top_k_of_one_is_greedy_and_draws_depend_on_seed_row_and_step_alone() -> None:
    logits = np.random.default_rng(0).standard_normal(50)
    assert set(sample(logits, 20, top_k=1, temperature=3.0)) == {int(logits.argmax())}
    reference = sample(logits, 200)
    np.testing.assert_array_equal(sample(logits, 70), reference[:70])
    for other in (sample(logits, 200, seed=1), sample(logits, 200, step=1), np.roll(reference, 1)):
        assert (other != reference).mean() > 0.5


def test_log_probabilities_do_not_overflow() -> None:
    logits = jnp.array([[1000.0, 999.0, -jnp.inf]])
    expected = [[-0.31326166, -1.3132616, -np.inf]]
    np.testing.assert_allclose(log_probabilities(logits, jnp.array([[0, 1, 2]])), expected, rtol=1e-6)
