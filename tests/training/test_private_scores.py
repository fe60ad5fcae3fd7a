"""Accuracies with noise: their price, their noise, what is not said, a run that is resumed, and an audit."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import dp_accounting
import jax
import numpy as np
import optax
import pytest
from dp_accounting.pld import pld_privacy_accountant

from dp_rmt.accounting import epsilon_of_composition
from dp_rmt.auditing import lower_bounds
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import noise_key
from dp_rmt.training.prepare import Seeds, prepare_run
from dp_rmt.training.private_scores import PrivateScores, secret_of
from dp_rmt.training.run import Run
from dp_rmt.training.task import Task
from dp_rmt.training.train_state import Transforms

SCORES = PrivateScores(
    epsilon=1.0, delta=1e-3, num_steps=4, eval_every=2, rows={"dev": 1000, "test": 1000}, content="a"
)
KEYS = [np.array([1, n], np.uint32).tobytes() for n in range(4000)]


def count(scores: PrivateScores, right: int, *, step: int, key: bytes, name: str = "dev") -> float:
    return 1000 * scores.released(name, {"accuracy": right / 1000, "loss": 0.5}, step=step, key=key)["accuracy"]


@pytest.mark.parametrize(
    ("num_steps", "eval_every", "planned"), [(4, 2, {0, 2, 4}), (5, 2, {0, 2, 4, 5}), (3, 9, {0, 3})]
)
def test_all_planned_scores_together_have_the_epsilon(num_steps: int, eval_every: int, planned: set[int]) -> None:
    """By dp_accounting's own composition."""
    scores = PrivateScores(epsilon=1.0, delta=1e-5, num_steps=num_steps, eval_every=eval_every)
    assert scores.planned == planned
    gaussians = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(scores.noise_multiplier), len(planned))
    spent = pld_privacy_accountant.PLDAccountant().compose(gaussians).get_epsilon(1e-5)
    assert 0.998 < spent < 1.001
    assert epsilon_of_composition(scores.steps, delta=1e-5) == pytest.approx(spent, rel=2e-3)


def test_the_count_has_noise_of_this_std() -> None:
    found = np.array([count(SCORES, 700, step=2, key=key) for key in KEYS]) - 700
    std = math.sqrt(SCORES.noise_multiplier**2 + 1 / 12)  # rounded to whole rows
    assert found.mean() == pytest.approx(0, abs=5 * std / math.sqrt(len(KEYS)))
    assert found.std() == pytest.approx(std, rel=5 / math.sqrt(2 * len(KEYS)))
    np.testing.assert_allclose(found, np.round(found), atol=1e-9)


def test_each_step_data_set_and_run_has_noise_of_its_own_and_repeats_it() -> None:
    streams = {
        (step, name): np.array([count(SCORES, 500, step=step, key=key, name=name) for key in KEYS[:500]])
        for step in (0, 2, 4)
        for name in ("dev", "test")
    }
    correlations = np.corrcoef(list(streams.values())) - np.eye(6)
    assert np.abs(correlations).max() < 5 / math.sqrt(500)
    again = np.array([count(SCORES, 500, step=0, key=key) for key in KEYS[:500]])
    np.testing.assert_array_equal(again, streams[0, "dev"])


def test_nothing_else_is_said() -> None:
    scores = {"accuracy": 0.999, "loss": 0.1, "f1": 0.5}
    assert SCORES.released("dev", scores, step=2, key=b"k").keys() == {"accuracy"}
    assert SCORES.released("dev", scores, step=3, key=b"k") == {}
    assert all(0 <= count(SCORES, 1000, step=2, key=key) <= 1000 for key in KEYS[:50])
    with pytest.raises(ValueError, match="evaluation_epsilon: the scores on 'dev' are matthews"):
        SCORES.released("dev", {"matthews": 0.5}, step=2, key=b"k")


# ---- In a run --------------------------------------------------------------------------------------------------------


def make_run(scores: PrivateScores | None = SCORES) -> Run:
    x = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)

    def losses(params, batch):
        return (batch["x"] @ params["w"] - batch["y"]) ** 2

    def evaluate(params: Mapping) -> dict[str, float]:
        return {"accuracy": float(np.mean(x @ np.asarray(params["w"]) > 0)), "loss": 0.25}

    task = Task({"x": x, "y": x.sum(1)}, losses, {"w": np.ones(4, np.float32)}, evaluators={"dev": evaluate})

    def transforms(mechanism: DPSGD, noise_seed: int, mesh: object) -> Transforms:
        return Transforms(mechanism.noise(noise_key(noise_seed)), optax.identity(), optax.sgd(0.1))

    dpsgd = DPSGD(num_examples=200, expected_batch_size=50, num_steps=4, noise_multiplier=2.0, l2_clip_norm=1.0)
    given = {"delta": 1e-4, "seeds": Seeds(1, 2), "eval_every": 2, "checkpoint_every": 1}
    return prepare_run(task, dpsgd, transforms, private_scores=scores, **given)  # type: ignore[arg-type]


