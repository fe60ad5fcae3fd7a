"""The epsilon of a run: one step composed with itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant

from dp_rmt.accounting.privacy_loss import BIN, composed_privacy_loss
from dp_rmt.accounting.renyi import renyi_divergences
from dp_rmt.accounting.step import Accountant, Step, Truncation, validate_num_steps


def epsilon(
    *,
    noise_multiplier: float,
    delta: float,
    sampling_probability: float,
    num_steps: int,
    accountant: Accountant = "pld",
    truncation: Truncation | None = None,
) -> float:
    """The epsilon of (epsilon, delta)-differential privacy after `num_steps` steps; an upper bound.

    Args:
      noise_multiplier: std of the noise in the sum of clipped gradients, over the clip norm; 0: no privacy.
      delta: in (0, 1), the probability with which the guarantee may fail.
      sampling_probability: probability with which a step samples each example, in (0, 1].
      num_steps: number of steps, at least 1.
      accountant: "pld" (tight) or "rdp".
      truncation: the fixed shape of the batch; None if no batch can overflow.

    Returns:
      epsilon, in nats; infinite where the accountant knows no finite bound.

    Raises:
      ValueError: an argument is out of its range.

    >>> round(epsilon(noise_multiplier=1.5, delta=1e-5, sampling_probability=0.04, num_steps=2250), 4)
    6.7688
    """
    step = Step(float(noise_multiplier), float(sampling_probability), truncation, accountant)
    return composed_epsilon(step, num_steps, delta)


def epsilon_curve(
    *,
    noise_multiplier: float,
    delta: float,
    sampling_probability: float,
    steps: Sequence[int],
    accountant: Accountant = "pld",
    truncation: Truncation | None = None,
) -> np.ndarray:
    """The epsilon after each of several numbers of steps of one run, each exactly what `epsilon` says.

    One step is analysed once and composed with itself; a further point costs 0.2 to 1 seconds ("pld") or 20
    milliseconds ("rdp"). Nothing is interpolated: between two points, the later one is an upper bound.

    Args, Raises: as in `epsilon`, but
      steps: numbers of steps, each at least 1, in any order.

    Returns:
      float64 array (len(steps),) of epsilons.

    >>> epsilon_curve(noise_multiplier=1.0, delta=1e-5, sampling_probability=0.01, steps=(10, 1000)).round(2)
    array([0.38, 1.83])
    """
    step = Step(float(noise_multiplier), float(sampling_probability), truncation, accountant)
    return np.array([composed_epsilon(step, num_steps, delta) for num_steps in steps], np.float64)


def composed_epsilon(step: Step, num_steps: int, delta: float, pld_bin: float = BIN) -> float:
    """The epsilon of `num_steps` times this step, by its accountant, with bins of this width."""
    validate_num_steps(num_steps)
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}; usual: less than 1 / (data size).")
    return math.inf if step.noise_multiplier == 0 else _epsilon(step, num_steps, delta, pld_bin)


@functools.lru_cache(maxsize=256)  # the arms of an experiment, and a resumed run, ask the same questions
def _epsilon(step: Step, num_steps: int, delta: float, pld_bin: float) -> float:
    if step.accountant == "pld":
        return float(composed_privacy_loss(step, num_steps, pld_bin).get_epsilon_for_delta(delta))
    orders = rdp_privacy_accountant.RdpAccountant().orders
    return float(rdp_privacy_accountant.compute_epsilon(orders, num_steps * renyi_divergences(step), delta)[0])
