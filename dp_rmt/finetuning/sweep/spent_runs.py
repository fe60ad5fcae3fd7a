"""What several runs on the same data have spent, as the independent steps that they consist of.

Runs that share a sampling seed share their samples (`dp_rmt.accounting.steps_on_shared_samples`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dp_rmt import accounting
from dp_rmt.accounting import Step

_ROWS = ("task", "path", "train_split", "max_train_examples", "user_column")
"""Keys of config.data that decide which examples there are, and in which order."""


class SpentRun(NamedTuple):
    """A run that has used its data.

    Attributes:
      job: the run's job, which is the unit that is repeated.
      statement: content of its `privacy.json`.
      config: content of its `config.json`.
    """

    job: str
    statement: Mapping[str, Any]
    config: Mapping[str, Any]

    def seed(self, name: str) -> int | None:
        """The given "sampling_seed" or "noise_seed"; None where it was drawn for this run alone."""
        return self.config["privacy"].get(name)

    @property
    def unit(self) -> str:
        """Whose guarantee the run has: an example's, as all runs of earlier versions, or a user's."""
        return self.statement.get("unit", "example")

    @property
    def step(self) -> Step:
        """One of its updates, or of its rounds with correlated noise, as the accountants see it."""
        rounds = self._rounds
        return Step(self.statement["noise_multiplier"], rounds.sampling_probability, rounds.truncation)

    @property
    def num_steps(self) -> int:
        """Updates that have, or may have, been released."""
        return self.statement["num_steps"]

    @property
    def num_groups(self) -> int:
        """In how many groups the examples take turns: the bands of correlated noise, 1 for independent noise."""
        return len(self.statement.get("noise_coefficients") or (1.0,))

    @property
    def num_rounds(self) -> int:
        """How many times it consists of `step`: of its updates, or of rounds of all groups."""
        return self._rounds.num_steps

    @property
    def _rounds(self) -> accounting.Rounds:
        return accounting.rounds_of_run(
            num_groups=self.num_groups,
            sampling_probability=self.statement["sampling_probability"],
            num_steps=self.num_steps,
            truncation=accounting.Truncation(self.statement["num_examples"], self.statement["max_batch_size"]),
        )


class NoBoundError(ValueError):
    """Nothing bounds what these runs release together; the message says why."""


def seeds_are_given(runs: Sequence[SpentRun]) -> bool:
    """Whether a seed was given, so that someone may know it."""
    return any(run.seed(name) is not None for run in runs for name in ("sampling_seed", "noise_seed"))


def sharing(runs: Sequence[SpentRun]) -> list[int]:
    """The sampling seeds that several runs share, leaving out runs whose steps take all examples: they draw nothing."""
    seeds = Counter(run.seed("sampling_seed") for run in runs if run.statement["sampling_probability"] < 1)
    return [seed for seed, times in seeds.items() if seed is not None and times > 1]


def released(runs: Sequence[SpentRun]) -> Counter[Step]:
    """The independent steps that the runs together consist of.

    Args:
      runs: private runs on the same data.

    Returns:
      step -> number of such steps.

    Raises:
      NoBoundError: runs differ in their unit of privacy, share a noise seed, or share a sampling seed where their
        samples are not the same.
    """
    if len({run.unit for run in runs}) > 1:
        raise NoBoundError(
            "Some runs protect training examples, others users with all their rows (config.data.user_column): what "
            "they release together is bounded for neither here. Choose among runs of one unit."
        )
    noise = Counter(run.seed("noise_seed") for run in runs)
    if any(seed is not None and times > 1 for seed, times in noise.items()):
        raise NoBoundError(
            "Runs share a noise seed (config.privacy.noise_seed): the same noise cancels in the difference of two "
            "models, no bound for all of them together holds, and none for the best. That is right for a comparison "
            "on public or synthetic data. For a choice on private data leave the seeds out."
        )
    shared, steps = sharing(runs), Counter[Step]()
    for run in runs:
        if run.seed("sampling_seed") not in shared:
            steps[run.step] += run.num_rounds
    for seed in shared:
        steps.update(_on_shared_samples([run for run in runs if run.seed("sampling_seed") == seed]))
    return steps


def _on_shared_samples(runs: Sequence[SpentRun]) -> Mapping[Step, int]:
    """The steps of runs with one sampling seed.

    Raises:
      NoBoundError: their samples are not the same.
    """
    if len({(run.num_groups, run.step.sampling_probability, run.step.truncation, _rows(run)) for run in runs}) > 1:
        raise NoBoundError(
            "Runs share a sampling seed (config.privacy.sampling_seed), but differ in sampling probability, batch "
            "shape or data: their samples are neither the same nor independent, and no bound for all of them together "
            "is known here, and none for the best. For a choice on private data leave the seeds out."
        )
    return accounting.steps_on_shared_samples([(run.step, run.num_rounds) for run in runs])


def _rows(run: SpentRun) -> str:
    """The settings that decide which examples there are, and in which order."""
    data, synthetic = run.config.get("data") or {}, run.config.get("synthetic")
    made = (synthetic, run.config.get("seed")) if synthetic else None
    return json.dumps([[data.get(name) for name in _ROWS], made], sort_keys=True)
