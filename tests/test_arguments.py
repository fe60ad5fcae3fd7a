"""What is a number: exact integers and real numbers of any library, by value; all else is refused by name."""

from __future__ import annotations

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.arguments import integer, one_of, real


@pytest.mark.parametrize("value", [5, np.int32(5), np.uint8(5), np.array(5), jnp.int32(5), jnp.uint32(5)])
def test_integers_of_any_library_become_python_integers(value):
    number = integer("size", value, "be positive", lambda n: n > 0)
    assert (number, type(number)) == (5, int)
    assert real("size", value, "be positive", lambda x: x > 0) == 5.0


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), jnp.bfloat16(0.5), fractions.Fraction(1, 2)])
def test_real_numbers_of_any_library_become_floats(value):
    number = real("rate", value, "be in (0, 1)", lambda x: 0 < x < 1)
    assert (number, type(number)) == (0.5, float)


NO_NUMBERS = [True, np.bool_(True), jnp.array(True), "5", None, 5j, jnp.array([5]), [5], object()]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 5.0, 5.5, np.float64(5.0), jnp.float32(5.0), math.nan, math.inf])
def test_what_is_no_integer_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^size must be positive, got .*\. Give .*") as error:
        integer("size", value, "be positive", lambda n: n > 0)
    assert isinstance(error.value, TypeError)


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_what_is_no_real_number_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^rate must be positive, got .*\. Give a Python number") as error:
        real("rate", value, "be positive", lambda x: x > 0)
    assert isinstance(error.value, TypeError)


def test_says_what_to_give():
    with pytest.raises(ValueError, match=r"got 2000\.0\. Give the integer 2000\."):
        integer("size", 2000.0, "be positive", lambda n: n > 0)
    with pytest.raises(ValueError, match=r"^size must be positive, got 0\.$"):
        integer("size", 0, "be positive", lambda n: n > 0)


@pytest.mark.parametrize("value", [math.nan, np.float32(math.nan), math.inf, 10**400])
def test_what_is_not_finite_is_out_of_range(value):
    with pytest.raises(ValueError, match="rate must be finite"):
        real("rate", value, "be finite", math.isfinite)


def test_nan_is_in_no_range_and_an_integer_beyond_floats_is_infinite():
    with pytest.raises(ValueError, match="got nan"):
        real("rate", math.nan, "be anything", lambda x: True)
    assert real("rate", 10**400, "be positive", lambda x: x > 0) == math.inf


@pytest.mark.parametrize("check", [integer, real])
def test_traced_values_are_refused(check):
    with pytest.raises(ValueError, match="JAX is tracing that"):
        jax.jit(lambda x: check("size", x, "be positive", lambda n: True))(1)


def test_words():
    assert one_of("clip", "flat", ("flat", "automatic")) == "flat"
    for value in ("prv", None, 3, []):
        with pytest.raises(ValueError, match="clip must be one of flat, automatic; got"):
            one_of("clip", value, ("flat", "automatic"))
