"""A trained classifier, asked about texts that are not in its task's data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from dp_rmt.data import Examples, evaluation_batches
from dp_rmt.training.losses import Logits
from dp_rmt.types import Params


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Computes the logits of texts that are not in a task's data.

    Attributes:
      names: names of the classes; empty for regression.
      logits: ``(params, batch) -> (B, number of classes)``, one column for regression.
      tokenize: makes arrays of unlabelled examples.
      batch_size: number of texts at once.
      is_of_pairs: whether a row has two texts.
    """

    names: tuple[str, ...]
    logits: Logits
    tokenize: Callable[[Examples], Mapping[str, np.ndarray]]
    batch_size: int
    is_of_pairs: bool = False

    def __call__(self, params: Params, texts: Sequence[str], pairs: Sequence[str] | None = None) -> np.ndarray:
        """The logits of every text, or pair of texts: float32 (N, number of classes)."""
        arrays = self.tokenize(Examples(tuple(texts), None if pairs is None else tuple(pairs), None))
        compiled = jax.jit(self.logits)
        found = [
            np.asarray(compiled(params, batch), np.float32)[~is_padding]
            for batch, is_padding in evaluation_batches(arrays, self.batch_size)
        ]
        return np.concatenate(found)
