"""Rows that hold nothing private: random tokens, or text that the user knows to be public."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dp_rmt.data.tokens.token_rows import check_is_fast, special_tokens

# Places that a vocabulary keeps free; a pre-trained model has never seen them.
_UNUSED = re.compile(r"^(\[unused|<unused|<\|reserved)")


def random_token_rows(
    tokenizer: Any, *, lengths: Sequence[int], num_rows: int, num_labels: int | None = None, seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """Rows of random tokens between the special tokens that the tokenizer puts around a text, without any padding.

    Args:
        tokenizer: a fast tokenizer of `transformers`.
        lengths: lengths of the rows in tokens, all public; each gets the same share of them.
        num_rows: how many rows in all, rounded up to the same number for each length.
        num_labels: classes of the random labels; None draws scores from N(0, 1).
        seed: of tokens and labels.

    Returns:
        One batch for each length, with the keys of every task: `input_ids`, `attention_mask` (ones), `token_type_ids`
        (zeros), `loss_mask` (ones), `mask_position`, `label`.

    Raises:
        ValueError: the vocabulary has nothing but special tokens, or a length has no room for a token between them.
    """
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    words = [i for i, piece in enumerate(pieces) if i not in special and not _UNUSED.match(piece or "[unused")]
    if not words:
        raise ValueError(f"The tokenizer {tokenizer.name_or_path!r} has no tokens but special ones.")
    generator = np.random.default_rng(seed)
    per_length = -(-num_rows // len(lengths))
    batches = []
    for length in lengths:
        prefix, suffix = special_tokens(tokenizer)
        room = length - len(prefix) - len(suffix)
        if room < 1:
            raise ValueError(f"Rows of {length} tokens have no room for text between the tokenizer's special tokens.")
        middle = generator.choice(np.asarray(words, np.int32), (per_length, room))
        sides = [np.tile(np.asarray(side, np.int32), (per_length, 1)) for side in (prefix, suffix)]
        batches.append(_batch(np.concatenate([sides[0], middle, sides[1]], axis=1), num_labels, generator))
    return batches


def public_text_rows(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    num_rows: int,
    num_labels: int | None = None,
    seed: int = 0,
) -> list[dict[str, np.ndarray]]:
    """Rows of public text. Each is cut to the longest of the lengths that it fills, so that there is no padding.

    Args:
        texts: public texts, of which the first `num_rows` that fill the shortest length are taken.
        tokenizer: a fast tokenizer of `transformers`.
        lengths: lengths of the rows in tokens.
        num_rows: how many rows at most.
        num_labels: as in `random_token_rows`; the labels are random.
        seed: of the labels.

    Returns:
        One batch for each length that some text fills; keys as in `random_token_rows`.

    Raises:
        ValueError: no text fills the shortest length.
    """
    check_is_fast(tokenizer)
    ids = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    rows: dict[int, list[list[int]]] = {}
    for row in [row for row in ids if len(row) >= min(lengths)][:num_rows]:
        length = max(length for length in lengths if length <= len(row))
        rows.setdefault(length, []).append(row[:length])
    if not rows:
        raise ValueError(f"None of the {len(texts)} public texts has {min(lengths)} tokens. Give longer ones.")
    generator = np.random.default_rng(seed)
    return [_batch(np.asarray(members, np.int32), num_labels, generator) for _, members in sorted(rows.items())]


def _batch(input_ids: np.ndarray, num_labels: int | None, generator: np.random.Generator) -> dict[str, np.ndarray]:
    count, length = input_ids.shape
    ones = np.ones_like(input_ids)
    labels: Any = generator.standard_normal(count) if num_labels is None else generator.integers(0, num_labels, count)
    kind: Any = np.float32 if num_labels is None else np.int32
    return {
        "input_ids": input_ids,
        "attention_mask": ones,
        "token_type_ids": np.zeros_like(input_ids),
        "loss_mask": ones,
        "mask_position": generator.integers(0, length, (count,)).astype(np.int32),
        "label": np.asarray(labels, kind),
    }
