"""Canary exposure (Carlini et al. 2019, arXiv 1802.08232): how much better than chance a model ranks a secret.

With R the space of all secrets that the canary might have held, ``exposure = log2 |R| - log2 rank``: the bits of
guessing that the model saves. It is 0 for the canary that comes last, 1 in the middle, and log2 |R| for the first.
"""

from __future__ import annotations

import numpy as np
from scipy import stats


def exact_exposure(canary_loss: float, other_losses: np.ndarray) -> float:
    """``log2 |R| - log2 rank``, from the losses of all other secrets of the space.

    Args:
      canary_loss: loss of the planted secret.
      other_losses: (|R| - 1,) losses of all other secrets. Equal losses count against the canary.

    Returns:
      bits, from 0 to log2 |R|.

    Raises:
      ValueError: a loss is not a number, or there is no other secret.

    >>> exact_exposure(0.5, np.array([1.0, 2.0, 0.1]))  # second of four
    1.0
    """
    _check(canary_loss, other_losses, at_least=1)
    rank = 1 + int(np.sum(np.asarray(other_losses) <= canary_loss))
    return float(np.log2(len(other_losses) + 1) - np.log2(rank))


def sampled_exposure(canary_loss: float, sampled_losses: np.ndarray) -> float:
    """``-log2 P[loss <= canary's]`` by a skew-normal fitted to the losses of random secrets.

    It is for spaces too large to rank (section 4.4 of Carlini et al.). Losses of random secrets are close to
    skew-normal, and the fitted distribution function extends beyond the lowest of them. Without extrapolation n samples
    could show no more than log2 n bits. The fit is by maximum likelihood and starts from the moments. Its far tail is
    only as good as the family.

    Args:
      canary_loss: loss of the planted secret.
      sampled_losses: (n,) losses of uniformly random secrets, n at least 100.

    Returns:
      bits, at least 0.

    Raises:
      ValueError: a loss is not a number, all are equal, or there are fewer than 100.
    """
    _check(canary_loss, sampled_losses, at_least=100)
    losses = np.asarray(sampled_losses, float)
    centre, scale = losses.mean(), losses.std()
    if scale == 0:
        raise ValueError("sampled_exposure: all sampled losses are equal, which fits no distribution")
    standardised = (losses - centre) / scale
    shape, location, width = stats.skewnorm.fit(standardised, *_by_moments(stats.skew(standardised)))
    return float(max(-stats.skewnorm.logcdf((canary_loss - centre) / scale, shape, location, width) / np.log(2), 0.0))


def _by_moments(skewness: float) -> tuple[float]:
    """The shape whose skew-normal has this skewness (within what the family can have), to start from."""
    ratio = np.abs(np.clip(skewness, -0.9, 0.9)) ** (2 / 3)
    delta = np.sqrt(np.pi / 2 * ratio / (ratio + ((4 - np.pi) / 2) ** (2 / 3))) * np.sign(skewness)
    return (float(delta / np.sqrt(1 - delta**2)),)


def _check(canary_loss: float, losses: np.ndarray, *, at_least: int) -> None:
    if len(losses) < at_least:
        raise ValueError(f"exposure needs the losses of {at_least} other secrets or more, got {len(losses)}")
    if not np.isfinite(canary_loss) or not np.all(np.isfinite(losses)):
        raise ValueError("exposure: a loss is not finite; the model or the secret is broken")
