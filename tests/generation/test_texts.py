"""Texts for a data set: each row once, whatever the batches; resumed; refused before anything is generated."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from dp_rmt import models
from dp_rmt.generation import Beam, Greedy, Sampling, generate, generate_texts

WORDS = ["</s>", "the", "cat", "sat", "on", "a", "mat", "and", "ate", "red", "fish"]
LIMIT = 32


class Tokenizer:
    """Words by number, as much of transformers' tokenizers as generation needs."""

    eos_token_id: int | None = 0
    size = len(WORDS)

    def __len__(self) -> int:
        return self.size

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [WORDS.index(word) for word in text.split()]}

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return " ".join(WORDS[token] for token in ids if token)


PROMPTS = ["the cat", "a red fish sat on the mat", "fish", "the", "on a mat the cat ate a red fish and the mat", "and"]
METHOD = Sampling(max_new_tokens=6, seed=1)


@functools.cache
def decoder() -> Any:
    config = models.DecoderConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        intermediate_size=8,
        max_position_embeddings=LIMIT,
    )
    module = models.CausalLanguageModel(config)
    return module, jax.tree.map(lambda leaf: 8 * leaf, models.init_params(module, jax.random.key(0)))


def texts(method: Any = METHOD, prompts: Any = PROMPTS, tokenizer: Any = None, **options: Any) -> list[tuple[int, str]]:
    options = {"batch_size": 2, "prompt_lengths": (2, 8)} | options
    return list(generate_texts(*decoder(), tokenizer or Tokenizer(), prompts, method, **options))


@pytest.mark.thorough
def test_each_row_once_whatever_the_batches() -> None:
    found = texts()
    # 12 tokens, which no length holds; then 7, in a batch that is filled up; then the others.
    assert [row for row, _ in found] == [4, 1, 0, 2, 3, 5]
    assert sorted(texts(batch_size=3, prompt_lengths=(12,))) == sorted(found)
    ids, mask = np.zeros((2, 2, 8), np.int32)
    ids[0, 1:], mask[0, 1:] = Tokenizer()(PROMPTS[1])["input_ids"], 1
    alone = generate(*decoder(), ids, mask, dataclasses.replace(METHOD, eos_token_id=0), rows_B=[1, 0])
    tokens = np.asarray(alone.tokens_BxT)[0, : alone.lengths_B[0]].tolist()
    assert dict(found)[1] == " ".join(WORDS[token] for token in tokens if token)
    assert len({text for _, text in found}) > 1


def test_an_interrupted_run_resumes() -> None:
    found = generate_texts(*decoder(), Tokenizer(), PROMPTS, METHOD, batch_size=2, prompt_lengths=(2, 8))
    kept = dict([next(found) for _ in range(3)])
    rest = texts(done=kept)
    assert not kept.keys() & dict(rest).keys()
    assert kept | dict(rest) == dict(texts())
    assert texts(done=range(6)) == []


def test_prompts_may_be_token_ids() -> None:
    ids = [Tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    assert texts(prompts=ids) == texts()


def test_a_text_ends_at_the_end_token_of_the_method_or_else_of_the_tokenizer() -> None:
    prompts = ["the cat", "fish", "the", "and"]
    until_end = texts(prompts=prompts)
    last = WORDS.index(until_end[0][1].split()[1])
    assert texts(dataclasses.replace(METHOD, eos_token_id=0), prompts) == until_end
    cut = texts(dataclasses.replace(METHOD, eos_token_id=(0, last)), prompts)
    for (_, text), (_, whole) in zip(cut, until_end):
        before, word, _ = whole.partition(WORDS[last])
        assert text == before + word
    assert cut != until_end


def test_padded_length_leaves_room_for_what_is_new() -> None:
    """Of 32 positions 6 are for new tokens: prompts of up to 26, though a padded length of 30 was asked for."""
    assert len(texts(Greedy(max_new_tokens=6), ["the " * 20, "the " * 26], prompt_lengths=(30,))) == 2


@pytest.mark.parametrize("method", [Greedy(max_new_tokens=2), Beam(max_new_tokens=2, num_beams=2), METHOD])
def test_logits_that_are_not_numbers_write_no_text(method: Any) -> None:
    module, params = decoder()
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    found = generate_texts(module, broken, Tokenizer(), ["the cat", "fish"], method, batch_size=2, prompt_lengths=(2,))
    with pytest.raises(ValueError, match="the logits of 2 texts are NaN, the first for the prompt of row 0"):
        list(found)


@pytest.mark.parametrize(
    ("prompts", "tokenizer", "options", "message"),
    [
        (["the", "cat " * 40], {}, {}, "row 1 has 40 tokens, but the model has positions for 32; shorten it"),
        (["the", "cat " * 27], {}, {}, "row 1 has 27 tokens, which with max_new_tokens=6 .* to 5 or less"),
        (["the", ""], {}, {}, "row 1 has no token; begin it with one, such as the tokenizer's bos_token"),
        (["the"], {"eos_token_id": None}, {}, "neither the method nor the tokenizer has an end token"),
        (["the"], {"size": 12}, {}, "the tokenizer has 12 tokens, but the model 11"),
        (["the"], {}, {"batch_size": 0}, "batch_size 0 on 1 device"),
    ],
)
def test_bad_input_is_refused_before_anything_is_generated(
    prompts: list[str], tokenizer: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    other = Tokenizer()
    for name, value in tokenizer.items():
        setattr(other, name, value)
    with pytest.raises(ValueError, match=message):
        # The call, not the first row.
        generate_texts(*decoder(), other, prompts, METHOD, **{"batch_size": 2, "prompt_lengths": (4,)} | options)


def test_a_row_that_is_done_is_not_looked_at() -> None:
    assert [row for row, _ in texts(prompts=["the", ""], done={1})] == [0]
