"""The audit of CI: the code as it is stays below its epsilon, every mistake comes out above it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from dp_rmt.auditing import audits, canaries
from dp_rmt.auditing.engines import OneRun, repeated_bound
from dp_rmt.auditing.problems import MUTATIONS, OF_USERS, Audited, canary_losses, canary_params
from dp_rmt.auditing.run_folder import audit_workdir
from dp_rmt.clipping.quantile import QuantileClipping
from dp_rmt.reporting.audit_bound import read_audit
from dp_rmt.reporting.privacy_files import write_privacy
from dp_rmt.reporting.privacy_statement import PrivacyStatement, read_privacy

PROVEN, DELTA, RUNS = 3.0, 1e-5, 600


@pytest.mark.parametrize("mutation", ["none", *OF_USERS])
def test_repeated_runs_of_users(mutation):
    """A user with two rows stays below the proven value, and ends above with rows clipped apart, or drawn twice."""
    row = audits.audit_repeated(
        PROVEN, delta=audits.DELTA_OF_USERS, num_runs=RUNS, seed=1, mutation=mutation, rows_per_user=2
    )
    assert (row["epsilon"] > PROVEN) == (mutation in OF_USERS)
    assert audits.failures([row]) == []


@pytest.mark.parametrize("mutation", [name for name in MUTATIONS if name not in OF_USERS])
def test_repeated_runs(mutation):
    """A right mechanism may exceed 3 in 5% of all seeds at most; really far less often: it is not that leaky."""
    row = audits.audit_repeated(PROVEN, delta=DELTA, num_runs=RUNS, seed=1, mutation=mutation)
    assert (row["epsilon"] > PROVEN) == (mutation != "none")
    assert audits.failures([row]) == []


class Unnoised(QuantileClipping):
    """The typical mistake: the clip norm follows a count that has no noise to speak of."""

    def noise_multipliers(self, noise_multiplier: float) -> tuple[float, float]:
        return super().noise_multipliers(noise_multiplier)[0], 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize(("clipping", "is_right"), [(QuantileClipping(share=0.5), True), (Unnoised(), False)])
def test_repeated_runs_whose_clip_norm_follows_a_quantile(clipping, is_right):
    """In full batches, where nothing but its noise hides the count."""
    delta = audits.DELTA_OF_USERS  # of so few runs a smaller one shows nothing
    mechanism = audits.full_batch_mechanism(PROVEN, delta, audits.EXAMPLES, num_steps=8)
    mechanism = dataclasses.replace(mechanism, clip_quantile=clipping)
    bound = repeated_bound(mechanism, num_runs=RUNS, delta=delta, seed=1)["epsilon"]
    assert (bound <= PROVEN) == is_right
    assert bound > 0.2  # it does see something


@pytest.mark.parametrize("mutation", ["none", "clipping skipped"])
def test_one_run(mutation):
    row = audits.audit_one_run(PROVEN, delta=DELTA, num_canaries=200, seed=1, mutation=mutation)
    assert (row["epsilon"] > PROVEN) == (mutation != "none")
    if mutation == "none":
        assert row["auc"][1] > 0.5  # it does see something


def test_white_box_scores_have_the_law_of_the_mechanism():
    """Full batches, worst-case canaries: in scores are N(T C^2 / B, T (s C)^2), out scores N(0, the same)."""
    mechanism = audits.full_batch_mechanism(PROVEN, DELTA, 400, num_steps=4)
    flips = canaries.coin_flips(400, 3)
    run = OneRun(mechanism, canary_losses, canary_params(400), {"row": np.arange(400)})
    scores = run.scores(flips, seed=3, learning_rate=1.0)["gradient"]
    std = mechanism.noise_std * 2.0
    for chosen, mean in ((flips, 4 / 400), (~flips, 0.0)):
        standardised = (scores[chosen] - mean) / std
        assert abs(standardised.mean()) < 5 / np.sqrt(chosen.sum())
        assert abs(standardised.std() - 1) < 5 / np.sqrt(2 * chosen.sum())


def test_the_right_one_is_the_project_s_own():
    mechanism = audits.repeated_mechanism(PROVEN, DELTA)
    assert mechanism.epsilon(mechanism.num_steps, DELTA) == pytest.approx(PROVEN, rel=1e-4)
    assert Audited.clipped_grad is not type(mechanism).__mro__[1].clipped_grad
    batch, is_padding = {"row": np.array([3, 0, 5])}, np.array([False, True, False])
    ours, _ = mechanism.clipped_grad(canary_losses)(canary_params(20), batch, is_padding_example=is_padding)
    theirs, _ = super(Audited, mechanism).clipped_grad(canary_losses)(
        canary_params(20), batch, is_padding_example=is_padding
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(ValueError, match="mutation 'typo' is not one of none, noise removed"):
        dataclasses.replace(mechanism, mutation="typo")


def test_the_command_says_what_is_not_as_it_must_be():
    row = {"audit": "a", "proven": 3.0}
    rows = [
        row | {"mutation": "none", "epsilon": 3.5},
        row | {"mutation": "noise removed", "epsilon": 2.0},
        row | {"mutation": "padding counted", "epsilon": 2.0},
        row | {"mutation": "padding counted", "epsilon": 5.0, "audit": "b"},
    ]
    assert audits.failures(rows) == ["a: 3.50 > 3.0", "noise removed: no audit shows it"]
    shown = audits.table({"proven": 3.0, "rows": rows})
    assert "| none |  | 3.50! |  |" in shown
    assert "| padding counted | test padding reaches nothing | 2.00 | 5.00! |" in shown


@pytest.mark.parametrize("law", [law for law in MUTATIONS.values() if law])
def test_the_law_that_guards_against_a_mistake_is_there(law):
    path, _, name = law.partition("::")
    assert f"\ndef {name}(" in (Path(__file__).parents[1] / path).read_text(encoding="utf-8")


@pytest.fixture
def run_statement() -> PrivacyStatement:
    mechanism = audits.repeated_mechanism(PROVEN, DELTA)
    return PrivacyStatement(
        epsilon=PROVEN,
        target_epsilon=PROVEN,
        delta=DELTA,
        epsilon_pld=PROVEN,
        epsilon_rdp=None,
        noise_multiplier=mechanism.noise_multiplier,
        l2_clip_norm=0.1,
        clip="flat",
        sampling_probability=0.5,
        expected_batch_size=500.0,
        max_batch_size=600,
        num_steps=8,
        num_examples=1000,
        noise_std=1.0,
        seeds_from="os entropy",
        nonprivate_metrics=False,
    )


def test_a_run_s_own_statement_gets_the_bound(tmp_path, run_statement):
    write_privacy(tmp_path, run_statement)
    # With this seed the bound is .6; of so few runs one in five shows nothing, and a bound of 0 would show no more.
    bound = audit_workdir(tmp_path, num_runs=RUNS, seed=4)
    same = audits.audit_repeated(PROVEN, delta=DELTA, num_runs=RUNS, seed=4)  # its mechanism is what the run states
    assert 0 < bound.epsilon == pytest.approx(same["epsilon"])
    assert read_audit(tmp_path) == bound
    assert PrivacyStatement.from_json(read_privacy(tmp_path)) == dataclasses.replace(run_statement, audit=bound)
    page = (tmp_path / "privacy.md").read_text()
    assert "An attack on 1,200 repeated runs of 20 examples" in page
    assert "repeat the audit" not in page


def test_what_ran_is_attacked(tmp_path, run_statement, monkeypatch):
    """Not plain clipping of examples in the place of it: all that the statement says of the mechanism."""
    attacked = []

    def bound(mechanism, **options):
        attacked.append(mechanism)
        return {"epsilon": 0.5}

    monkeypatch.setattr("dp_rmt.auditing.run_folder.repeated_bound", bound)
    of_users = {"unit": "user", "rows_per_user": 3, "clip_quantile": (0.4, 0.1), "noise_generator": "chacha20"}
    for changes in (of_users, {"clip": "automatic"}):
        write_privacy(tmp_path, dataclasses.replace(run_statement, **changes))
        audit_workdir(tmp_path, num_runs=RUNS, seed=1)
    first, second = attacked
    assert (first.rows_per_user, first.noise_generator, first.clip) == (3, "chacha20", "flat")
    assert first.clip_quantile == QuantileClipping(0.4, 0.1)
    assert (second.clip, second.clip_quantile, second.rows_per_user) == ("automatic", None, None)
    write_privacy(tmp_path, dataclasses.replace(run_statement, **of_users))
    audit_workdir(tmp_path, num_runs=RUNS, seed=1)
    assert "1,200 repeated runs of 20 users with 3 rows each" in (tmp_path / "privacy.md").read_text()


@pytest.mark.thorough
def test_a_run_of_users_with_all_options_is_attacked(tmp_path, run_statement):
    options = {"unit": "user", "rows_per_user": 2, "clip_quantile": (0.5, 0.1), "noise_generator": "chacha20"}
    write_privacy(tmp_path, dataclasses.replace(run_statement, **options))
    assert 0 <= audit_workdir(tmp_path, num_runs=100, seed=4).epsilon < PROVEN


def test_only_private_runs_have_something_to_audit(tmp_path, run_statement):
    with pytest.raises(FileNotFoundError, match="this folder holds no run that has begun"):
        audit_workdir(tmp_path, num_runs=RUNS, seed=1)
    write_privacy(tmp_path, dataclasses.replace(run_statement, epsilon=None))
    with pytest.raises(ValueError, match="this run is not private"):
        audit_workdir(tmp_path, num_runs=RUNS, seed=1)
