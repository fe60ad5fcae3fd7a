"""The learning rate that an arm wants: not at the end of those tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable


def best_rate(
    score: Callable[[float], float], centre: float, factors: Iterable[float]
) -> tuple[float, dict[float, float]]:
    """Tries the rates around a centre; while the best is the largest or smallest, one further factor of 2.

    Args:
      score: trains at a rate and tells how good that was; more is better, and what is not finite is the worst.
      centre: of the rates, such as what is customary.
      factors: of the centre, to begin with.

    Returns:
      ``(best, every rate tried with its score)``.

    Raises:
      ValueError: no score is finite.

    >>> best_rate(lambda rate: -abs(rate - 4.0), 1.0, (1.0, 2.0))
    (4.0, {1.0: -3.0, 2.0: -2.0, 4.0: -0.0, 8.0: -4.0})
    """
    scores: dict[float, float] = {}
    wanted = [centre * factor for factor in sorted(factors)]
    while wanted:
        for rate in wanted:
            found = score(rate)
            scores[rate] = found if math.isfinite(found) else -math.inf
        if max(scores.values()) == -math.inf:
            raise ValueError(f"no learning rate of {', '.join(f'{rate:g}' for rate in scores)} gave a finite score")
        best = max(scores, key=lambda rate: scores[rate])
        wanted = [best * 2] * (best == max(scores)) + [best / 2] * (best == min(scores))
    return best, scores
