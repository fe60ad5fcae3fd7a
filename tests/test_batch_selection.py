"""Poisson sampling: shapes, padding, determinism, errors. For its law see laws/test_sampler.py."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dp_rmt.batch_selection import PoissonSampling, fresh_seed, max_batch_size_for, microbatch_order


@given(
    num_examples=st.integers(1, 300),
    sampling_probability=st.floats(1e-3, 1.0),
    max_batch_size=st.integers(1, 320),
    seed=st.integers(0, 2**128 - 1),
    step=st.integers(0, 2**33),
)
def test_batches_are_distinct_sorted_examples_then_padding(
    num_examples, sampling_probability, max_batch_size, seed, step
):
    sampling = PoissonSampling(num_examples, sampling_probability, max_batch_size, seed)
    indices = sampling.indices(step)
    assert indices.shape == (max_batch_size,)
    assert indices.dtype == np.int32
    size = int((indices >= 0).sum())
    assert (indices[size:] == -1).all()
    assert (np.diff(indices[:size]) > 0).all()
    assert (indices[:size] < num_examples).all()
    np.testing.assert_array_equal(indices, dataclasses.replace(sampling).indices(step))


def test_pure_function_of_seed_and_step_on_every_machine():
    sampling = PoissonSampling(1000, sampling_probability=0.01, max_batch_size=20, seed=2**100 + 7)
    expected = sampling.indices(5)
    for step in (9, 0, 5, 3):  # other steps in any order change nothing
        again = sampling.indices(step)
    np.testing.assert_array_equal(sampling.indices(5), expected)
    assert not np.array_equal(again, expected)
    # Golden: a resumed run on another version of NumPy must see the same batches.
    assert expected[expected >= 0].tolist() == [138, 339, 688, 846, 869, 915, 955]


def test_truncation_keeps_a_subset_of_the_full_sample():
    full = PoissonSampling(num_examples=100, sampling_probability=0.5, max_batch_size=100, seed=3)
    short = dataclasses.replace(full, max_batch_size=20)
    for step in range(20):
        assert set(short.indices(step)) <= set(full.indices(step))
        assert (short.indices(step) >= 0).all()


def test_certain_sampling_takes_everything():
    indices = PoissonSampling(num_examples=7, sampling_probability=1.0, max_batch_size=9, seed=0).indices(4)
    assert indices.tolist() == [0, 1, 2, 3, 4, 5, 6, -1, -1]


@given(
    num_examples=st.integers(1, 10**6),
    sampling_probability=st.floats(1e-6, 1.0),
    multiple_of=st.integers(1, 64),
)
def test_max_batch_size_is_five_standard_deviations_above_the_mean(num_examples, sampling_probability, multiple_of):
    size = max_batch_size_for(num_examples, sampling_probability, multiple_of=multiple_of)
    mean = num_examples * sampling_probability
    wanted = min(num_examples, mean + 5 * math.sqrt(mean * (1 - sampling_probability)))
    assert size % multiple_of == 0
    assert wanted * (1 - 1e-9) <= size < wanted + 1 + multiple_of


def test_max_batch_size_hardly_ever_overflows():
    size = max_batch_size_for(67_349, 1000 / 67_349)
    assert size == 1157
    assert stats.binom.sf(size, 67_349, 1000 / 67_349) < 1e-6


def test_rounding_errors_cost_no_row():
    assert max_batch_size_for(1000, 1.0) == 1000
    assert max_batch_size_for(100, 0.1 + 0.2, multiple_of=1) == math.ceil(30 + 5 * math.sqrt(21))


@given(num_microbatches=st.integers(1, 12), microbatch_size=st.integers(1, 12))
def test_microbatch_order_gathers_padding_in_the_last_microbatches(num_microbatches, microbatch_size):
    order = microbatch_order(num_microbatches * microbatch_size, microbatch_size)
    # Microbatch j takes every num_microbatches-th row from j on, and so holds consecutive rows of the batch.
    microbatches = [order[j::num_microbatches] for j in range(num_microbatches)]
    np.testing.assert_array_equal(np.concatenate(microbatches), np.arange(num_microbatches * microbatch_size))


def test_fresh_seeds_differ_and_are_long():
    seeds = {fresh_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert 2**100 < max(seeds) < 2**128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_examples": 0}, "num_examples"),
        ({"num_examples": 2**31}, "num_examples"),
        ({"sampling_probability": 0.0}, "sampling_probability"),
        ({"sampling_probability": 1.5}, "sampling_probability"),
        ({"sampling_probability": math.nan}, "sampling_probability"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"seed": -1}, r"seed must be in \[0, 2\^128\), .*got -1"),
        ({"seed": 2**128}, r"seed must be in \[0, 2\^128\)"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"num_examples": 10, "sampling_probability": 0.5, "max_batch_size": 5, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        PoissonSampling(**arguments)


def test_other_errors():
    with pytest.raises(ValueError, match="step must not be negative"):
        PoissonSampling(10, 0.5, 5, 0).indices(-1)
    with pytest.raises(ValueError, match="multiple_of"):
        max_batch_size_for(10, 0.5, multiple_of=0)
    with pytest.raises(ValueError, match="does not divide"):
        microbatch_order(10, 3)
    with pytest.raises(TypeError, match=r"seed must be in .*, an integer.*got 0\.5\. Give a whole number"):
        PoissonSampling(10, 0.5, 5, 0.5)
