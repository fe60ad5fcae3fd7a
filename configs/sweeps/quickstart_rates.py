"""Learning rates and seeds on the quickstart: three rates, two seeds, both arms of configs/quickstart.py in each job.

Source: this project.
Expected: see the table that the sweep writes.
Cost: 6 jobs of about 2 minutes of CPU.
Command: python -m experiments.sweep --sweep=configs/sweeps/quickstart_rates.py --executor=local
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

BASE = "configs/quickstart.py"
SCORE = "eval/dev/accuracy"
SWEPT = "train.learning_rate"


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """The seeds are given since the text is synthetic: with private data leave them out."""
    for rate in (4e-3, 8e-3, 16e-3):
        for seed in (1, 2):
            seeds = {"privacy.sampling_seed": 10 * seed, "privacy.noise_seed": 10 * seed + 1}
            yield f"lr{rate:g}_seed{seed}", {SWEPT: rate, "seed": seed, **seeds}
