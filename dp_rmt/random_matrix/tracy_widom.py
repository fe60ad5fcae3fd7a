"""The fluctuation of the largest noise singular value: how far above the bulk edge chance alone can reach.

Everything here is a plain Python number in double precision, because probabilities are static and a quantile is
computed once.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from jax.typing import ArrayLike
from scipy import optimize, special

from dp_rmt.random_matrix import largest_noise_value

# Ai(16) is about 1e-20, so the kernel is nil beyond.
_AIRY_END = 16.0
_NUM_NODES = 64
# Beyond these, 1 - probability or probability drowns in the rounding of the determinant.
_SMALLEST_TAIL = 1e-12
# Up to this shorter side the exact quantile takes a fraction of a second. Above it the law is right to 2% of a
# false-alarm rate of 0.1, 3% of 0.01 and 12% of 0.001, and the larger the matrix, the better.
_EXACT_UP_TO = 64


def cdf(x: float) -> float:
    """The distribution function of the Tracy-Widom law of real matrices (beta = 1).

    `F_1(x) = det(I - K)` on `L^2(0, inf)` with the kernel `K(u, v) = Ai((u + v) / 2 + x) / 2` (Ferrari &
    Spohn 2005), by Gauss-Legendre quadrature (Bornemann 2010). The absolute error is below 1e-13.

    Args:
      x: a real number.

    Returns:
      The probability that the centred and scaled largest eigenvalue is at most `x`.

    >>> round(cdf(0.9793), 4)
    0.95
    """
    if x <= -12.0:
        return 0.0  # F_1 falls like exp(-|x|^3 / 24): below 1e-31
    if x >= _AIRY_END:
        return 1.0
    nodes, weights = np.polynomial.legendre.leggauss(_NUM_NODES)
    length = _AIRY_END - x
    points = length * (nodes + 1) / 2
    root_weights = np.sqrt(length * weights / 2)
    kernel = special.airy((points[:, None] + points[None, :]) / 2 + x)[0] / 2
    determinant = np.linalg.det(np.eye(_NUM_NODES) - root_weights[:, None] * kernel * root_weights[None, :])
    return float(np.clip(determinant, 0.0, 1.0))


@functools.lru_cache(maxsize=256)
def quantile(probability: float) -> float:
    """A quantile of the Tracy-Widom law of real matrices (beta = 1): the root of `cdf(x) = probability`.

    Args:
      probability: between 1e-12 and 1 - 1e-12.

    Returns:
      x with `cdf(x) == probability`.

    Raises:
      ValueError: if `probability` is outside that range.

    >>> round(quantile(0.99), 4)
    2.0234
    """
    _check_probability(probability)
    return float(optimize.brentq(lambda x: cdf(x) - probability, -12.0, _AIRY_END, xtol=1e-12))


def largest_singular_value_quantile(probability: float, *, rows: int, cols: int, noise_std: ArrayLike) -> ArrayLike:
    """A quantile of the largest singular value of a matrix of pure noise, at finite size.

    It is `s sqrt(mu + sigma q)` with q the Tracy-Widom quantile, `mu = (sqrt(m - 1/2) + sqrt(n - 1/2))^2` and `sigma =
    sqrt(mu) (1 / sqrt(m - 1/2) + 1 / sqrt(n - 1/2))^(1/3)` (Johnstone 2001). The halves are those of Ma (2012): with
    them the error is of the order min(m, n)^(-2/3), and rows and columns are treated alike. Where the shorter side is
    64 or less, the quantile is the exact one of `dp_rmt.random_matrix.largest_noise_value`.

    Args:
      probability: the chance that noise alone stays below the quantile; a static number, 1 - (the rate of false
        alarms).
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar.

    Returns:
      A scalar in the units of `noise_std`; a Python float for a Python float.

    Raises:
      ValueError: if `probability` is out of range, or `rows` or `cols` is not positive.
    """
    if rows < 1 or cols < 1:
        raise ValueError(f"rows={rows}, cols={cols}: a matrix needs at least one row and one column.")
    if min(rows, cols) <= _EXACT_UP_TO:
        _check_probability(probability)
        return noise_std * largest_noise_value.quantile(probability, rows=rows, cols=cols)
    root_rows, root_cols = math.sqrt(rows - 0.5), math.sqrt(cols - 0.5)
    centre = (root_rows + root_cols) ** 2
    scale = (root_rows + root_cols) * (1 / root_rows + 1 / root_cols) ** (1 / 3)
    return noise_std * math.sqrt(centre + scale * quantile(probability))


def _check_probability(probability: float) -> None:
    if not _SMALLEST_TAIL <= probability <= 1 - _SMALLEST_TAIL:
        raise ValueError(
            f"probability={probability} must lie in [{_SMALLEST_TAIL}, 1 - {_SMALLEST_TAIL}]: the tails "
            "beyond are not resolved in double precision. For a false-alarm rate a, pass 1 - a."
        )
