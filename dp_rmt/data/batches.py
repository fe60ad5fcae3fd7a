"""Makes batches of one fixed shape from arrays in memory. Missing rows are padding examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np


def gather_batch(arrays: Mapping[str, np.ndarray], indices: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Gathers examples by index; -1 stands for a padding example.

    A padding row is zero everywhere except `attention_mask[0] = 1`. Attention over no token at all would be a softmax
    of nothing (NaN), and NaN times the zero weight of a padding example is still NaN.

    Args:
        arrays: the data set, name -> (N, ...).
        indices: (B,) integers in [-1, N); or (users, rows of each) from `UserSampling`.

    Returns:
        The batch, name -> (B, ...) with the same dtypes, and `is_padding_example`, (B,) bool; (users, rows, ...) and
        (users, rows) where the indices are so.

    Raises:
        ValueError: `arrays` is empty or its arrays differ in N, or `indices` are not integers of one or two axes.
        IndexError: an index is outside [-1, N).

    >>> batch, is_padding_example = gather_batch({"label": np.array([5, 6, 7])}, np.array([2, -1]))
    >>> batch["label"].tolist(), is_padding_example.tolist()
    ([7, 0], [False, True])
    """
    num_examples = _num_examples(arrays)
    indices = np.asarray(indices)
    if indices.ndim not in (1, 2) or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"indices must be integers, (examples,) or (users, rows), got {indices.dtype} of shape {indices.shape}."
        )
    if indices.size and not -1 <= indices.min() <= indices.max() < num_examples:
        raise IndexError(
            f"indices run from {indices.min()} to {indices.max()}, but the data set has {num_examples}"
            " examples (and -1 means padding). Was the sampler built for another data set?"
        )
    is_padding_example = indices < 0
    batch = {}
    for name, array in arrays.items():
        rows = array[indices]
        rows[is_padding_example] = 0
        if name == "attention_mask":
            rows[is_padding_example, 0] = 1
        batch[name] = rows
    return batch, is_padding_example


def evaluation_batches(
    arrays: Mapping[str, np.ndarray], batch_size: int
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yields the whole data set once, in order, in batches of one shape; the last batch is filled with padding.

    Args:
        arrays: the data set, name -> (N, ...).
        batch_size: rows of every batch.

    Yields:
        (batch, is_padding_example), as from `gather_batch`.

    Raises:
        ValueError: `batch_size` is not positive, or `arrays` is not a data set.
    """
    num_examples = _num_examples(arrays)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    for start in range(0, num_examples, batch_size):
        indices = np.arange(start, start + batch_size)
        yield gather_batch(arrays, np.where(indices < num_examples, indices, -1))


def _num_examples(arrays: Mapping[str, np.ndarray]) -> int:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"A data set is one or more arrays with the same number of rows, got rows {lengths}.")
    num_examples = next(iter(lengths.values()))
    if num_examples == 0:
        raise ValueError("The data set has no examples.")
    return num_examples
