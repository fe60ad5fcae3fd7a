"""Repeat and select: the price before the first job, and what leaves after the last."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dp_rmt import accounting
from dp_rmt.finetuning.plan import build_mechanism
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.sweep import launch, selection
from dp_rmt.finetuning.sweep.jobs import Sweep, load_sweep
from dp_rmt.finetuning.workdir import as_json
from dp_rmt.noise_addition import NOISE_SUPPORT
from dp_rmt.training.guarantee import Guarantee
from dp_rmt.training.private_scores import PrivateScores

DRAWS = """
import itertools, numpy as np
BASE, SCORE, SWEPT = "configs/glue.py:sst2,base", "eval/dev/accuracy", "train.learning_rate"
REPETITIONS = {"mean": 3.0, "shape": 1.0}

def sweep():
    rng = np.random.default_rng()
    for number in itertools.count():
        yield f"draw{number}", {SWEPT: float(rng.uniform(1e-4, 1e-3))}
"""
GRID = DRAWS.replace("float(rng.uniform(1e-4, 1e-3))", "1e-4 * (number + 1)")
ENDS = DRAWS.replace("itertools.count()", "range(20)")
COMMON = [
    "--config.privacy.epsilon=0.5",
    "--config.privacy.delta=1e-3",
    "--config.train.epochs=None",
    "--config.train.num_steps=3",
    "--config.privacy.expected_batch_size=24",
    "--config.train.microbatch_size=8",
]
NUM_EXAMPLES = 120


@pytest.fixture
def draws(tmp_path: Path) -> Callable[..., Sweep]:
    """``(*arguments, jobs=) -> sweep`` with so many jobs."""

    def make(*arguments: str, jobs: int = 3) -> Sweep:
        (tmp_path / "draws.py").write_text(DRAWS)
        listed = {f"draw{n}": {"train.learning_rate": 1e-4 * (n + 1)} for n in range(jobs)}
        (tmp_path / "work").mkdir(exist_ok=True)
        (tmp_path / "work" / "jobs.json").write_text(json.dumps(listed))
        return load_sweep(tmp_path / "draws.py", tmp_path / "work", [*COMMON, *arguments])

    return make


def finish(sweep: Sweep, workdir: Path, scores: dict[str, float]) -> None:
    """What finished jobs leave."""
    for job in sweep.jobs(workdir, ("finetune",)):
        settings = sweep.settings(job.name)
        mechanism, delta = build_mechanism(settings, NUM_EXAMPLES)
        guarantee = Guarantee(
            mechanism=mechanism, delta=delta, train_data="ff", seeds_given=False, nonprivate_metrics=True
        )
        (job.workdir / "model").mkdir(parents=True)
        (job.workdir / "model" / "model.safetensors").write_text(job.name)
        (job.workdir / "model" / "README.md").write_text("epsilon of one run")
        (job.workdir / "config.json").write_text(json.dumps(as_json(settings) | {"arms": {}}))
        statement = guarantee.statement(job.workdir, mechanism.num_steps).to_json()
        about = {"command": f"finetune --workdir={job.workdir}", "commit": "abc"}
        (job.workdir / "privacy.json").write_text(json.dumps(statement | {"about": about, "date": "2026-11-28"}))
        line = {"step": 3, "eval/dev/accuracy": scores[job.name], "nonprivate/loss": 1.0}
        (job.workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (job.workdir / "report.html").write_text("done")


def test_the_price_is_that_of_the_theorem_and_knows_no_number_of_jobs(draws: Callable[..., Sweep]) -> None:
    price = selection.price(draws(), lambda settings: NUM_EXAMPLES)
    mechanism, delta = build_mechanism(draws().settings("draw0"), NUM_EXAMPLES)
    step = accounting.Step(mechanism.noise_multiplier, 24 / NUM_EXAMPLES, mechanism.truncation)
    runs = accounting.Repetitions(3.0, 1.0)
    expected = accounting.epsilon_of_best({step: 3}, runs, delta=delta, noise_support=NOISE_SUPPORT)
    assert (price.epsilon, price.delta) == (expected, 1e-3)
    assert price.epsilon_of_one < price.epsilon
    assert "geometric, mean 3" in price.text
    assert selection.price(draws(jobs=7), lambda settings: NUM_EXAMPLES) == price


def test_the_choice_costs_the_rows_it_is_made_by_what_all_scores_of_all_repetitions_cost(
    draws: Callable[..., Sweep],
) -> None:
    """A job is scored three times: before the first step, after two, and at the end."""
    assert selection.price(draws(), lambda settings: NUM_EXAMPLES).evaluation_epsilon is None
    arguments = ["--config.privacy.evaluation_epsilon=0.7", "--config.train.eval_every=2"]
    price = selection.price(draws(*arguments), lambda settings: NUM_EXAMPLES)
    noise_multiplier = PrivateScores(0.7, 1e-3, num_steps=3, eval_every=2).noise_multiplier
    score, runs = accounting.Step(noise_multiplier, sampling_probability=1.0), accounting.Repetitions(3.0, 1.0)
    expected = accounting.epsilon_of_best({score: 3}, runs, delta=1e-3, noise_support=NOISE_SUPPORT)
    assert price.evaluation_epsilon == pytest.approx(expected, rel=1e-12)
    assert expected > 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.privacy.noise_seed=7"], "leave the seeds out"),
        (["--config.privacy.sampling_seed=7"], "leave the seeds out"),
        (["--config.privacy.epsilon=inf"], "no winner is private"),
        (["--config.privacy.noise_bands=2"], "the price of choosing a winner is not derived"),
    ],
)
def test_a_sweep_whose_winner_has_no_bound_is_refused_before_it_starts(
    arguments: list[str], message: str, draws: Callable[..., Sweep]
) -> None:
    with pytest.raises(ValueError, match=message):
        selection.price(draws(*arguments), lambda settings: NUM_EXAMPLES)


def test_jobs_that_are_not_one_mechanism_are_refused(draws: Callable[..., Sweep]) -> None:
    sweep = draws()
    sweep.changes["draw1"]["train.num_steps"] = 4  # type: ignore[index]
    with pytest.raises(ValueError, match="'draw0', 'draw1' differ in noise"):
        selection.price(sweep, lambda settings: NUM_EXAMPLES)


@pytest.mark.parametrize(
    ("source", "message"), [(GRID, "gives the same list every time"), (ENDS, "ends after 20 jobs")]
)
def test_a_list_that_is_not_one_of_independent_draws_is_refused(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        load_sweep(tmp_path / "sweep.py", tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_equal_jobs_are_independent_draws(tmp_path: Path) -> None:
    (tmp_path / "sweep.py").write_text(DRAWS.replace("float(rng.uniform(1e-4, 1e-3))", "1e-4"))
    assert load_sweep(tmp_path / "sweep.py", tmp_path / "work").changes


def test_the_winner_alone_leaves_and_nothing_that_counts_the_jobs(
    draws: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, workdir = draws(), tmp_path / "work"
    monkeypatch.setattr(selection, "num_examples_of", lambda settings: NUM_EXAMPLES)
    monkeypatch.setattr(selection.price, "__defaults__", (lambda settings: NUM_EXAMPLES,))
    launch.announce(sweep, workdir)
    assert "PRICE, before the first job" in capsys.readouterr().out
    finish(sweep, workdir, {"draw0": math.nan, "draw1": 0.75, "draw2": 0.5})
    for path in workdir.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert launch.run_missing(sweep, workdir, ("finetune",), by="local")
    printed = capsys.readouterr().out
    released = {str(path.relative_to(workdir / "release")): path for path in (workdir / "release").rglob("*")}
    assert sorted(released) == [
        "model",
        "model/model.safetensors",
        "privacy.json",
        "privacy.md",
        "winner.json",
    ]
    assert min(path.stat().st_mtime for path in released.values()) > 1.7e9  # no date of the job's
    assert released.pop("model/model.safetensors").read_text() == "draw1"  # the stub's weights; the best score
    texts = [path.read_text() for path in released.values() if path.is_file()]
    for text in [printed, *texts]:
        assert not any(word in text for word in ("draw0", "draw1", "draw2", "3 jobs", "2026-11-28", "nonprivate/"))
    assert json.loads(texts[-1] if "changes" in texts[-1] else released["winner.json"].read_text()) == {
        "changes": {"train.learning_rate": 2e-4},
        "eval/dev/accuracy": 0.75,
    }
    statement: dict[str, Any] = json.loads(released["privacy.json"].read_text())
    price = selection.price(sweep)
    assert (statement["epsilon"], statement["delta"]) == (price.epsilon, price.delta)
    assert statement["detection"] == []
    assert statement["epsilon_pld"] is None
    page = released["privacy.md"].read_text()
    assert "chosen as the best of a secret random number of runs** (geometric, mean 3)" in page
    assert (workdir.stat().st_mode & 0o777) == 0o700


def test_nothing_leaves_before_all_jobs_are_finished(
    draws: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, workdir = draws(), tmp_path / "work"
    finish(sweep, workdir, {"draw0": 0.5, "draw1": 0.75, "draw2": 0.6})
    (workdir / "jobs" / "draw2" / "report.html").unlink()
    stub = dataclasses.replace(sweep.jobs(workdir, ())[2], command=(sys.executable, "-c", "pass"))
    jobs = [*sweep.jobs(workdir, ())[:2], stub]
    monkeypatch.setattr(Sweep, "jobs", lambda *args: jobs)
    assert not launch.run_missing(sweep, workdir, ("finetune",), by="local")
    assert not (workdir / "release").exists()
    assert "draw" not in (printed := capsys.readouterr().out)
    assert "nothing is released before" in printed


def test_settings_of_the_jobs_are_read_with_their_data(make_config: Callable[..., Settings]) -> None:
    assert selection.num_examples_of(make_config()) == NUM_EXAMPLES
