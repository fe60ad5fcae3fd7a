"""Numbers and tables as people read them."""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence
from typing import Literal

Rounding = Literal["nearest", "up", "down"]


def number(value: float, rounding: Rounding = "nearest") -> str:
    """A number for people: integers with separators, others in four digits.

    An upper bound (epsilon, delta) is rounded "up", and a lower bound (an audit) "down", so that both stay bounds as
    they are printed.

    >>> number(67349.0), number(0.77182), number(1e-5)
    ('67,349', '0.7718', '1e-5')
    >>> number(8.00049), number(8.00049, "up"), number(1.23456e-5, "up"), number(2.99999, "down")
    ('8', '8.001', '1.235e-5', '2.999')
    """
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e9):
        return f"{int(value):,}"
    if math.isfinite(value):  # decimal arithmetic, in which 0.1 stays 0.1 and a number above it is rounded up
        value = float(decimal.Context(prec=4, rounding=_ROUNDING[rounding]).create_decimal(repr(float(value))))
    return f"{value:.4g}".replace("e-0", "e-")


_ROUNDING = {"nearest": decimal.ROUND_HALF_EVEN, "up": decimal.ROUND_CEILING, "down": decimal.ROUND_FLOOR}


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as aligned lines: the first column to the left, the others to the right.

    >>> print(align([["arm", "score"], ["noisy", "0.9"]]))
    arm    score
    noisy    0.9
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )


def percent(share: float) -> str:
    """The share in percent, rounded up, in decimal arithmetic: in floats 100 times .2504 is above 25.04.

    >>> percent(0.2504)
    '25.04%'
    """
    return f"{number(float(decimal.Decimal(repr(float(share))).scaleb(2)), 'up')}%"
