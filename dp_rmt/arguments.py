"""Checks of arguments: exact integers and real numbers of any library pass, anything else is refused by name."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import dtypes


class ArgumentTypeError(TypeError, ValueError):
    """An argument is not a number of the wanted kind. Either base class catches it."""


def integer(name: str, value: Any, wanted: str, holds: Callable[[int], bool]) -> int:
    """Turns an int, or an integer scalar of NumPy or JAX, into a Python int; refuses bools, floats and traced values.

    Args:
      name: the argument's name.
      value: what was given.
      wanted: what the argument must be; it follows the word "must" in the message.
      holds: tells whether an integer is in range.

    Raises:
      ArgumentTypeError: the value is not an integer; the message says what to give.
      ValueError: the value is out of range.

    >>> integer("num_steps", np.int64(5), "be at least 1 and an integer", lambda n: n >= 1)
    5
    """
    try:
        number = None if _is_bool(value) else operator.index(value)
    except TypeError:  # floats, strings, None, arrays of several entries, traced values
        number = None
    if number is None:
        raise ArgumentTypeError(f"{name} must {wanted}, got {_shown(value)}.{_hint(value)}")
    if not holds(number):
        raise ValueError(f"{name} must {wanted}, got {number}.")
    return number


def real(name: str, value: Any, wanted: str, holds: Callable[[float], bool]) -> float:
    """Turns a real number of Python, NumPy or JAX into a Python float; refuses bools and traced values.

    Args:
      name, value, wanted, holds: as in `integer`; nan is never in range.

    Raises:
      ArgumentTypeError: the value is not a real number; the message says what to give.
      ValueError: the value is out of range.

    >>> real("delta", np.float32(0.5), "be in (0, 1)", lambda x: 0 < x < 1)
    0.5
    """
    try:
        number = float(value) if _is_real(value) else None
    except TypeError:  # traced values
        number = None
    except OverflowError:  # integers beyond the largest float
        number = math.inf
    if number is None:
        raise ArgumentTypeError(f"{name} must {wanted}, got {_shown(value)}.{_hint(value)}")
    if math.isnan(number) or not holds(number):
        raise ValueError(f"{name} must {wanted}, got {number}.")
    return number


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Returns `value`, which must be one of the given words.

    Raises:
      ValueError: the value is none of them; the message lists them.
    """
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_


def _is_real(value: Any) -> bool:
    if _is_bool(value) or getattr(value, "ndim", 0) != 0:
        return False
    if (dtype := getattr(value, "dtype", None)) is not None:
        return dtypes.issubdtype(dtype, np.integer) or dtypes.issubdtype(dtype, np.floating)
    return hasattr(type(value), "__float__")


def _shown(value: Any) -> str:
    return f"{value}" if isinstance(value, float) else f"{value!r}"


def _hint(value: Any) -> str:
    if isinstance(value, jax.core.Tracer):
        return " JAX is tracing that; numbers of the privacy guarantee are settled before: give a Python number."
    if isinstance(value, (float, np.floating)):
        return f" Give the integer {int(value)}." if float(value).is_integer() else " Give a whole number."
    return f" Give a Python number, not a value of type {type(value).__name__}."
