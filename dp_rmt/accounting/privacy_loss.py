"""The privacy loss distribution of one step, discretised so that every bound from it is an upper bound."""

from __future__ import annotations

import functools
from typing import Any

from dp_accounting.pld import privacy_loss_distribution

from dp_rmt.accounting.step import Step

# Bins of the discretised privacy loss. For results, the default of dp_accounting, so that numbers agree with
# those of others; coarser, in a tenth of the time, for the search inside calibration.
BIN, SEARCH_BIN = 1e-4, 1e-3


@functools.lru_cache(maxsize=2)  # epsilon and the trade-off curve of a run ask for the same one
def composed_privacy_loss(step: Step, num_steps: int, pld_bin: float = BIN) -> Any:
    """The privacy loss distribution of `num_steps` times this step."""
    return privacy_loss_of(step, pld_bin).self_compose(num_steps)


@functools.lru_cache(maxsize=4)  # one distribution takes megabytes
def privacy_loss_of(step: Step, pld_bin: float) -> Any:
    """The privacy loss distribution of one step, pessimistic, both for adding and for removing an example."""
    sigma, q = step.noise_multiplier, step.sampling_probability
    if step.truncation is None:
        return privacy_loss_distribution.from_gaussian_mechanism(
            sigma, value_discretization_interval=pld_bin, sampling_prob=q
        )
    num_examples, max_batch_size = step.truncation.num_examples, step.truncation.max_batch_size
    return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
        num_examples, q, max_batch_size, sigma, value_discretization_interval=pld_bin
    )
