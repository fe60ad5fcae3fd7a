"""Says how a tensor of a Hugging Face file holds one matrix or vector of this library, or three."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """The relation between a tensor and its parts, which are all of one shape, or differ in their last axis alone.

    Attributes:
        num_parts: the number of parts.
        tensor_shape: maps the shape of a part to the shape of the tensor.
        take: maps (tensor, number of the part) to the part.
        join: maps the parts, in order, to the tensor.
        by_rows: `join` gives a view of the one part, so that the tensor can be written into it row by row.
        widths: the last axes of the parts where they differ; else empty.
    """

    num_parts: int
    tensor_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    take: Callable[[np.ndarray, int], np.ndarray]
    join: Callable[[list[np.ndarray]], np.ndarray]
    by_rows: bool = False
    widths: tuple[int, ...] = ()


PLAIN = Layout(1, lambda shape: shape, lambda tensor, part: tensor, lambda parts: parts[0], by_rows=True)
"""The tensor is the part."""

TRANSPOSED = Layout(1, lambda shape: shape[::-1], lambda tensor, part: tensor.T, lambda parts: parts[0].T, by_rows=True)
"""The tensor is the part's transpose: torch.nn.Linear stores (out, in), and Flax stores (in, out)."""


THIRDS = Layout(
    3,
    lambda shape: (*shape[:-1], 3 * shape[-1]),
    lambda tensor, part: np.split(tensor, 3, axis=-1)[part],
    lambda parts: np.concatenate(parts, axis=-1),
)
"""Three parts stand side by side in the last axis, as GPT-2's query, key and value do.

>>> [THIRDS.take(np.arange(6), part).tolist() for part in range(3)]
[[0, 1], [2, 3], [4, 5]]
"""


def heads_interleaved(num_heads: int) -> Layout:
    """Each head has its rows of query, key and value together, as in GPT-NeoX's (transposed) matrices and vectors.

    >>> layout = heads_interleaved(2)
    >>> [layout.take(np.arange(6), part).tolist() for part in range(3)]
    [[0, 3], [1, 4], [2, 5]]
    >>> layout.join([np.array([0, 3]), np.array([1, 4]), np.array([2, 5])]).tolist()
    [0, 1, 2, 3, 4, 5]
    """

    def take(tensor: np.ndarray, part: int) -> np.ndarray:
        rows = tensor.reshape(num_heads, 3, -1, *tensor.shape[1:])[:, part]
        return rows.reshape(-1, *tensor.shape[1:]).T

    def join(parts: list[np.ndarray]) -> np.ndarray:
        rows = [part.T.reshape(num_heads, 1, -1, *part.T.shape[1:]) for part in parts]
        return np.concatenate(rows, axis=1).reshape(-1, *parts[0].T.shape[1:])

    def tensor_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (3 * shape[-1], *shape[:-1])

    return Layout(3, tensor_shape, take, join)


def stacked_rows(*widths: int) -> Layout:
    """The (transposed) parts stand one below the other, as Phi-3's query, key and value do.

    >>> layout = stacked_rows(2, 1)
    >>> layout.take(np.array([[0], [1], [2]]), 0).tolist(), layout.take(np.array([[0], [1], [2]]), 1).tolist()
    ([[0, 1]], [[2]])
    """
    ends = np.cumsum(widths)

    return Layout(
        len(widths),
        lambda shape: (int(ends[-1]), *shape[:-1]),
        lambda tensor, part: tensor[ends[part] - widths[part] : ends[part]].T,
        lambda parts: np.concatenate([part.T for part in parts]),
        widths=widths,
    )
