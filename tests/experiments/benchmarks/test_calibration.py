"""The table of what libraries calibrate to; what a library gives is tried where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.benchmarks import calibration
from third_party.peers import NotInstalledError

RECORD = Path(calibration.__file__).with_name("results") / "calibration" / "epsilon3.json"


def not_installed(peer):
    raise NotInstalledError("not installed: pip install")


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_the_record_is_what_the_code_computes(record, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "require", not_installed)
    found = calibration.measured(calibration.Promise(**record["promise"]))
    assert list(found) == ["dp_rmt, pld (default)", "dp_rmt, rdp"]
    for name, arm in found.items():
        assert arm == pytest.approx(record["arms"][name], rel=1e-6)
    assert capsys.readouterr().err.count("not installed") == len(calibration.ARMS) - 2


def test_no_library_of_the_record_breaks_the_promise_and_rdp_is_looser(record):
    promised = record["promise"]["epsilon"]
    costs = {name: arm["epsilon_by_pld"] for name, arm in record["arms"].items()}
    assert list(costs) == list(calibration.ARMS)
    assert max(costs.values()) < promised + 0.005  # PRV and jax_privacy's grid have errors of their own
    assert costs["dp_rmt, rdp"] < costs["dp_rmt, pld (default)"] - 0.1
    assert costs["jax_privacy, rdp"] < costs["jax_privacy, pld"] - 0.1
    assert costs["Opacus, rdp (default of get_noise_multiplier)"] < costs["dp_rmt, pld (default)"] - 0.1
