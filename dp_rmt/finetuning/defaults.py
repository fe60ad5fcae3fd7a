"""Defaults that follow the number of training examples. Nothing here imports JAX."""

from __future__ import annotations

EPOCHS = 3.0
"""The length of a run if neither epochs nor num_steps are given."""
LARGEST_BATCH = 1000
"""The largest expected batch size that is not given."""


def expected_batch_size(given: int | None, num_examples: int) -> int:
    """The expected batch size that is given, or a tenth of the examples as a power of two, at most 1000.

    Large batches make the noise small beside the sum of gradients, and a tenth of the examples leaves the amplification
    by sampling its part.

    >>> [expected_batch_size(None, n) for n in (20, 600, 5000, 67_349)], expected_batch_size(24, 600)
    ([2, 64, 512, 1000], 24)
    """
    if given is not None:
        return given
    tenth = max(1.0, num_examples / 10)
    lower = 2 ** (int(tenth).bit_length() - 1)
    return min(LARGEST_BATCH, 2 * lower if tenth / lower > 2**0.5 else lower)


def num_steps(given: int | None, epochs: float | None, num_examples: int, batch_size: float) -> int:
    """The number of updates that is given, or that of the epochs, of which there are 3 if they are not given either.

    >>> num_steps(None, None, 600, 64), num_steps(None, 1.0, 600, 64), num_steps(5, None, 600, 64)
    (28, 9, 5)
    """
    return given or max(1, round((EPOCHS if epochs is None else epochs) * num_examples / batch_size))
