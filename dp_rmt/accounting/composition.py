"""The epsilon of a run, which is one step composed with itself, and of several runs together."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import cast, get_args

import numpy as np

from dp_rmt.accounting.noise_support import delta_of_truncation
from dp_rmt.accounting.privacy_loss import composed_privacy_loss, is_nearly_exact, rounding_allowance
from dp_rmt.accounting.renyi import composed_divergences, epsilon_of_divergences
from dp_rmt.accounting.step import (
    Accountant,
    Step,
    Steps,
    Truncation,
    validated_delta,
    validated_num_steps,
)
from dp_rmt.arguments import one_of


def epsilon(
    *,
    noise_multiplier: float,
    delta: float,
    sampling_probability: float,
    num_steps: int,
    accountant: Accountant = "pld",
    truncation: Truncation | None = None,
    noise_support: float = math.inf,
) -> float:
    """The epsilon of (epsilon, delta)-differential privacy after `num_steps` steps; an upper bound.

    Args:
      noise_multiplier: std of the noise in the sum of clipped gradients, over the clip norm; 0 gives no privacy.
      delta: the probability with which the guarantee may fail, in (0, 1).
      sampling_probability: probability with which a step samples each example, in (0, 1].
      num_steps: number of steps, at least 1.
      accountant: "pld" for privacy loss distributions. Where these have too few digits (a delta below 1e-13 or so, see
        `epsilon_by_accountant`), "pld" takes the lower one of both bounds. "rdp" takes Renyi divergences alone.
      truncation: the fixed shape of the batch; None if no batch can overflow.
      noise_support: where the noise ends, in standard deviations; infinite for a Gaussian in exact arithmetic. What is
        missing beyond that is part of delta, see `delta_of_truncation`.

    Returns:
      The epsilon, in nats; infinite where the accountant knows no finite bound.

    Raises:
      ValueError: an argument is out of its range.

    >>> round(epsilon(noise_multiplier=1.5, delta=1e-5, sampling_probability=0.04, num_steps=2250), 4)
    6.7688
    """
    (value,) = epsilon_curve(
        noise_multiplier=noise_multiplier,
        delta=delta,
        sampling_probability=sampling_probability,
        steps=(num_steps,),
        accountant=accountant,
        truncation=truncation,
        noise_support=noise_support,
    )
    return float(value)


def epsilon_curve(
    *,
    noise_multiplier: float,
    delta: float,
    sampling_probability: float,
    steps: Sequence[int],
    accountant: Accountant = "pld",
    truncation: Truncation | None = None,
    noise_support: float = math.inf,
) -> np.ndarray:
    """The epsilon after each of several numbers of steps of one run, each exactly what `epsilon` says.

    One step is analysed once and composed with itself. A further point costs 0.2 to 1 seconds ("pld") or 20
    milliseconds ("rdp"). Nothing is interpolated; between two points, the later one is an upper bound.

    Arguments and errors are those of `epsilon`, but for
      steps: numbers of steps, each at least 1, in any order.

    Returns:
      A float64 array (len(steps),) of epsilons.

    >>> epsilon_curve(noise_multiplier=1.0, delta=1e-5, sampling_probability=0.01, steps=(10, 1000)).round(2)
    array([0.38, 1.83])
    """
    step = Step(noise_multiplier, sampling_probability, truncation)
    accountant = validated_accountant(accountant)
    delta = validated_delta(delta)
    bounds = [composed_epsilon(((step, validated_num_steps(n)),), delta, accountant, noise_support) for n in steps]
    return np.array(bounds, np.float64)


def epsilon_by_accountant(
    *,
    noise_multiplier: float,
    delta: float,
    sampling_probability: float,
    num_steps: int,
    truncation: Truncation | None = None,
    noise_support: float = math.inf,
) -> dict[str, float]:
    """The bound of each accountant alone, by its name. Each bound holds, and the lower one is `epsilon`.

    Privacy loss distributions are nearly exact down to a delta of about 1e-12. Below 2e-16 a step they say infinity,
    because the Fourier transform that composes them has no digits left. Renyi divergences are looser, and much looser
    for truncated batches, but have no such floor.

    Arguments and errors are those of `epsilon`.

    >>> bounds = epsilon_by_accountant(noise_multiplier=1.5, delta=1e-5, sampling_probability=0.04, num_steps=2250)
    >>> {name: round(bound, 4) for name, bound in bounds.items()}
    {'pld': 6.7688, 'rdp': 7.3293}
    """
    step = Step(noise_multiplier, sampling_probability, truncation)
    num_steps, delta = validated_num_steps(num_steps), validated_delta(delta)
    whole = ((step, num_steps),)
    spent = gaussian_delta(whole, delta, noise_support)
    return {name: _bound(whole, spent, name, 1.0) for name in get_args(Accountant)}


def epsilon_of_composition(steps: Mapping[Step, int], *, delta: float, noise_support: float = math.inf) -> float:
    """The epsilon of several runs together, whose steps are all independent; an upper bound.

    The privacy losses of all steps are counted in bins of one width, which is chosen as for a single run. Where these
    have too few digits, the bound is the lower one of both accountants. For one run the result is that of `epsilon`.

    Args:
      steps: how many steps of each kind the runs have taken, at least one of each.
      delta, noise_support: as in `epsilon`.

    Returns:
      The epsilon, in nats; infinite where neither accountant knows a finite bound.

    Raises:
      ValueError: there is no step, or an argument is out of its range.

    >>> first, second = Step(1.0, sampling_probability=0.01), Step(2.0, sampling_probability=0.04)
    >>> round(epsilon_of_composition({first: 1000, second: 500}, delta=1e-5), 4)
    2.7291
    """
    whole = tuple((step, validated_num_steps(count)) for step, count in steps.items())
    if not whole:
        raise ValueError("epsilon_of_composition: steps is empty; give a number of steps for each kind of step.")
    return composed_epsilon(whole, validated_delta(delta), "pld", noise_support)


def validated_accountant(accountant: str) -> Accountant:
    """Returns the accountant's name, which must be one of those in `Accountant`."""
    return cast(Accountant, one_of("accountant", accountant, get_args(Accountant)))


