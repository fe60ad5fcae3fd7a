"""A run with correlated noise: resumed bit for bit, begun again bit for bit, its ledger and its statement."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import make_run

from dp_rmt.correlated_noise import square_root
from dp_rmt.mechanism import DPSGD
from dp_rmt.reporting.privacy_statement import PrivacyStatement, read_privacy, table_rows
from dp_rmt.training import run_start
from dp_rmt.training.ledger import read_ledger
from dp_rmt.training.prepare import Seeds

MECHANISM = DPSGD(
    num_examples=200,
    expected_batch_size=40,
    num_steps=6,
    noise_multiplier=2.0,
    l2_clip_norm=0.3,
    noise_strategy=square_root(3),
)


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_goes_on_with_its_history(tmp_path: Path) -> None:
    whole = make_run(MECHANISM).train(tmp_path / "whole")
    for until in (1, 4):
        make_run(MECHANISM).train(tmp_path / "parts", until=until)
    resumed = make_run(MECHANISM).train(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, (whole.params, whole.noise), (resumed.params, resumed.noise))
    assert len(whole.noise.earlier) == 2
    assert all(np.any(np.asarray(past["w"])) for past in whole.noise.earlier)
    other = DPSGD(**{**MECHANISM.__dict__, "noise_strategy": square_root(2)})
    with pytest.raises(ValueError, match="noise_strategy"):
        make_run(other).check(tmp_path / "whole")

    statement = read_privacy(tmp_path / "whole")
    assert statement["epsilon"] == pytest.approx(MECHANISM.epsilon(6, 1e-4))
    assert statement["sampling"] == "cyclic Poisson from 3 groups, truncated to max_batch_size"
    assert statement["noise_std"] == pytest.approx(MECHANISM.largest_noise_std)
    entry = read_ledger(tmp_path / "whole")[-1]
    assert entry.noise_bands == 3
    assert entry.epsilon() == pytest.approx(statement["epsilon"])
    page = (tmp_path / "whole" / "privacy.md").read_text()
    assert "belongs to one of 3 groups at random" in page
    assert "independently with probability 0.6 (cyclic Poisson sampling)" in page
    assert "none is drawn twice in any 3 steps" in page
    assert "BandMF with 3 bands" in page
    assert "so is a sample that does not fit into its batch" in page
    again = PrivacyStatement.from_json(statement)
    assert again.noise_coefficients == (1.0, 0.5, 0.375)
    assert dict(table_rows(again))["bands of correlated noise"] == "3"


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_has_no_checkpoint_begins_again_with_its_noise(tmp_path: Path) -> None:
    """Its start has the key, and not a list of all zeros of the history."""
    run = make_run(MECHANISM, seeds=Seeds())
    checkpoints = run.checkpoints(tmp_path)
    run_start.write(tmp_path, {}, "0" * 32, 1, run.state)
    start = run_start.read(tmp_path)
    checkpoints.close()
    assert len(start.noise) == 2
    other = make_run(MECHANISM, seeds=Seeds())
    restored = start.state(other.state)
    jax.tree.map(np.testing.assert_array_equal, restored.noise, run.state.noise)
    assert len(restored.noise.earlier) == 2


def test_a_line_of_an_earlier_ledger_has_independent_noise(tmp_path: Path) -> None:
    run = make_run(MECHANISM)
    entry = run.guarantee.entry("0" * 32, 6)
    record = json.loads(json.dumps(entry.__dict__ | {"about": entry.about.__dict__}))
    del record["noise_bands"]
    plain = type(entry).from_json(record)
    assert plain.noise_bands == 1
    independent = DPSGD(**{**MECHANISM.__dict__, "noise_strategy": None})
    assert plain.epsilon() == pytest.approx(independent.epsilon(6, 1e-4))
    assert not math.isclose(plain.epsilon(), entry.epsilon(), rel_tol=0.05)
