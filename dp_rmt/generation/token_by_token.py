"""Decoding with one continuation for each row: greedy decoding and sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dp_rmt.generation.methods import Generated, Method, Sampling
from dp_rmt.generation.repetition import without_repeats

Cache = Any
Step = Callable[[jax.Array, Cache], tuple[jax.Array, Cache]]
"""A function ``(tokens_R, cache) -> (logits_RxV, cache)`` that reads one token of each row."""
Choose = Callable[[jax.Array, jax.Array], jax.Array]
"""A function ``(logits_BxV, step) -> tokens_B`` that chooses the next token of each row."""


class _State(NamedTuple):
    step: jax.Array
    last_B: jax.Array
    tokens_BxT: jax.Array
    has_ended_B: jax.Array
    lengths_B: jax.Array
    scores_B: jax.Array
    cache: Cache


def token_by_token(
    step: Step, cache: Cache, prompt_BxL: jax.Array, mask_BxL: jax.Array, choose: Choose, method: Method
) -> Generated:
    """Appends the chosen token to each row, until all rows have ended.

    Args:
        step: the model.
        cache: the cache of all tokens of the prompts but the last.
        prompt_BxL: token ids, padded on the left.
        mask_BxL: 1 for a token, 0 for padding; a row of padding alone is no prompt and gets no token.
        choose: chooses the next token of each row.
        method: its sizes, its end tokens.

    Returns:
        What was generated.
    """

    def is_open(state: _State) -> jax.Array:
        return (state.step < method.max_new_tokens) & ~jnp.all(state.has_ended_B)

    def append(state: _State) -> _State:
        logits_BxV, cache = step(state.last_B, state.cache)
        allowed_BxV = without_repeats(
            logits_BxV, prompt_BxL, mask_BxL, state.tokens_BxT, state.step, size=method.no_repeat_ngram_size
        )
        chosen_B = choose(allowed_BxV, state.step)
        last_B = jnp.where(state.has_ended_B, method.fill_token, chosen_B).astype(jnp.int32)
        gained_B = log_probabilities(logits_BxV, chosen_B[:, None])[:, 0]
        return _State(
            step=state.step + 1,
            last_B=last_B,
            tokens_BxT=jax.lax.dynamic_update_slice_in_dim(state.tokens_BxT, last_B[:, None], state.step, axis=1),
            has_ended_B=state.has_ended_B | is_end(last_B, method.end_tokens),
            lengths_B=state.lengths_B + ~state.has_ended_B,
            scores_B=state.scores_B + jnp.where(state.has_ended_B, 0.0, gained_B),
            cache=cache,
        )

    rows = len(prompt_BxL)
    final = jax.lax.while_loop(
        is_open,
        append,
        _State(
            step=jnp.int32(0),
            last_B=prompt_BxL[:, -1].astype(jnp.int32),
            tokens_BxT=jnp.full((rows, method.max_new_tokens), method.fill_token, jnp.int32),
            has_ended_B=~jnp.any(mask_BxL != 0, axis=1),
            lengths_B=jnp.zeros(rows, jnp.int32),
            scores_B=jnp.zeros(rows, jnp.float32),
            cache=cache,
        ),
    )
    return Generated(final.tokens_BxT, final.lengths_B, final.scores_B, final.scores_B)


def most_probable(logits_BxV: jax.Array, step: jax.Array) -> jax.Array:
    """The greedy choice, which takes the first of equals."""
    del step
    return jnp.argmax(logits_BxV, axis=-1)


def draw(logits_BxV: jax.Array, step: jax.Array, *, method: Sampling, key: jax.Array, rows_B: jax.Array) -> jax.Array:
    """Samples tokens, by the largest of log-probability plus Gumbel noise (Gumbel 1954).

    Args:
        logits_BxV: logits of the next token; -inf for tokens that may not come.
        step: how many tokens have been generated so far.
        method: temperature, top_k and top_p; its seed is not used.
        key: the key of the seed.
        rows_B: the number of each row, which gets the same draws in any batch.

    Returns:
        Token ids, (B,).
    """
    scaled, ids = logits_BxV / method.temperature, None
    if method.top_k or method.top_p < 1:
        vocab_size = logits_BxV.shape[1]
        scaled, ids = jax.lax.top_k(scaled, min(method.top_k or vocab_size, vocab_size))
        scaled = jnp.where(_smallest_set(jax.nn.softmax(scaled), method.top_p), scaled, -jnp.inf)
    noise = jax.vmap(
        lambda row: jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, row), step), scaled.shape[1:])
    )(rows_B)
    chosen_B = jnp.argmax(scaled + noise, axis=-1)
    return chosen_B if ids is None else jnp.take_along_axis(ids, chosen_B[:, None], axis=1)[:, 0]


def _smallest_set(probabilities_BxK: jax.Array, total: float) -> jax.Array:
    """Marks the fewest first ones of descending probabilities that have the total."""
    before_BxK = jnp.cumsum(probabilities_BxK, axis=-1) - probabilities_BxK
    return before_BxK < total


def is_end(tokens: jax.Array, end_tokens: tuple[int, ...]) -> jax.Array:
    """Tells whether each token ends its row.

    >>> is_end(jnp.array([5, 2, 7]), (2, 7)).tolist()
    [False, True, True]
    """
    return jnp.isin(tokens, jnp.array(end_tokens, jnp.int32)) if end_tokens else jnp.zeros(tokens.shape, bool)


def log_probabilities(logits_RxV: jax.Array, tokens_RxC: jax.Array) -> jax.Array:
    """Computes log softmax(logits) of some tokens of each row, (R, C), without that of the others."""
    largest_Rx1 = jnp.max(logits_RxV, axis=-1, keepdims=True)
    total_Rx1 = jnp.sum(jnp.exp(logits_RxV - largest_Rx1), axis=-1, keepdims=True)
    return jnp.take_along_axis(logits_RxV, tokens_RxC, axis=1) - largest_Rx1 - jnp.log(total_Rx1)
