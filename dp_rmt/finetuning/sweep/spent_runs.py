"""What several runs release together, step by step: those that share a sampling seed share their samples.

Alone, a run is amplified by sampling: an example is in a step with probability q, and nobody knows whether it is. Runs
with the same sampling seed have an example in the same steps, all or none, so that they are not independent, and their
privacy losses do not add up as if they were. But they are one mechanism that the accountants know: given the sample, k
releases of sums with noise multipliers z_1 .. z_k are one release of all sums side by side, each over its own noise, of
sensitivity ``sqrt(sum 1 / z_i^2)``: the Poisson-sampled Gaussian of the noise multiplier ``1 / sqrt(sum 1 / z_i^2)``,
by z / sqrt(k) for equal ones. A later run may have been chosen by the results of an earlier one: for independent noise
each release is a rotation, and a loss, of the Gaussian of full sensitivity, whatever came before.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_ROWS = ("task", "path", "train_split", "max_train_examples")
"""Keys of config.data that say which examples there are, and in which order."""


class Run(NamedTuple):
    """What is asked of a run.

    Attributes:
      job: its job, the unit that is repeated.
      statement: content of its `privacy.json`.
      config: content of its `config.json`.
    """

    job: str
    statement: Mapping[str, Any]
    config: Mapping[str, Any]

    def seed(self, name: str) -> int | None:
        """The given "sampling_seed" or "noise_seed"; None where it was drawn for this run alone."""
        return self.config["privacy"].get(name)


class Mechanism(NamedTuple):
    """One step of one run, or of several on the same samples."""

    noise_multiplier: float
    sampling_probability: float
    num_examples: int
    max_batch_size: int


class NoBoundError(ValueError):
    """Nothing bounds what these runs release together; the message says why."""


def seeds_are_given(runs: Sequence[Run]) -> bool:
    """Whether someone may know a seed."""
    return any(run.seed(name) is not None for run in runs for name in ("sampling_seed", "noise_seed"))


def sharing(runs: Sequence[Run]) -> list[int]:
    """The sampling seeds that more than one run has, where that matters: a step that takes everybody tells nothing."""
    seeds = Counter(run.seed("sampling_seed") for run in runs if run.statement["sampling_probability"] < 1)
    return [seed for seed, times in seeds.items() if seed is not None and times > 1]


def released(runs: Sequence[Run]) -> Counter[Mechanism]:
    """The independent steps that the runs together consist of.

    Args:
      runs: on the same data, each private.

    Returns:
      mechanism -> number of its steps.

    Raises:
      NoBoundError: runs share a noise seed, or a sampling seed where their samples are not the same.
    """
    noise = Counter(run.seed("noise_seed") for run in runs)
    if any(seed is not None and times > 1 for seed, times in noise.items()):
        raise NoBoundError(
            "Runs share a noise seed (config.privacy.noise_seed): the same noise cancels in the difference of two "
            "models, no bound for all of them together holds, and none for the best. That is right for a comparison "
            "on public or synthetic data. For a choice on private data leave the seeds out."
        )
    shared, steps = sharing(runs), Counter[Mechanism]()
    for run in runs:
        if run.seed("sampling_seed") not in shared:
            steps[_mechanism(run)] += run.statement["num_steps"]
    for seed in shared:
        for mechanism, count in _side_by_side([run for run in runs if run.seed("sampling_seed") == seed]):
            steps[mechanism] += count
    return steps


def _side_by_side(runs: Sequence[Run]) -> Iterator[tuple[Mechanism, int]]:
    """The steps of runs on the same samples; a run that ends leaves those that go on.

    Raises:
      NoBoundError: their samples are not the same.
    """
    if len({(*_mechanism(run)[1:], _rows(run)) for run in runs}) > 1:
        raise NoBoundError(
            "Runs share a sampling seed (config.privacy.sampling_seed), but differ in sampling probability, batch "
            "shape or data: their samples are neither the same nor independent, and no bound for all of them together "
            "is known here, and none for the best. For a choice on private data leave the seeds out."
        )
    done = 0
    for end in sorted({run.statement["num_steps"] for run in runs}):
        going = [run.statement["noise_multiplier"] for run in runs if run.statement["num_steps"] >= end]
        noise_multiplier = 1 / math.sqrt(math.fsum(z**-2 for z in going))
        yield _mechanism(runs[0])._replace(noise_multiplier=noise_multiplier), end - done
        done = end


def _mechanism(run: Run) -> Mechanism:
    return Mechanism(*(run.statement[name] for name in Mechanism._fields))


def _rows(run: Run) -> str:
    """What decides about the examples and their order."""
    data, synthetic = run.config.get("data") or {}, run.config.get("synthetic")
    made = (synthetic, run.config.get("seed")) if synthetic else None
    return json.dumps([[data.get(name) for name in _ROWS], made], sort_keys=True)
