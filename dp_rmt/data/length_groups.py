"""Splits a private batch into a few groups of equal sequence length, so that padding tokens cost next to nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dp_rmt.batch_selection import microbatch_order
from dp_rmt.data.batches import gather_batch

Group = tuple[dict[str, np.ndarray], np.ndarray]
"""``(batch, is_padding_example)``"""


def group_by_length(
    arrays: Mapping[str, np.ndarray], indices: np.ndarray, *, lengths: Sequence[int], microbatch_size: int | None
) -> tuple[Group, ...]:
    """Splits the examples of a batch by length. The sum of their gradients stays the same.

    Every group has room for the whole batch, so nothing is ever dropped and the shapes never change. The padding of a
    group is laid out so that whole microbatches of it are skipped
    (`dp_rmt.clipping.per_example.summed_over_microbatches`).

    Args:
      arrays: the data set with ``attention_mask`` (N, L). Every array with L columns is cut to the group's length.
      indices: the examples (B,) of the batch, -1 for padding, from `PoissonSampling.indices`; or users with their rows
        (B, rows) from `UserSampling.indices`. A user goes with all of its rows where the longest of them belongs.
      lengths: ascending lengths of the groups in tokens; the last must be L. If it is empty, data of any kind is one
        group, and needs no mask.
      microbatch_size: None puts everything into the last group.

    Returns:
      One ``(batch, is_padding_example)`` for each length, each of B rows.

    Raises:
      ValueError: the lengths do not ascend to L.

    >>> arrays = {"attention_mask": np.array([[1, 0, 0, 0], [1, 1, 1, 0]])}
    >>> short, long = group_by_length(arrays, np.array([0, 1]), lengths=(2, 4), microbatch_size=1)
    >>> short[0]["attention_mask"].shape, short[1].tolist(), long[1].tolist()
    ((2, 2), [False, True], [False, True])
    """
    rows = rows_of_groups(arrays, indices, lengths=lengths, microbatch_size=microbatch_size)
    return tuple(gather_batch(cut, members) for cut, members in rows)


def rows_of_groups(
    arrays: Mapping[str, np.ndarray], indices: np.ndarray, *, lengths: Sequence[int], microbatch_size: int | None
) -> list[tuple[Mapping[str, np.ndarray], np.ndarray]]:
    """Returns the rows that `group_by_length` gathers, before they are gathered. The arguments are the same.

    Returns:
      For each length the data set, with its arrays cut to that length (as views), and the examples (B,) of the group,
      or its users with their rows (B, rows), -1 for padding.
    """
    if microbatch_size is None:
        return [(arrays, indices)]
    if not lengths:
        return [(arrays, indices[microbatch_order(len(indices), microbatch_size)])]
    full_length = arrays["attention_mask"].shape[1]
    check_lengths(lengths, full_length)
    real = indices[indices >= 0] if indices.ndim == 1 else indices[(indices >= 0).any(axis=1)]
    masks = arrays["attention_mask"][real]
    if indices.ndim == 2:  # what any of a user's rows has, and none where the user has fewer rows
        masks = np.max(np.where((real >= 0)[..., None], masks, 0), axis=1)
    groups: list[tuple[Mapping[str, np.ndarray], np.ndarray]] = []
    for length, rows in zip(lengths, rows_by_length(masks, lengths), strict=True):
        members = np.full(indices.shape, -1, indices.dtype)
        members[: len(rows)] = real[rows]
        cut = {name: x[:, :length] if x.shape[1:] == (full_length,) else x for name, x in arrays.items()}
        groups.append((cut, members[microbatch_order(len(members), microbatch_size)]))
    return groups


def rows_by_length(attention_mask: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """Finds the rows of each length group. Every row is in the first group that holds its last token.

    Args:
      attention_mask: (N, L), zero where there is no token.
      lengths: ascending, the last L.

    Returns:
      For each length the row numbers, ascending.

    >>> [rows.tolist() for rows in rows_by_length(np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0]]), (2, 3))]
    [[0, 2], [1]]
    """
    ends = np.max((attention_mask != 0) * np.arange(1, attention_mask.shape[1] + 1), axis=1)
    group = np.searchsorted(np.asarray(lengths), ends)
    return [np.flatnonzero(group == number) for number in range(len(lengths))]


def check_lengths(lengths: Sequence[int], full_length: int) -> None:
    """Raises ValueError unless the lengths are positive, ascend and end at full_length."""
    if list(lengths) != sorted({*lengths}) or not lengths or lengths[0] < 1 or lengths[-1] != full_length:
        raise ValueError(
            f"length groups {tuple(lengths)} must be positive, ascend and end at the length of the data, {full_length}"
        )
