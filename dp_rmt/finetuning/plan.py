"""The plan of a run: what follows from its settings and the number of examples, checked before a model is loaded."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dp_rmt.clipping.quantile import QuantileClipping
from dp_rmt.correlated_noise import square_root
from dp_rmt.finetuning import defaults
from dp_rmt.finetuning.settings import Privacy, Settings
from dp_rmt.mechanism import DPSGD
from dp_rmt.reporting.numbers import number
from dp_rmt.training import processes
from dp_rmt.training.guarantee import check_delta
from dp_rmt.types import Unit

Planned = Callable[[int, Sequence[str]], None]
"""Told the number of training examples (or users), and what was found in the data, before a model is loaded."""


def delta_for(privacy: Privacy, num_examples: int, unit: Unit = "example") -> float:
    """The delta of a run on this many training examples (or users): the one that is set, or N^-1.1.

    Raises:
      ValueError: a run that is to be private has a delta above 1 / sqrt(N).
    """
    delta = privacy.delta if privacy.delta is not None else num_examples**-1.1
    if math.isfinite(privacy.epsilon):
        check_delta(delta, num_examples, "config.privacy.delta", unit)
    return delta


def build_mechanism(settings: Settings, num_examples: int) -> tuple[DPSGD, float]:
    """The DP-SGD of a run on this many training examples, and its delta.

    Args:
      settings: privacy and train are read.
      num_examples: rows of the training data, or its users where `data.user_column` is set.

    Returns:
      ``(mechanism, delta)``.

    Raises:
      ValueError: the batch does not fit the data, or epsilon cannot be reached.
    """
    privacy, train = settings.privacy, settings.train
    unit: Unit = "example" if settings.data.user_column is None else "user"
    delta = delta_for(privacy, num_examples, unit)
    batch_size = defaults.expected_batch_size(privacy.expected_batch_size, num_examples)
    options: dict[str, Any] = {
        "num_examples": num_examples,
        "expected_batch_size": batch_size,
        "num_steps": defaults.num_steps(train.num_steps, train.epochs, num_examples, batch_size),
        "clip": privacy.clip,
        "max_batch_size": privacy.max_batch_size,
        "batch_multiple_of": 1 if train.microbatch_size == "auto" else train.microbatch_size,
        "accountant": privacy.accountant,
        "rows_per_user": privacy.rows_per_user if unit == "user" else None,
        "noise_generator": privacy.noise_generator,
    }
    try:
        if batch_size > num_examples:
            raise ValueError(
                f"config.privacy.expected_batch_size={batch_size} is more than there are. Lower it, or give None for "
                f"{defaults.expected_batch_size(None, num_examples)}, which follows their number"
            )
        if math.isinf(privacy.epsilon):
            return DPSGD(**options, l2_clip_norm=math.inf, noise_multiplier=0.0), delta
        options["l2_clip_norm"] = privacy.l2_clip_norm
        if privacy.clip_quantile is not None:
            options["clip_quantile"] = QuantileClipping(
                privacy.clip_quantile, privacy.clip_quantile_share, privacy.clip_quantile_rate
            )
        if privacy.noise_bands > 1:
            options["noise_strategy"] = square_root(privacy.noise_bands)
        return _calibrated(privacy.epsilon, delta, tuple(options.items())), delta
    except ValueError as error:
        raise ValueError(f"config.privacy and config.train on {num_examples} training {unit}s: {error}") from error


@functools.lru_cache(maxsize=64)
def _calibrated(epsilon: float, delta: float, options: tuple[tuple[str, Any], ...]) -> DPSGD:
    """The calibrated mechanism; it takes seconds, and is asked for before the model is loaded and after."""
    return DPSGD.calibrated(epsilon=epsilon, delta=delta, **dict(options))


def plan(settings: Settings, num_examples: int) -> str:
    """The plan in one sentence, such as "600 rows, batch 64, 28 steps, noise 1.31, epsilon 8, delta 0.000879".

    Raises:
      ValueError: as `build_mechanism`.
    """
    mechanism, delta = build_mechanism(settings, num_examples)
    counted = "rows" if mechanism.unit == "example" else "users"
    parts = [
        f"{num_examples:,} {counted}",
        f"batch {mechanism.expected_batch_size:g}",
        f"{mechanism.num_steps:,} steps",
    ]
    if mechanism.noise_multiplier == 0:
        return ", ".join([*parts, "no noise, and no privacy"])
    noise = f"noise {mechanism.noise_multiplier:.3g}"
    if mechanism.num_groups > 1:
        noise += f" correlated over {mechanism.num_groups} steps"
    return ", ".join(
        [*parts, noise, f"epsilon {number(settings.privacy.epsilon, 'up')}", f"delta {number(delta, 'up')}"]
    )


def print_plans(each: Mapping[str, Settings], num_examples: int, notes: Sequence[str]) -> None:
    """Checks the plans of all arms that train on the same rows, and prints them to the terminal.

    Raises:
      ValueError: as `build_mechanism`.
    """
    lines = [f"data: {note}" for note in notes]
    for name, settings in each.items():
        lines.append(f"plan{f' of {name}' if len(each) > 1 else ''}: {plan(settings, num_examples)}")
    if processes.is_first():
        print("\n".join(lines), file=sys.stderr)  # the results alone go to the standard output