def scores_of(workdir: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: {name: value for name, value in line.items() if name.startswith("eval/")}
        for line in lines
        if any(name.startswith("eval/") for name in line)
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.thorough
def test_a_run_releases_noisy_accuracies_at_planned_steps_and_repeats_them(tmp_path: Path) -> None:
    one = dataclasses.replace(SCORES, rows={"dev": 200})
    make_run(one).train(tmp_path / "whole")
    make_run(one).train(tmp_path / "parts", until=3)
    assert scores_of(tmp_path / "parts").keys() == {0, 2}  # the third step was not planned for
    make_run(one).train(tmp_path / "parts")
    whole = scores_of(tmp_path / "whole")
    assert whole == scores_of(tmp_path / "parts")
    assert [set(scores) for scores in whole.values()] == [{"eval/dev/accuracy"}] * 3
    make_run(None).train(tmp_path / "public")
    raw = scores_of(tmp_path / "public")
    assert any(whole[step]["eval/dev/accuracy"] != raw[step]["eval/dev/accuracy"] for step in whole)
    page = (tmp_path / "whole" / "privacy.md").read_text()
    assert "has a guarantee of its own: each of its rows has (ε = 1, δ = 0.001)" in page
    assert "Scores are computed without noise" not in page
    assert "Scores are computed without noise" in (tmp_path / "public" / "privacy.md").read_text()
    with pytest.raises(ValueError, match="private_scores"):
        make_run(None).check(tmp_path / "whole")
    # Repeated on other rows, a score would have the noise that it had.
    with pytest.raises(ValueError, match="private_scores"):
        make_run(dataclasses.replace(one, content="b")).check(tmp_path / "whole")
    with pytest.raises(ValueError, match="does not say what its evaluation data is"):
        make_run(dataclasses.replace(one, content=""))
    with pytest.raises(ValueError, match=r"private_scores accounts for .* and the run has"):
        make_run(SCORES)


# ---- An audit --------------------------------------------------------------------------------------------------------


class Repeated(PrivateScores):
    """The typical mistake: one noise for all evaluations, which cancels in the difference of two."""

    def released(self, name: str, scores: Mapping[str, float], *, step: int, key: bytes) -> dict[str, float]:
        """As of the first step."""
        return super().released(name, scores, step=0, key=key)


def audited(scores: PrivateScores, attack: tuple[int, int, int], runs: int = 12_000) -> float:
    """The bound of an attack on a row that the model gets right after steps 2 and 4, and wrong before."""
    seen = []
    for is_in in (0, 1):
        keys = [np.array([7 + is_in, n], np.uint32).tobytes() for n in range(runs)]
        right = {0: 500, 2: 500 + is_in, 4: 500 + is_in}
        counts = [[count(scores, right[step], step=step, key=key) for step in right] for key in keys]
        seen.append(np.array(counts) @ np.array(attack))
    tuning = runs // 10
    threshold, _ = lower_bounds.best_threshold(seen[1][:tuning], seen[0][:tuning], delta=1e-3)
    counted = lower_bounds.count(seen[1][tuning:], seen[0][tuning:], threshold)
    return lower_bounds.repeated_runs_epsilon(counted, delta=1e-3)


def test_an_audit_lies_below_the_proven_epsilon_and_above_it_where_the_noise_is_repeated() -> None:
    assert 0.2 < audited(SCORES, (0, 1, 1)) < SCORES.epsilon
    assert audited(SCORES, (-1, 1, 0)) < SCORES.epsilon
    repeated = Repeated(**{field.name: getattr(SCORES, field.name) for field in dataclasses.fields(SCORES)})
    assert audited(repeated, (-1, 1, 0)) > SCORES.epsilon


def test_noise_that_is_repeated_on_other_rows_cancels() -> None:
    """The typical mistake of a resumed run: why its identity has the content of the evaluation data."""
    steps, key = sorted(SCORES.planned), KEYS[0]
    with_row = {step: count(SCORES, 501, step=step, key=key) for step in steps}
    without = {step: count(SCORES, 500, step=step, key=key) for step in steps}
    assert [with_row[step] - without[step] for step in steps] == [1.0] * len(steps)  # the row itself, with no noise


def test_the_secret_of_the_noise_is_in_the_state() -> None:
    state = make_run(dataclasses.replace(SCORES, rows={"dev": 200})).state
    assert secret_of(state.noise) == np.asarray(jax.random.key_data(noise_key(2))).tobytes()
