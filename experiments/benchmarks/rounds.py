"""Fair timing of alternatives on one machine: in turns, so that whatever else slows it down meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def alternate(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times a, b, c, a, b, c, ...

    Args:
      runs: by name; each does its work to the end before it returns. What it returns is dropped.
      repeats: number of rounds.

    Returns:
      Seconds of each run in each round.

    >>> {name: len(seconds) for name, seconds in alternate({"a": list, "b": dict}, 3).items()}
    {'a': 3, 'b': 3}
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return seconds


def timed(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds of the ratio to the reference in the same round.

    >>> median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0])
    2.0
    """
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
