"""Random search over the learning rate of RoBERTa-base on SST-2; what publishing the best model alone costs is bounded.

Both the number of jobs and every learning rate are drawn at the first start, from the operating system's entropy, and
kept in jobs.json of the sweep's folder. With the number geometric of mean 6 the theorem of Papernot & Steinke
(arXiv 2110.03620) bounds the best of them; the table that the sweep writes has the number. The bound is one by Rényi
divergences, which are loose for batches that can overflow: hence the large max_batch_size.

Source: this project; the recipe is configs/glue.py:sst2,base.
Expected: 6 jobs in the mean, none of them named before.
Cost: a job is configs/glue.py:sst2,base.
Command: python -m experiments.sweep --sweep=configs/sweeps/sst2_roberta_base_random.py --config.data.path=DIR
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

BASE = "configs/glue.py:sst2,base"
SCORE = "eval/dev/accuracy"
SWEPT = "train.learning_rate"
REPETITIONS = {"mean": 6.0, "shape": 1.0}  # shape 1: geometric; 0: logarithmic; inf: Poisson


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Endless and identically distributed: the runner takes as many as it has drawn."""
    rng = np.random.default_rng()  # of the operating system's entropy
    for number in itertools.count():
        rate = float(f"{10 ** rng.uniform(-4, -2.5):.3g}")
        yield f"draw{number}", {SWEPT: rate, "privacy.max_batch_size": 1504}
