"""No n-gram twice, against a search by hand."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_rmt.generation.repetition import without_repeats

VOCAB, PROMPT, NEW = 3, 6, 5


@functools.partial(jax.jit, static_argnames="size")
def banned(prompt, mask, tokens, step, size):
    return without_repeats(jax.numpy.zeros((len(prompt), VOCAB)), prompt, mask, tokens, step, size=size) < 0


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_bans_what_would_complete_an_ngram_that_is_there(data: st.DataObject, size: int) -> None:
    tokens = st.integers(0, VOCAB - 1)
    prompt = np.array(data.draw(st.lists(tokens, min_size=PROMPT, max_size=PROMPT)))
    padding = data.draw(st.integers(0, PROMPT - 1))
    new = np.array(data.draw(st.lists(tokens, min_size=NEW, max_size=NEW)))
    step = data.draw(st.integers(0, NEW - 1))
    mask = (np.arange(PROMPT) >= padding).astype(np.int32)
    history = [*prompt[padding:].tolist(), *new[:step].tolist()]
    there = {tuple(history[i : i + size]) for i in range(len(history) - size + 1)}
    expected = [
        len(history) >= size - 1 and (*history[len(history) - size + 1 :], token) in there for token in range(VOCAB)
    ]
    found = banned(prompt[None], mask[None], new[None], step, size)
    assert np.asarray(found)[0].tolist() == expected


def test_rows_are_on_their_own_and_zero_bans_nothing() -> None:
    prompt, tokens = np.array([[0, 1, 0], [2, 2, 1]]), np.zeros((2, 2), np.int32)
    assert np.asarray(banned(prompt, np.ones_like(prompt), tokens, 0, 2)).tolist() == [
        [False, True, False],
        [False, False, False],
    ]
    assert not banned(prompt, np.ones_like(prompt), tokens, 0, 0).any()
