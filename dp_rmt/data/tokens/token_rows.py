"""What tokenised rows of every task share: rows of one length, and what is said about the tokenizer and the cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging


def check_is_fast(tokenizer: Any) -> None:
    """Refuses what is not a fast tokenizer of `transformers`.

    Raises:
        ValueError: it is another object, or a slow tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer. Load it with transformers.AutoTokenizer"
            " from a folder that holds tokenizer.json."
        )


def pad_right(rows: Sequence[Sequence[int]], max_length: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as one array.

    Args:
        rows: N rows of at most L numbers.
        max_length: L.
        fill: what stands after the end of a row.

    Returns:
        (N, L) int32, and (N, L) bool, true where the row has a number.

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
