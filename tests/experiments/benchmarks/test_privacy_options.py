"""The costs of options, on a tiny model: what does not depend on the machine is what it should be."""

from __future__ import annotations

import jax
import pytest

from experiments.benchmarks import privacy_options
from experiments.benchmarks.step.models import make_workload

SIZES = {"num_layers": 1, "batch_size": 2, "sequence_length": 8}


@pytest.mark.slow
def test_what_options_cost_beside_a_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (privacy_options.PLAIN, "users of 2 rows", "quantile", "correlated, 4 bands")
    monkeypatch.setattr(privacy_options, "ARMS", {name: privacy_options.ARMS[name] for name in names})
    found = privacy_options.measure_steps("tiny", repeats=1, **SIZES)
    assert list(found) == list(names)
    assert found["quantile"]["matrix_flops_ratio"] == found["correlated, 4 bands"]["matrix_flops_ratio"] == 1
    assert 1.5 < found["users of 2 rows"]["matrix_flops_ratio"] < 3
    workload = make_workload("tiny", **SIZES, dtype="float32")
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(workload.trainable))
    history = found["correlated, 4 bands"]["state_bytes"] - found["plain"]["state_bytes"]
    assert history == 3 * trained
