"""What several runs on the same samples release together.

Alone, a run is amplified by sampling: an example is in a step with probability q, and nobody knows whether it is. Runs
with the same sampling seed have an example in the same steps, all or none, so that they are not independent, and their
privacy losses do not add up as if they were. But they are one mechanism that the accountants know: given the sample, k
releases of sums with noise multipliers z_1 .. z_k are one release of all sums side by side, each over its own noise, of
sensitivity ``sqrt(sum 1 / z_i^2)``: the Poisson-sampled Gaussian of the noise multiplier ``1 / sqrt(sum 1 / z_i^2)``,
by z / sqrt(k) for equal ones. A later run may have been chosen by the results of an earlier one: for independent noise
each release is a rotation, and a loss, of the Gaussian of full sensitivity, whatever came before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from dp_rmt.accounting.step import Step


def steps_on_shared_samples(runs: Sequence[tuple[Step, int]]) -> dict[Step, int]:
    """The independent steps that runs on the same samples consist of; a run that ends leaves those that go on.

    Args:
      runs: a step of each run, and how many of them it has taken, from the first sample on. Their noise is independent,
        and not 0.

    Returns:
      A step of all runs that go on together -> how many of these there are; for `epsilon_of_composition`.

    Raises:
      ValueError: the runs differ in sampling probability or batch shape, so that their samples are not the same.

    >>> long, short = Step(3.0, sampling_probability=0.01), Step(4.0, sampling_probability=0.01)
    >>> {step.noise_multiplier: count for step, count in steps_on_shared_samples([(long, 10), (short, 6)]).items()}
    {2.4: 6, 3.0: 4}
    """
    if len({(step.sampling_probability, step.truncation) for step, _ in runs}) > 1:
        raise ValueError("runs on the same samples have one sampling probability and one truncation; these differ")
    steps: dict[Step, int] = {}
    done = 0
    for end in sorted({count for _, count in runs}):
        going = [step.noise_multiplier for step, count in runs if count >= end]
        together = dataclasses.replace(runs[0][0], noise_multiplier=1 / math.sqrt(math.fsum(z**-2 for z in going)))
        steps[together] = steps.get(together, 0) + end - done
        done = end
    return steps
