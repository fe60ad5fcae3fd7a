"""The privacy statement says what holds, and what does not."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from dp_rmt.training.privacy_audit import AuditBound, read_audit, write_audit
from dp_rmt.training.privacy_statement import (
    PrivacyStatement,
    markdown,
    read_privacy,
    statement_table,
    write_privacy,
)
from dp_rmt.training.privacy_text import attack_power

STATEMENT = PrivacyStatement(
    epsilon=2.5,
    target_epsilon=3.0,
    delta=1e-5,
    epsilon_pld=2.5,
    epsilon_rdp=2.9,
    noise_multiplier=0.7718,
    l2_clip_norm=0.1,
    clip="automatic",
    sampling_probability=0.0148,
    expected_batch_size=1000.0,
    max_batch_size=1160,
    num_steps=202,
    num_examples=67349,
    noise_std=7.718e-5,
    seeds_from="os entropy",
    nonprivate_metrics=True,
    evaluation_data=("dev_matched", "dev_mismatched"),
)
NOT_PRIVATE = dataclasses.replace(
    STATEMENT, epsilon=None, epsilon_pld=None, epsilon_rdp=None, noise_multiplier=0.0, l2_clip_norm=math.inf
)


def text(**changes) -> str:
    return markdown(dataclasses.replace(STATEMENT, **changes))


def test_the_guarantee_names_its_parts():
    page = text()
    assert "ε = 2.5 and δ = 1e-5" in page
    for part in (
        "one training example",
        "adding or removing one",
        "Poisson",
        "1,160",
        "202 updates",
        "67,349",
    ):
        assert part in page
    assert "ε = 2.9 by Rényi" in page
    assert "**within** the ε = 3" in page
    assert "**above** the ε = 2" in text(target_epsilon=2.0)
    assert "aimed at" not in text(target_epsilon=None)


def test_what_is_not_covered_is_said():
    page = text()
    for part in (
        "Never release `checkpoints/`",
        "**release `model/` only**",
        "Hyper-parameters",
        "the choice of a model among several",
        "`dev_matched`, `dev_mismatched`",
        "near-duplicates",
        "float32",
        "lowest bits",
        "Every further run",
    ):
        assert part in page


def test_warnings_depend_on_the_run():
    assert "Keep `metrics.jsonl` and `report.html` private" in text(nonprivate_metrics=True)
    assert "Keep `metrics.jsonl` and `report.html` private" not in text(nonprivate_metrics=False)
    assert "the guarantee is void" in text(seeds_from="given in the config")
    assert "void" not in text(seeds_from="os entropy")
    assert "δ is too large" in text(delta=1 / 67349)
    assert "δ is too large" not in text(delta=0.99 / 67349)


def test_without_noise_there_is_no_guarantee():
    for statement in (NOT_PRIVATE, dataclasses.replace(STATEMENT, epsilon=math.inf)):
        page = markdown(statement)
        assert "This run is NOT private" in page
        assert "differentially private with" not in page
        assert "ε spent" not in page
        assert "NOT private" in statement_table({"run": statement.to_json()})


@pytest.mark.parametrize(
    "statement", [STATEMENT, NOT_PRIVATE, dataclasses.replace(STATEMENT, evaluation_data=())]
)
def test_files_hold_the_statement(tmp_path, statement):
    workdir = tmp_path / "run"
    write_privacy(workdir, statement)
    write_privacy(workdir, statement)
    record = json.loads((workdir / "privacy.json").read_text(), parse_constant=pytest.fail)
    assert record == read_privacy(workdir) == statement.to_json()
    assert PrivacyStatement.from_json(record) == statement
    assert record["is_private"] is statement.is_private
    assert (workdir / "privacy.md").read_text(encoding="utf-8") == markdown(statement)
    assert sorted(entry.name for entry in workdir.iterdir()) == ["privacy.json", "privacy.md"]


def test_files_that_are_missing_or_broken_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"privacy\.json"):
        read_privacy(tmp_path)
    (tmp_path / "privacy.json").write_text("{")
    with pytest.raises(ValueError, match=r"privacy\.json is not JSON"):
        read_privacy(tmp_path)
    with pytest.raises(ValueError, match="clip, delta"):
        PrivacyStatement.from_json({"epsilon": 1.0})


def test_statements_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="delta"):
        dataclasses.replace(STATEMENT, delta=None)
    with pytest.raises(ValueError, match="delta"):
        dataclasses.replace(STATEMENT, delta=1.0)
    with pytest.raises(ValueError, match="seeds_from"):
        PrivacyStatement.from_json(STATEMENT.to_json() | {"seeds_from": "somewhere"})


def test_table_for_the_terminal_is_aligned():
    table = statement_table({"denoised": STATEMENT.to_json(), "no noise": NOT_PRIVATE.to_json()})
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[-3:] == ["private", "NOT", "private"]
    spent = next(line for line in lines if line.startswith("ε spent"))
    assert spent.split() == ["ε", "spent", "2.5", "–"]


@given(st.floats(0, 20), st.floats(0, 0.1), st.floats(0, 1))
def test_attack_power_is_a_probability_that_beats_guessing(epsilon, delta, rate):
    power = attack_power(epsilon=epsilon, delta=delta, false_positive_rate=rate)
    assert min(rate, 1.0) - 1e-12 <= power <= 1.0
    assert power <= attack_power(epsilon=epsilon + 1, delta=delta, false_positive_rate=rate) + 1e-12


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 3.0])
def test_attack_power_bounds_the_best_test_against_gaussian_noise(noise_multiplier):
    """The likelihood-ratio test of one Gaussian release has a known power, and a known delta(epsilon)."""
    mu, rate = 1 / noise_multiplier, 0.01
    best = norm.sf(norm.isf(rate) - mu)
    bounds = []
    for epsilon in (0.1, 0.5, 1.0, 2.0, 4.0, 8.0):
        # Balle & Wang 2018, theorem 8.
        delta = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        bounds.append(attack_power(epsilon=epsilon, delta=float(delta), false_positive_rate=rate))
    assert min(bounds) >= best - 1e-12
    assert min(bounds) <= 1.5 * best  # a vacuous bound would pass the first line


BOUND = AuditBound(
    epsilon=1.25, delta=1e-5, confidence=0.95, subject="400 repeated runs", is_this_run=False, noise_multiplier=0.7718,
    sampling_probability=0.0148, num_steps=202,
)  # fmt: skip


def test_an_audit_says_what_was_attacked_and_what_it_showed():
    assert "What an audit measured" not in text()
    page = text(audit=BOUND)
    for part in (
        "An attack on 400 repeated runs shows **ε ≥ 1.25** at δ = 1e-5, with 95% confidence",
        "**Not this run was attacked**",
        "noise multiplier of 0.7718, sampling probability 0.0148 and 202 updates",
        "| ε, lower bound by an audit | 1.25 |",
    ):
        assert part in page
    assert "repeat the audit" not in page
    assert "the code or the proof is wrong" not in page
    assert "Not this run" not in text(audit=dataclasses.replace(BOUND, is_this_run=True))


def test_an_audit_of_other_settings_or_above_the_guarantee_is_told():
    assert "**These are not the settings of this run as it stands**" in text(audit=BOUND, num_steps=100)
    refuted = text(audit=dataclasses.replace(BOUND, epsilon=2.6))
    assert "**The bound is above the proven ε: the code or the proof is wrong." in refuted


def test_audits_are_kept_beside_the_run(tmp_path):
    assert read_audit(tmp_path) is None
    write_audit(tmp_path, BOUND)
    assert read_audit(tmp_path) == BOUND
    write_privacy(tmp_path, dataclasses.replace(STATEMENT, audit=BOUND))
    record = read_privacy(tmp_path)
    assert record["audit"]["epsilon"] == 1.25
    assert PrivacyStatement.from_json(record).audit == BOUND
    del record["audit"]  # of a run before there were audits
    assert PrivacyStatement.from_json(record) == STATEMENT
    for content in ("{", "[]", json.dumps({"epsilon": 1.0})):
        (tmp_path / "audit.json").write_text(content)
        with pytest.raises(ValueError, match=r"audit.json: .*Repeat the audit"):
            read_audit(tmp_path)
