"""What the tokens of all tasks share: padding to one length, a check of the tokenizer, and a log line about cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging


def check_is_fast(tokenizer: Any) -> None:
    """Refuses what is not a fast tokenizer of `transformers`.

    Raises:
        ValueError: the tokenizer is another object, or a slow one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer. Load it with transformers.AutoTokenizer"
            " from a folder that holds tokenizer.json."
        )


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a single text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    is_text = np.flatnonzero(np.asarray(encoded["special_tokens_mask"]) == 0)
    return encoded["input_ids"][: is_text[0]], encoded["input_ids"][is_text[-1] + 1 :]


def pad_right(rows: Sequence[Sequence[int]], max_length: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes one array of rows of different lengths.

    Args:
        rows: N rows of at most L numbers.
        max_length: L.
        fill: the number that stands after the end of a row.

    Returns:
        The array, (N, L) int32, and a bool array (N, L) that is true where the row has a number.

    >>> padded, is_token = pad_right([[5], [6, 7]], 3, 0)
    >>> padded.tolist(), is_token.sum(axis=1).tolist()
    ([[5, 0, 0], [6, 7, 0]], [1, 2])
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    is_token = np.arange(max_length) < lengths[:, None]
    padded = np.full(is_token.shape, fill, np.int32)
    padded[is_token] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return padded, is_token


def log_truncation(num_truncated: int, num_examples: int, max_length: int) -> None:
    """Logs how many rows were cut."""
    logging.info(
        "%d of %d examples (%.2f%%) are longer than max_length=%d and were cut.",
        num_truncated,
        num_examples,
        100 * num_truncated / num_examples,
        max_length,
    )
