"""Turns rows of text into arrays of one fixed shape with any Hugging Face fast tokenizer, and caches them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from dp_rmt.data.readers.glue import Examples
from dp_rmt.data.readers.glue_tasks import Infilling
from dp_rmt.data.tokens.infilling import infilling_rows
from dp_rmt.data.tokens.token_cache import Tokenized, cache_key, read_or_build
from dp_rmt.data.tokens.token_rows import check_is_fast, log_truncation, pad_right


def tokenize_classification(
    examples: Examples, tokenizer: Any, *, max_length: int, infilling: Infilling | None = None
) -> dict[str, np.ndarray]:
    """Tokenises sentences, or pairs of them, and pads on the right to `max_length`.

    Longer rows are cut. In a pair, the longer text loses tokens first. In a prompt, only the texts are cut, and never
    the prompt's own words or its mask. The fraction of cut rows is logged.

    Args:
        examples: N text rows.
        tokenizer: a fast tokenizer of `transformers`.
        max_length: L, tokens per row, special tokens included.
        infilling: writes each row into this prompt; None gives the tokenizer's own layout, [CLS] text [SEP].

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` (zeros where the tokenizer has none), each (N, L)
        int32; `label`, (N,) int32, or float32 for regression, if there are labels; with `infilling` also
        `mask_position`, (N,) int32.

    Raises:
        ValueError: there are no examples, the tokenizer has no pad (or mask) token, or `max_length` has no room for
            text.
    """
    arrays, num_truncated = _tokenize(examples, tokenizer, max_length, infilling)
    log_truncation(num_truncated, len(examples), max_length)
    return arrays


def tokenize_cached(
    examples: Examples,
    tokenizer: Any,
    *,
    max_length: int,
    cache_dir: str | os.PathLike[str],
    infilling: Infilling | None = None,
) -> dict[str, np.ndarray]:
    """Does what `tokenize_classification` does, and keeps the result in a file named by a SHA-256.

    The hash is over everything that the result depends on. The file holds the examples, so protect `cache_dir` like the
    data.

    Args:
        examples: as in `tokenize_classification`.
        tokenizer: likewise.
        max_length: likewise.
        cache_dir: folder of the cache files, made if needed.
        infilling: as in `tokenize_classification`.

    Returns:
        The arrays of `tokenize_classification`.

    Raises:
        ValueError: as `tokenize_classification`.
    """
    _check_tokenizer(tokenizer)
    settings = {
        "tokens": [tokenizer.pad_token_id, tokenizer.mask_token_id],
        "inputs": sorted(tokenizer.model_input_names),
        "max_length": max_length,
        "template": None if infilling is None else infilling.template,
    }
    arrays, num_truncated = read_or_build(
        cache_key(
            tokenizer,
            settings,
            texts=(examples.texts, examples.text_pairs),
            arrays={} if examples.labels is None else {"label": examples.labels},
        ),
        lambda: _tokenize(examples, tokenizer, max_length, infilling),
        cache_dir=cache_dir,
        num_examples=len(examples),
    )
    log_truncation(num_truncated, len(examples), max_length)
    return arrays


def _tokenize(examples: Examples, tokenizer: Any, max_length: int, infilling: Infilling | None) -> Tokenized:
    _check_tokenizer(tokenizer)
    if len(examples) == 0:
        raise ValueError("There are no examples to tokenise.")
    extra = {} if examples.labels is None else {"label": examples.labels}
    if infilling is None:
        ids, types, num_truncated = _classification_rows(examples, tokenizer, max_length)
    else:
        types = None
        ids, positions, num_truncated = infilling_rows(examples, tokenizer, infilling, max_length=max_length)
        extra["mask_position"] = np.asarray(positions, np.int32)
    input_ids, attention_mask = pad_right(ids, max_length, tokenizer.pad_token_id)
    arrays = {
        "input_ids": input_ids,
        "attention_mask": attention_mask.astype(np.int32),
        "token_type_ids": np.zeros(attention_mask.shape, np.int32),
    }
    if types is not None:
        arrays["token_type_ids"] = pad_right(types, max_length, 0)[0]
    return arrays | extra, num_truncated


def _check_tokenizer(tokenizer: Any) -> None:
    check_is_fast(tokenizer)
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no pad token, and rows of one shape need padding."
            " Set one, for example tokenizer.pad_token = tokenizer.eos_token: attention ignores it."
        )


def _classification_rows(
    examples: Examples, tokenizer: Any, max_length: int
) -> tuple[list[list[int]], list[list[int]] | None, int]:
    """Returns token ids and segment numbers of each row with special tokens, and how many rows were cut."""
    is_pair = examples.text_pairs is not None
    fixed = tokenizer.num_special_tokens_to_add(pair=is_pair)
    if max_length < fixed + 1 + is_pair:
        raise ValueError(
            f"max_length={max_length} has no room for text: {fixed} of its tokens are special tokens. Raise it."
        )
    encoded = tokenizer(
        list(examples.texts),
        list(examples.text_pairs) if examples.text_pairs is not None else None,
        max_length=max_length,
        truncation="longest_first",
        padding=False,
        return_attention_mask=False,
    )
    num_truncated = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    return encoded["input_ids"], encoded.get("token_type_ids"), num_truncated
