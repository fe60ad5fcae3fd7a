"""Beam search as in transformers (5.x), with the same candidates, the same scores and the same end."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dp_rmt.generation.methods import Beam, Generated
from dp_rmt.generation.repetition import without_repeats
from dp_rmt.generation.token_by_token import Cache, Step, is_end, log_probabilities


class _Open(NamedTuple):
    """Continuations that go on, the best first."""

    tokens_BxKxT: jax.Array
    scores_BxK: jax.Array
    """Sums of log-probabilities; -inf where there is no continuation."""


class _Ended(NamedTuple):
    """Continuations that have ended, the best first."""

    tokens_BxKxT: jax.Array
    scores_BxK: jax.Array
    normalised_BxK: jax.Array
    """The normalised scores; -inf where there is no continuation."""
    lengths_BxK: jax.Array


class _State(NamedTuple):
    step: jax.Array
    last_BxK: jax.Array
    open: _Open
    ended: _Ended
    is_open_B: jax.Array
    cache: Cache


def beam_search(
    step: Step,
    cache: Cache,
    reorder: Callable[[Cache, jax.Array], Cache],
    prompt_BxL: jax.Array,
    mask_BxL: jax.Array,
    method: Beam,
) -> Generated:
    """Keeps each row's `num_beams` best continuations, until no open one could beat those that have ended.

    Args:
        step: the model, which reads one token of each of R = B * num_beams beams; those of a row stand side by side.
        cache: the cache of all tokens of the prompts but the last, for each beam.
        reorder: ``(cache, parents_BxK) -> cache``, after which beam k of row b is what beam parents[b, k] of the row
          was.
        prompt_BxL: token ids, padded on the left.
        mask_BxL: 1 for a token, 0 for padding. A row of padding alone is not a prompt and gets no token.
        method: gives the sizes and the end tokens.

    Returns:
        The best continuation of each row. Its length is 0 and its score -inf where `no_repeat_ngram_size` left none.
    """
    rows, beams, length = len(prompt_BxL), method.num_beams, method.max_new_tokens
    prompt_RxL, mask_RxL = (jnp.repeat(x, beams, axis=0) for x in (prompt_BxL, mask_BxL))

    def is_open(state: _State) -> jax.Array:
        return (state.step < length) & jnp.any(state.is_open_B)

    def extend(state: _State) -> _State:
        logits_RxV, cache = step(state.last_BxK.reshape(-1), state.cache)
        tokens_RxT = state.open.tokens_BxKxT.reshape(-1, length)
        allowed_RxV = without_repeats(
            logits_RxV, prompt_RxL, mask_RxL, tokens_RxT, state.step, size=method.no_repeat_ngram_size
        )
        candidates, parents_BxC, last_BxC = _best_candidates(state, logits_RxV, allowed_RxV, method)
        is_end_BxC = is_end(last_BxC, method.end_tokens) | (state.step == length - 1)
        open_scores_BxK, chosen_BxK = jax.lax.top_k(jnp.where(is_end_BxC, -jnp.inf, candidates.scores_BxK), beams)
        still_open = _Open(_take(candidates.tokens_BxKxT, chosen_BxK), open_scores_BxK)
        ended = _end(state, candidates, is_end_BxC, method)
        return _State(
            step=state.step + 1,
            last_BxK=_take(last_BxC, chosen_BxK),
            open=still_open,
            ended=ended,
            is_open_B=state.is_open_B & _could_improve(still_open, ended, state.step + 1, method),
            cache=reorder(cache, _take(parents_BxC, chosen_BxK)),
        )

    nothing_BxK = jnp.full((rows, beams), -jnp.inf, jnp.float32)
    empty_BxKxT = jnp.full((rows, beams, length), method.fill_token, jnp.int32)
    ended = jax.lax.while_loop(
        is_open,
        extend,
        _State(
            step=jnp.int32(0),
            last_BxK=prompt_RxL[:, -1].astype(jnp.int32).reshape(rows, beams),
            # All beams begin alike, so only the first counts.
            open=_Open(empty_BxKxT, nothing_BxK.at[:, 0].set(0.0)),
            ended=_Ended(empty_BxKxT, nothing_BxK, nothing_BxK, jnp.zeros((rows, beams), jnp.int32)),
            is_open_B=jnp.any(mask_BxL != 0, axis=1),
            cache=cache,
        ),
    ).ended
    return Generated(
        ended.tokens_BxKxT[:, 0], ended.lengths_BxK[:, 0], ended.scores_BxK[:, 0], ended.normalised_BxK[:, 0]
    )


def _best_candidates(
    state: _State, logits_RxV: jax.Array, allowed_RxV: jax.Array, method: Beam
) -> tuple[_Open, jax.Array, jax.Array]:
    """Finds the C best continuations by one token, best first; C is so large that num_beams of them do not end.

    Returns:
        The continuations, the beam that each comes from, (B, C), and its last token, (B, C).
    """
    rows, beams = state.last_BxK.shape
    count = max(2, 1 + len(method.end_tokens)) * beams
    # The best of a row are among the best of each beam, so only the log-probabilities of those are needed.
    logits_RxN, ids_RxN = jax.lax.top_k(allowed_RxV, min(count, allowed_RxV.shape[1]))
    gained_RxN = jnp.where(logits_RxN != -jnp.inf, log_probabilities(logits_RxV, ids_RxN), -jnp.inf)
    scores_BxKxN = state.open.scores_BxK[:, :, None] + gained_RxN.reshape(rows, beams, -1)
    per_beam = scores_BxKxN.shape[2]
    scores_BxC, chosen_BxC = jax.lax.top_k(scores_BxKxN.reshape(rows, -1), count)
    parents_BxC = chosen_BxC // per_beam
    last_BxC = jnp.take_along_axis(ids_RxN.reshape(rows, -1), chosen_BxC, axis=1)
    tokens_BxCxT = jax.lax.dynamic_update_slice_in_dim(
        _take(state.open.tokens_BxKxT, parents_BxC), last_BxC[:, :, None], state.step, axis=2
    )
    return _Open(tokens_BxCxT, scores_BxC), parents_BxC, last_BxC


def _end(state: _State, candidates: _Open, is_end_BxC: jax.Array, method: Beam) -> _Ended:
    """The best of what had ended and of what ends now, if the latter is among the num_beams best candidates."""
    beams = method.num_beams
    scores_BxK, length = candidates.scores_BxK[:, :beams], state.step + 1
    # A complete row takes nothing more, though it is still computed while others go on.
    ends_BxK = is_end_BxC[:, :beams] & state.is_open_B[:, None]
    normalised_BxK = jnp.where(ends_BxK, scores_BxK / length.astype(jnp.float32) ** method.length_penalty, -jnp.inf)
    new = _Ended(
        candidates.tokens_BxKxT[:, :beams], scores_BxK, normalised_BxK, jnp.full(scores_BxK.shape, length, jnp.int32)
    )
    both = _Ended(*(jnp.concatenate(pair, axis=1) for pair in zip(state.ended, new)))
    _, best_BxK = jax.lax.top_k(both.normalised_BxK, beams)
    return _Ended(*(_take(x, best_BxK) for x in both))


def _could_improve(still_open: _Open, ended: _Ended, length: jax.Array, method: Beam) -> jax.Array:
    """Tells whether a row's best open continuation could replace its worst ended one, as `early_stopping` judges."""
    if method.early_stopping is True:
        return jnp.any(ended.normalised_BxK == -jnp.inf, axis=1)
    if method.early_stopping == "never" and method.length_penalty > 0:
        length = jnp.int32(method.max_new_tokens)
    best_B = still_open.scores_BxK[:, 0] / length.astype(jnp.float32) ** method.length_penalty
    return best_B > jnp.min(ended.normalised_BxK, axis=1)


def _take(values_BxKx: jax.Array, chosen_BxC: jax.Array) -> jax.Array:
    """Takes some of each row's beams."""
    return jax.vmap(lambda values, chosen: values[chosen])(values_BxKx, chosen_BxC)
