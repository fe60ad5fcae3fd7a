"""Runs on the same samples, as one mechanism of less noise."""

from __future__ import annotations

import math

import pytest

from dp_rmt.accounting import Step, Truncation, epsilon, epsilon_of_composition, steps_on_shared_samples

Q = 0.02


def test_equal_runs_are_one_of_noise_less_by_the_root_of_their_number() -> None:
    runs = [(Step(2.0, Q), 30)] * 4
    assert steps_on_shared_samples(runs) == {Step(1.0, Q): 30}
    together = epsilon_of_composition(steps_on_shared_samples(runs), delta=1e-5)
    alone = {"noise_multiplier": 1.0, "sampling_probability": Q, "delta": 1e-5}
    assert together == epsilon(**alone, num_steps=30)
    assert together > epsilon(**{**alone, "noise_multiplier": 2.0}, num_steps=4 * 30)  # as if samples were independent


def test_a_run_that_ends_leaves_those_that_go_on() -> None:
    truncation = Truncation(1000, 40)
    runs = [(Step(2.0, Q, truncation), 4), (Step(4.0, Q, truncation), 9), (Step(3.0, Q, truncation), 4)]
    all_three = 1 / math.sqrt(1 / 4 + 1 / 16 + 1 / 9)
    assert steps_on_shared_samples(runs) == {Step(all_three, Q, truncation): 4, Step(4.0, Q, truncation): 5}


@pytest.mark.parametrize("other", [Step(2.0, 0.03), Step(2.0, Q, Truncation(1000, 40))])
def test_other_samples_are_refused(other: Step) -> None:
    with pytest.raises(ValueError, match="one sampling probability and one truncation; these differ"):
        steps_on_shared_samples([(Step(2.0, Q), 3), (other, 3)])
