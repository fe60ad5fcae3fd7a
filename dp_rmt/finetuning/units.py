"""What a person has by each way of protecting people with several rows, for the sizes of one's own data.

The first way samples persons (`dp_rmt.batch_selection.UserSampling`), the second keeps a few rows of each
(`dp_rmt.batch_selection.bounded_rows`), samples rows and accounts for groups of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dp_rmt import accounting
from dp_rmt.accounting import Truncation
from dp_rmt.batch_selection import max_batch_size_for
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import NOISE_SUPPORT
from dp_rmt.reporting.numbers import align, number

KEPT = (1, 2, 4, 8, 16)
"""Rows of a person that are kept, or taken in a step."""


def compared_units(
    rows_of_users: Sequence[int] | np.ndarray, *, epsilon: float, delta: float, batch_size: float, num_steps: int
) -> str:
    """A table of a person's epsilon by both ways, for the terminal.

    Each line is for at most k rows of a person. Both ways differentiate as many rows in a step on average, and have the
    same noise in the mean gradient, that of user-level sampling at the epsilon asked for. For bounded rows the noise is
    therefore a larger multiple of one row's clip norm: by the rows that a person has on average.

    Args:
      rows_of_users: how many rows each person has.
      epsilon: of a person, by user-level sampling.
      delta: of a person, by both.
      batch_size: persons in a step of user-level sampling.
      num_steps: updates.

    Returns:
      Aligned lines.

    Raises:
      ValueError: the numbers do not fit together.
    """
    sizes = np.asarray(rows_of_users)
    by_user = DPSGD.calibrated(
        epsilon=epsilon,
        delta=delta,
        num_examples=len(sizes),
        expected_batch_size=batch_size,
        num_steps=num_steps,
        l2_clip_norm=1.0,
        rows_per_user=1,
    )
    spent = number(by_user.epsilon(num_steps, delta), "up")
    head = ["rows of a person, at most", "rows used", "ε, persons sampled", "ε, rows bounded", "ε of one row there"]
    lines = [head]
    for kept in [k for k in KEPT if k <= sizes.max() or k == KEPT[0]]:
        rows = int(np.minimum(sizes, kept).sum())
        q = by_user.sampling_probability
        run: dict[str, Any] = {
            "noise_multiplier": by_user.noise_multiplier * rows / len(sizes),
            "delta": delta,
            "sampling_probability": q,
            "num_steps": num_steps,
            "truncation": Truncation(rows, max_batch_size_for(rows, q)),
            "noise_support": NOISE_SUPPORT,
        }
        of_person = accounting.epsilon_of_group(group_size=kept, **run)
        lines.append([str(kept), f"{rows:,}", spent, number(of_person, "up"), number(accounting.epsilon(**run), "up")])
    return align(lines)