def gaussian_delta(steps: Steps, delta: float, noise_support: float) -> float:
    """What the end of the noise's support leaves of delta for a run's Gaussians; it may be negative."""
    return delta - math.fsum(
        delta_of_truncation(
            noise_support=noise_support,
            noise_multiplier=step.noise_multiplier,
            sampling_probability=step.sampling_probability,
            num_steps=count,
            truncation=step.truncation,
        )
        for step, count in steps
    )


def composed_epsilon(
    steps: Steps, delta: float, accountant: Accountant, noise_support: float, coarseness: float = 1.0
) -> float:
    """The epsilon of all these steps together, with bins `coarseness` times as wide as those of results."""
    spent = gaussian_delta(steps, delta, noise_support)
    bound = _bound(steps, spent, accountant, coarseness)
    if accountant == "rdp" or _lacks_noise(steps) or is_nearly_exact(steps, spent):
        return bound
    return min(bound, _bound(steps, spent, "rdp", coarseness))


@functools.lru_cache(maxsize=256)  # the arms of an experiment, and a resumed run, ask the same questions
def _bound(steps: Steps, delta: float, accountant: str, coarseness: float) -> float:
    if _lacks_noise(steps) or delta <= 0:
        return math.inf
    if accountant == "pld":
        if (left := delta - rounding_allowance(steps)) <= 0:
            return math.inf
        return float(composed_privacy_loss(steps, coarseness).get_epsilon_for_delta(left))
    return epsilon_of_divergences(composed_divergences(steps), delta)


def _lacks_noise(steps: Steps) -> bool:
    return any(step.noise_multiplier == 0 for step, _ in steps)
