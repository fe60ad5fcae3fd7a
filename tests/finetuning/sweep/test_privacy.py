"""What choosing the best of several runs costs, by what the runs have left."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant
from dp_accounting.rdp import rdp_privacy_accountant

from dp_rmt import accounting
from dp_rmt.accounting import Repetitions
from dp_rmt.finetuning.sweep.privacy import cost_of_choosing, cost_of_scores
from dp_rmt.finetuning.sweep.spent_runs import SpentRun, released

Choices = Callable[..., list[SpentRun]]


@pytest.fixture
def choices(statement: dict[str, Any]) -> Choices:
    """``(count, seed=, sampling_seed=, **changes of the statement) -> runs``, of one job each."""

    def make(count: int, seed: int | None = None, sampling_seed: int | None = None, **changes: Any) -> list[SpentRun]:
        config = {"privacy": {"noise_seed": seed, "sampling_seed": sampling_seed}}
        return [SpentRun(f"job{n}", {**statement, **changes}, config) for n in range(count)]

    return make


def test_a_fixed_number_of_runs_costs_their_composition(choices: Choices) -> None:
    choice = cost_of_choosing(choices(3))
    settings: dict[str, Any] = {"noise_multiplier": 2.0, "delta": 1e-5, "sampling_probability": 0.02}
    truncation = accounting.Truncation(10_000, 400)
    expected = accounting.epsilon(**settings, num_steps=12, truncation=truncation)
    assert choice.rule == "composition"
    assert choice.epsilon == pytest.approx(expected, rel=1e-3)
    assert f"ε = {expected:.4g}"[:6] in choice.text
    assert "does not apply" in choice.text
    mixed = cost_of_choosing([*choices(2), *choices(1, noise_multiplier=4.0)])
    assert mixed.epsilon is not None
    assert mixed.epsilon < choice.epsilon  # type: ignore[operator]


@pytest.mark.parametrize(
    "run",
    [
        {"noise_multiplier": 888.0, "sampling_probability": 0.01, "num_steps": 10**5, "max_batch_size": 10_000},
        {"noise_multiplier": 0.15, "sampling_probability": 1.0, "num_steps": 20, "max_batch_size": 10_000},
    ],
)
def test_runs_that_differ_by_a_hair_cost_what_equal_ones_do(choices: Choices, run: dict[str, Any]) -> None:
    """Small steps in bins of their own size; little noise by privacy loss distributions, too."""
    longer = {**run, "num_steps": 2 * run["num_steps"]}
    del longer["max_batch_size"]  # all fit
    expected = accounting.epsilon(delta=1e-5, **longer)
    other = choices(1, **{**run, "noise_multiplier": run["noise_multiplier"] * (1 + 1e-12)})
    together = cost_of_choosing([*choices(1, **run), *other]).epsilon
    assert together is not None
    assert expected * (1 - 1e-6) <= together <= expected * (1 + 2e-4)


def test_a_random_number_of_runs_costs_repeat_and_select(choices: Choices) -> None:
    repetitions = Repetitions(6.0, 1.0)
    choice = cost_of_choosing(choices(5, max_batch_size=10_000), repetitions)  # all fit, so this is the mechanism:
    once = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.02, dp_accounting.GaussianDpEvent(2.0)), 4
    )
    best = dp_event.RepeatAndSelectDpEvent(once, 6.0, 1.0)
    expected = rdp_privacy_accountant.RdpAccountant().compose(best).get_epsilon(1e-5)
    assert (choice.rule, choice.delta) == ("repeat and select", 1e-5)
    assert choice.epsilon == pytest.approx(expected, rel=1e-6)
    assert "geometric, mean 6; it came out as 5" in choice.text
    truncated = cost_of_choosing(choices(5), repetitions)
    assert truncated.epsilon is not None
    assert truncated.epsilon > expected
    longer = choices(1, num_steps=9)[0]._replace(job="other")
    unlike = cost_of_choosing([*choices(2), longer], repetitions)
    assert unlike.rule == "composition"
    assert "differ in noise" in unlike.text


def test_no_bound_is_claimed_for_runs_that_share_noise_or_have_none(choices: Choices) -> None:
    assert cost_of_choosing(choices(2, seed=7)).rule == "none"
    assert cost_of_choosing([*choices(1), *choices(1, is_private=False, epsilon=None)]).epsilon is None
    distinct = [*choices(1, seed=7), *choices(1, seed=8)]
    assert "seeds were given" in cost_of_choosing(distinct).text


# SST-2 at epsilon 3, batches of 1000, three epochs.
SST2: dict[str, Any] = {
    "epsilon": 3.0,
    "delta": 67_349**-1.1,
    "noise_multiplier": 0.77220,
    "sampling_probability": 1000 / 67_349,
    "max_batch_size": 1157,
    "num_examples": 67_349,
    "num_steps": 202,
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("count", "apart", "together"), [(2, 3.76, 8.19), pytest.param(8, 6.76, 58.0, marks=pytest.mark.slow)]
)
def test_runs_that_share_samples_cost_more_than_their_composition(
    choices: Choices, count: int, apart: float, together: float
) -> None:
    assert cost_of_choosing(choices(count, **SST2)).epsilon == pytest.approx(apart, rel=2e-3)
    choice = cost_of_choosing(choices(count, sampling_seed=5, **SST2))
    assert (choice.rule, choice.epsilon) == ("composition", pytest.approx(together, rel=2e-3))
    assert f"δ = {4.88e-6:.3g}"[:8] in choice.text
    assert "Runs share a sampling seed (config.privacy.sampling_seed)" in choice.text


def test_samples_that_are_shared_are_as_if_the_sums_stood_side_by_side(choices: Choices) -> None:
    """Against a simulation: the privacy loss of two outputs at once, in which one coin decides for both."""
    sigma, q, count, draws = 1.0, 0.2, 4, 1_000_000
    runs = choices(
        2, sampling_seed=5, noise_multiplier=sigma, sampling_probability=q, max_batch_size=10_000, delta=0.02
    )
    bound = cost_of_choosing(runs).epsilon
    assert bound is not None
    rng = np.random.default_rng(0)
    outputs = sigma * rng.standard_normal((draws, count, 2))
    outputs += rng.random((draws, count, 1)) < q  # the example is in both sums or in neither
    ratio = (1 - q) + q * np.exp(np.sum((2 * outputs - 1) / (2 * sigma**2), axis=-1))
    losses = np.log(ratio).sum(axis=1)  # of removing the example
    excess = np.maximum(0, -np.expm1(bound - losses))
    assert excess.mean() == pytest.approx(0.02, abs=5 * excess.std() / math.sqrt(draws))


def test_what_is_shared_by_some_and_for_a_part_of_the_steps(choices: Choices) -> None:
    """Of two that share samples one ends sooner, a third is on its own."""
    runs = [*choices(1, sampling_seed=5), *choices(1, sampling_seed=5, num_steps=9, noise_multiplier=4.0), *choices(1)]
    both = 1 / math.sqrt(2.0**-2 + 4.0**-2)
    steps = released(runs)
    counts = {step.noise_multiplier: count for step, count in steps.items()}
    assert counts == {both: 4, 4.0: 5, 2.0: 4}
    alone = released([*choices(1, sampling_seed=5), *choices(1, sampling_seed=6)])
    assert [(step.noise_multiplier, count) for step, count in alone.items()] == [(2.0, 8)]
    everybody = choices(3, sampling_seed=5, sampling_probability=1.0)
    assert list(released(everybody).values()) == [12]


@pytest.mark.parametrize(
    "other",
    [{"sampling_probability": 0.03}, {"num_examples": 9_999}, {"max_batch_size": 408}, {"task": "qnli"}],
)
def test_no_bound_is_claimed_for_one_seed_on_unlike_samples(choices: Choices, other: dict[str, Any]) -> None:
    runs = [*choices(1, sampling_seed=5), *choices(1, sampling_seed=5, **other)]
    if "task" in other:
        runs[1] = runs[1]._replace(config={**runs[1].config, "data": other})
    choice = cost_of_choosing(runs)
    assert (choice.rule, choice.epsilon) == ("none", None)
    assert "share a sampling seed (config.privacy.sampling_seed), but differ" in choice.text


@pytest.mark.thorough
def test_jobs_that_share_samples_are_no_independent_repetitions(choices: Choices) -> None:
    repetitions = Repetitions(6.0, 1.0)
    shared = cost_of_choosing(choices(5, sampling_seed=5), repetitions)
    assert (shared.rule, shared.epsilon) == ("composition", cost_of_choosing(choices(5, sampling_seed=5)).epsilon)
    assert "no job is an independent draw" in shared.text
    # The arms of a job may share samples, if each job has its own: they are counted as what they are.
    arms = [run._replace(job=job) for job, seed in (("a", 1), ("b", 2)) for run in choices(2, sampling_seed=seed)]
    best = cost_of_choosing(arms, repetitions)
    plain = cost_of_choosing([run._replace(config={"privacy": {"noise_seed": None}}) for run in arms], repetitions)
    assert best.rule == plain.rule == "repeat and select"
    assert best.epsilon is not None
    assert plain.epsilon is not None
    assert best.epsilon > plain.epsilon
    assert "Runs share a sampling seed" in best.text


def test_private_scores_of_several_runs_add_up_for_a_row_of_the_evaluation_data(choices: Choices) -> None:
    """By dp_accounting: two runs of three scores each are six Gaussian mechanisms on all rows."""
    assert cost_of_scores(choices(3)) == ""
    scored: dict[str, Any] = {"evaluation_guarantee": [1.0, 1e-5, 7.0, 3]}
    text = cost_of_scores(choices(2, **scored))
    six = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(7.0), 6)
    expected = pld_privacy_accountant.PLDAccountant().compose(six).get_epsilon(1e-5)
    told = float(re.search(r"ε = ([\d.]+)", text)[1])  # type: ignore[index]
    assert expected * (1 - 1e-6) <= told <= expected * 1.005
    assert "of 2 runs together" in text
    assert "without noise" not in text
    assert "1 of the runs gave scores without noise" in cost_of_scores([*choices(1, **scored), *choices(1)])
    assert "no bound" in cost_of_scores(choices(2, seed=3, **scored))


def test_a_given_seed_of_either_kind_is_named(choices: Choices) -> None:
    given = "The seeds were given in the configs"
    assert given in cost_of_choosing([*choices(1, sampling_seed=7), *choices(1, sampling_seed=8)]).text
    assert given in cost_of_choosing(choices(1, sampling_seed=7), Repetitions(6.0, 1.0)).text
    assert given not in cost_of_choosing(choices(2)).text


def test_what_the_noise_lacks_of_a_gaussian_adds_up(choices: Choices) -> None:
    plain = cost_of_choosing(choices(2, delta=0.8e-5)).epsilon
    ends = cost_of_choosing(choices(2, delta=1e-5, delta_of_truncation=1e-6)).epsilon
    assert ends == pytest.approx(plain, rel=1e-9)
