"""Learning rates and repetitions on SST-2 with MiniLM, denoised and noisy in each job.

Sampling and noise have no given seed, as private data needs: each run draws its own.

Source: this project; the recipe is configs/sst2_minilm.py.
Expected: 1e-3 is the best rate of both arms (81.8% denoised, 79.5% noisy).
Cost: 12 jobs of about 40 minutes of one CPU core.
Command: python -m experiments.sweep --sweep=configs/sweeps/sst2_minilm_rates.py --config.data.path=DIR
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

BASE = "configs/sst2_minilm.py"
SCORE = "eval/dev/accuracy"
SWEPT = "train.learning_rate"


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Four rates, three repetitions."""
    for rate in (2.5e-4, 5e-4, 1e-3, 2e-3):
        for repetition in range(3):
            yield f"lr{rate:g}_{repetition}", {SWEPT: rate, "seed": repetition}
