"""Scores on private evaluation data: accuracies with noise, at a price that is fixed before the first of them.

An accuracy is a count over the number of rows, which is public. One row moves the count by at most 1, so that a score
is a Gaussian mechanism, and all scores of a run are a composition whose length is known before the run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from scipy import special

from dp_rmt import accounting
from dp_rmt.accounting import Step
from dp_rmt.noise_addition import NOISE_SUPPORT, GaussianNoiseState
from dp_rmt.training import processes

SCORE = "accuracy"
"""The only score that is released: others are no counts, and one row may move them by more than one."""


@dataclasses.dataclass(frozen=True)
class PrivateScores:
    """Accuracies of a run at planned steps, with noise.

    Formal guarantee: for each data set, all scores of a run together are (epsilon, delta)-differentially private for
    neighbours that differ by one added or removed row, if the number of rows is public, no row is in two data sets, and
    the noise key of the run is secret.

    Attributes:
      epsilon: for each row of each data set, above 0.
      delta: of the same guarantee.
      num_steps: updates of the run.
      eval_every: updates from one evaluation to the next; the start and the last update are evaluated, too.
      rows: the number of rows of each data set by its name, which is public.
      content: what a score depends on beside the parameters, compared as a string where a run goes on: a fingerprint of
        the rows (`dp_rmt.data.fingerprint`), and how many are computed at once. A score that is repeated has the noise
        that it had. With a row more or less, or one that another rounding decides otherwise, the noise would cancel in
        the difference.
    """

    epsilon: float
    delta: float
    num_steps: int
    eval_every: int
    rows: Mapping[str, int] = dataclasses.field(default_factory=dict)
    content: str = ""

    @property
    def planned(self) -> frozenset[int]:
        """The steps after which there are scores."""
        return frozenset([*range(0, self.num_steps, self.eval_every), self.num_steps])

    @functools.cached_property
    def noise_multiplier(self) -> float:
        """Std of the noise in each count."""
        return accounting.calibrate_noise_multiplier(
            epsilon=self.epsilon,
            delta=self.delta,
            sampling_probability=1.0,
            num_steps=len(self.planned),
            noise_support=NOISE_SUPPORT,
        )

    @property
    def steps(self) -> dict[Step, int]:
        """What all scores on one data set consist of, as the accountants see it."""
        return {Step(self.noise_multiplier, sampling_probability=1.0): len(self.planned)}

    def released(self, name: str, scores: Mapping[str, float], *, step: int, key: bytes) -> dict[str, float]:
        """What may be said of the scores.

        Args:
          name: of the data set.
          scores: without noise.
          step: updates done. Nothing is said after steps that were not planned.
          key: secret of the run, from `secret_of`. The noise is a function of key, name and step, so that a repeated
            step repeats its noise.

        Returns:
          The noisy accuracy, within [0, 1] and a whole number of rows, so that its digits tell nothing more.

        Raises:
          ValueError: there is no accuracy among the scores.
        """
        if step not in self.planned:
            return {}
        if SCORE not in scores:
            raise ValueError(
                f"config.privacy.evaluation_epsilon: the scores on {name!r} are {', '.join(scores)}, and only "
                f"{SCORE} can be released with noise. Leave evaluation_epsilon out if the evaluation data is public"
            )
        num_rows = self.rows[name]
        noisy = round(scores[SCORE] * num_rows) + self.noise_multiplier * _standard_normal(key, f"{name}@{step}")
        return {SCORE: min(max(round(noisy), 0), num_rows) / num_rows}


def secret_of(noise: Any) -> bytes:
    """The secret key in the state of a run's noise; checkpoints have it, so that a resumed run has the same."""
    is_noise = lambda node: isinstance(node, GaussianNoiseState)  # noqa: E731
    (found,) = [node for node in jax.tree.leaves(noise, is_leaf=is_noise) if is_noise(node)]
    return np.asarray(processes.to_host(found.key)).tobytes()


def _standard_normal(key: bytes, message: str) -> float:
    """``Phi^-1((v + 1/2) / 2^64)`` of 64 bits of HMAC-SHA256, in float64; symmetric, as `noise_addition` has it."""
    v = int.from_bytes(hmac.new(key, f"evaluation of {message}".encode(), hashlib.sha256).digest()[:8], "big")
    is_upper = v >= 2**63
    lower = float(special.ndtri(((2**64 - 1 - v if is_upper else v) + 0.5) / 2**64))
    return -lower if is_upper else lower
