"""Excludes tokens that would repeat an n-gram."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def without_repeats(
    logits_RxV: jax.Array,
    prompt_RxL: jax.Array,
    mask_RxL: jax.Array,
    tokens_RxT: jax.Array,
    step: jax.Array,
    *,
    size: int,
) -> jax.Array:
    """Sets to -inf the logits of tokens that would complete an n-gram that prompt and continuation have (Fairseq).

    Args:
        logits_RxV: logits of the next token.
        prompt_RxL: token ids, padded on the left.
        mask_RxL: 1 for a token of the prompt, 0 for padding, which is in no n-gram.
        tokens_RxT: the continuations, of which the first `step` tokens exist.
        step: how many tokens have been generated so far.
        size: n; 0 for no rule.

    Returns:
        Logits, (R, V).

    >>> tokens = jnp.array([[3, 1, 0]])
    >>> without_repeats(jnp.zeros((1, 4)), jnp.array([[0, 3, 2, 1]]), jnp.ones((1, 4)), tokens, 1, size=2).tolist()
    [[0.0, 0.0, -inf, 0.0]]
    """
    if size == 0:
        return logits_RxV
    rows = len(tokens_RxT)
    # Padding goes in front, so that there always are last n - 1 tokens to take.
    front_RxN = jnp.zeros((rows, size - 1), tokens_RxT.dtype)
    history_RxS = jnp.concatenate([front_RxN, prompt_RxL, tokens_RxT], axis=1)
    is_generated_RxT = jnp.broadcast_to(jnp.arange(tokens_RxT.shape[1]) < step, tokens_RxT.shape)
    is_token_RxS = jnp.concatenate([front_RxN != 0, mask_RxL != 0, is_generated_RxT], axis=1)
    end = prompt_RxL.shape[1] + step  # where the last n - 1 tokens begin
    windows = history_RxS.shape[1] - size + 1
    repeats_RxW = is_token_RxS[:, :windows] & is_token_RxS[:, size - 1 :]  # then so are all tokens in between
    for offset in range(size - 1):
        last_Rx1 = jax.lax.dynamic_slice_in_dim(history_RxS, end + offset, 1, axis=1)
        repeats_RxW &= history_RxS[:, offset : offset + windows] == last_Rx1
    vocab_size = logits_RxV.shape[1]
    banned_RxW = jnp.where(repeats_RxW, history_RxS[:, size - 1 :], vocab_size)
    return logits_RxV.at[jnp.arange(rows)[:, None], banned_RxW].set(-jnp.inf, mode="drop")
