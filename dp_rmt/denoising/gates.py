"""Gates decide which components of a noisy matrix count as signal. A gate is a value, so a config is what it says.

Each gate compares singular values with one threshold. With ``per="layer"`` a matrix is denoised if its largest value
passes, and all its values above the bulk edge are kept. With ``per="component"`` the values that pass are kept.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dp_rmt.random_matrix import marchenko_pastur, tracy_widom

Per = Literal["layer", "component"]

# Shrinkers give 0 at or below the bulk edge. The largest noise value exceeds it with probability 0.17 in the limit
# (Tracy-Widom's law at 0), 0.15 for 768 x 768 and 0.10 for 8 x 8, so a higher rate would not be reached.
_MAX_FALSE_ALARM = 0.1
# The distribution function is exact to about 1e-11.
_MIN_FALSE_ALARM = 1e-9


class _ThresholdGate(abc.ABC):
    """The part that all gates with a threshold share."""

    per: Per

    @abc.abstractmethod
    def threshold(self, *, rows: int, cols: int, noise_std: ArrayLike) -> ArrayLike:
        """The singular value above which a component passes, in the units of `noise_std`."""

    def passes(self, values: jax.Array, *, rows: int, cols: int, noise_std: ArrayLike) -> jax.Array:
        """Tells which components of each matrix pass.

        Args:
          values: singular values (..., K), descending: all min(rows, cols) of them, or only the leading K.
          rows: m, a static integer.
          cols: n, a static integer.
          noise_std: s, the standard deviation of one entry; a number or a traced scalar.

        Returns:
          bool, the shape of `values`.
        """
        above = values > self.threshold(rows=rows, cols=cols, noise_std=noise_std)
        return jnp.broadcast_to(above[..., :1], above.shape) if self.per == "layer" else above

    def cut(self, *, rows: int, cols: int, noise_std: ArrayLike) -> ArrayLike:
        """The largest value below which nothing can be kept, so that a search for components may stop there.

        Every shrinker gives 0 at or below the bulk edge e. Per layer, all values above e are kept once the largest one
        passes, so the cut is e. Per component the cut is `max(e, threshold)`.

        Args:
          rows: m, a static integer.
          cols: n, a static integer.
          noise_std: s, the standard deviation of one entry; a number or a traced scalar.

        Returns:
          A scalar in the units of `noise_std`; a Python float for a Python float.

        >>> [Kappa(2.0, per=per).cut(rows=4, cols=9, noise_std=2.0) for per in ("layer", "component")]
        [10.0, 20.0]
        """
        edge = cast(float, marchenko_pastur.bulk_edge(rows=rows, cols=cols, noise_std=1.0))
        if self.per == "component":
            edge = max(edge, cast(float, self.threshold(rows=rows, cols=cols, noise_std=1.0)))
        return noise_std * edge


@dataclasses.dataclass(frozen=True)
class Kappa(_ThresholdGate):
    """The paper's gate, which compares singular values with ``kappa * e``, e the bulk edge (arXiv 2510.01137).

    Attributes:
      kappa: the multiple of the bulk edge; dimensionless, at least 0.
      per: "layer" denoises a matrix if its largest singular value passes; "component" keeps the values that pass.
    """

    kappa: float = 1.0
    per: Per = "layer"

    def __post_init__(self) -> None:
        if not self.kappa >= 0:
            raise ValueError(f"kappa must be at least 0, got {self.kappa}; 1.0 is the edge of the noise")
        _check_per(self.per)

    def threshold(self, *, rows: int, cols: int, noise_std: ArrayLike) -> ArrayLike:
        """The singular value above which a component passes: ``kappa * e``."""
        return self.kappa * marchenko_pastur.bulk_edge(rows=rows, cols=cols, noise_std=noise_std)


@dataclasses.dataclass(frozen=True)
class TracyWidom(_ThresholdGate):
    """A gate by its false alarms: a matrix of pure noise passes with probability `false_alarm`.

    The threshold is the quantile ``1 - false_alarm`` of the largest singular value of ``s N`` at the matrix's own size
    (`dp_rmt.random_matrix.tracy_widom.largest_singular_value_quantile`). With ``per="component"`` the probability that
    more components are kept than the signal has is at most `false_alarm`, since ``y_(k+1)(G + s N) <= s y_1(N)`` for a
    signal of rank k (Weyl). The rate was measured on noise of the shapes of language models and of LoRA factors, and is
    what it says (tests/laws/test_false_alarms.py).

    Attributes:
      false_alarm: the probability, from 1e-9 to 0.1. A higher one is refused because it would not hold: shrinkers keep
        nothing below the bulk edge, which pure noise exceeds with a probability of 0.10 (8 x 8) to 0.17.
      per: "layer" denoises a matrix if its largest singular value passes; "component" keeps the values that pass.

    >>> round(TracyWidom(0.01).threshold(rows=768, cols=768, noise_std=1.0) / (2 * 768**0.5), 4)
    1.0072
    """

    false_alarm: float = 0.01
    per: Per = "layer"

    def __post_init__(self) -> None:
        if not _MIN_FALSE_ALARM <= self.false_alarm <= _MAX_FALSE_ALARM:
            raise ValueError(
                f"false_alarm must be from {_MIN_FALSE_ALARM} to {_MAX_FALSE_ALARM}, got {self.false_alarm}: shrinkers "
                "keep nothing below the bulk edge, which pure noise itself exceeds in at most 17% of matrices. For a "
                "gate at the edge use Kappa(1.0)."
            )
        _check_per(self.per)

    def threshold(self, *, rows: int, cols: int, noise_std: ArrayLike) -> ArrayLike:
        """The singular value above which a component passes: the quantile of the largest one of pure noise."""
        return tracy_widom.largest_singular_value_quantile(
            1 - self.false_alarm, rows=rows, cols=cols, noise_std=noise_std
        )


Gate = Kappa | TracyWidom


def _check_per(per: str) -> None:
    if per not in ("layer", "component"):
        raise ValueError(f"a gate decides per 'layer' or per 'component', got {per!r}")
