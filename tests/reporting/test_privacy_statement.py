"""The privacy statement says what holds, and what does not."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from dp_rmt.reporting.audit_bound import AuditBound, read_audit, write_audit
from dp_rmt.reporting.privacy_files import markdown, write_privacy
from dp_rmt.reporting.privacy_statement import PrivacyStatement, read_privacy, statement_table, table_rows
from dp_rmt.reporting.privacy_text import attack_power
from dp_rmt.reporting.provenance import Provenance

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


ABOUT = Provenance(
    base_model="roberta-base",
    task="sst2",
    tuning="lora",
    data_fingerprint="0f" * 16,
    version="0.1.0",
    commit="ab" * 20,
    command="python -m experiments.finetune '--config.privacy.noise_seed=(given; not shown)'",
)


def test_the_object_is_named():
    page = text(about=ABOUT, date="2025-07-04T12:00:00+00:00")
    for part in (
        "`roberta-base` (trained: `lora`) was fine-tuned on 67,349 examples of the task `sst2`",
        f"Fingerprint of the training data: `{'0f' * 16}`",
        f"on 2025-07-04T12:00:00+00:00 by dp_rmt 0.1.0, commit `{'ab' * 20}`",
        "Command: `python -m experiments.finetune",
    ):
        assert part in page
    page = text(about=Provenance())  # nothing is known, and nothing is said of it
    assert "The pre-trained model was fine-tuned on 67,349 examples." in page
    assert "None" not in page
    assert "Fingerprint" not in page
    assert "What this is about" in markdown(dataclasses.replace(NOT_PRIVATE, about=ABOUT))


def test_delta_and_the_two_accountants_are_explained():
    page = text(delta_of_truncation=1.2341e-9)
    assert "ε bounds how much likelier any result becomes" in page
    assert "δ bounds the probability by which this may fail" in page
    assert "by privacy loss distributions (PLD), which add up the distribution" in page
    assert "by Rényi divergences (RDP), which add up moments" in page
    assert "a δ of at most 1.235e-9, which the δ above contains" in page
    assert "| δ for the end of the noise's support | 1.235e-9 |" in page
    assert "support" not in text()


def test_a_bound_is_called_a_bound():
    page = text(is_upper_bound=True)
    assert "**This run has done at most 202 updates.** After so many it is **(ε, δ)-differentially private" in page
    assert "**The number is an upper bound.**" in page
    assert "| updates done, at most | 202 |" in page
    assert "at most 202 updates" not in text()
    table = statement_table({"ended": STATEMENT.to_json(), "killed": text_record(is_upper_bound=True)})
    assert next(line for line in table.splitlines() if line.startswith("updates done ")).split()[2:] == ["202", "–"]
    assert next(line for line in table.splitlines() if "at most" in line).split()[-2:] == ["–", "202"]


def text_record(**changes):
    return dataclasses.replace(STATEMENT, **changes).to_json()


def test_what_can_be_detected_is_said_at_three_rates():
    """By the mechanism's own curve; an old statement has (epsilon, delta) alone, which say nothing at epsilon 8."""
    page = text(epsilon=8.0, detection=((0.001, 0.05), (0.01, 0.2504), (0.1, 0.61)))
    assert "accuses at most 0.1% of absent examples detects at most 5% of present ones" in page
    assert "; at 1% it detects at most 25.04%; at 10% it detects at most 61%" in page
    assert "from the trade-off curve of the mechanism itself" in page
    old = text(epsilon=8.0)
    assert "at 1% it detects at most 99.97%" in old
    assert "from ε and δ alone" in old


@pytest.mark.parametrize("value", [8.00049, 7.99951, 2.00001, 0.123449, 1e-7 + 1e-12, 3.0])
def test_epsilon_and_delta_are_never_rounded_down(value):
    printed = re.search(r"with ε = ([\d.e-]+) and", text(epsilon=value))
    assert printed is not None
    assert float(printed[1]) >= value
    if value < 1:
        printed = re.search(r"and δ = ([\d.e-]+)\*\*", text(delta=value))
        assert printed is not None
        assert float(printed[1]) >= value
    rows = dict(table_rows(dataclasses.replace(STATEMENT, epsilon=value, epsilon_rdp=value)))
    assert float(rows["ε spent"]) >= value
    assert float(rows["ε by Rényi divergences (RDP)"]) >= value
    audited = dataclasses.replace(STATEMENT, audit=dataclasses.replace(BOUND, epsilon=value))
    assert float(dict(table_rows(audited))["ε, lower bound by an audit"]) <= value
    shown = re.search(r"shows \*\*ε ≥ ([\d.e-]+)\*\*", markdown(audited))
    assert shown is not None
    assert float(shown[1]) <= value


def test_rows_that_stand_verbatim_are_named():
    for page in (text(texts_of="test"), markdown(dataclasses.replace(NOT_PRIVATE, texts_of="test"))):
        assert "**`texts.jsonl` and `report.html` show rows of `test` word for word**" in page
    assert "word for word" not in text()


def test_the_rows_behind_coordinates_must_be_public():
    page = text(coordinates_from="the text of `news.txt`")
    assert "computed from the text of `news.txt` before training. **These rows must be public**" in page
    assert "coordinates" not in text()


def test_statements_of_earlier_versions_are_read():
    record = dataclasses.replace(STATEMENT, about=ABOUT, detection=((0.01, 0.2),), texts_of="test")
    record = dataclasses.replace(record, coordinates_from="random tokens").to_json()
    assert PrivacyStatement.from_json(json.loads(json.dumps(record))).about == ABOUT
    for name in (
        "audit",
        "is_upper_bound",
        "detection",
        "delta_of_truncation",
        "texts_of",
        "coordinates_from",
        "about",
        "date",
    ):
        del record[name]
    assert PrivacyStatement.from_json(record) == STATEMENT
    assert "differentially private" in markdown(PrivacyStatement.from_json(record))


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


@pytest.mark.parametrize("statement", [STATEMENT, NOT_PRIVATE, dataclasses.replace(STATEMENT, evaluation_data=())])
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
    epsilon=1.25,
    delta=1e-5,
    confidence=0.95,
    subject="400 repeated runs",
    is_this_run=False,
    noise_multiplier=0.7718,
    sampling_probability=0.0148,
    num_steps=202,
)


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
