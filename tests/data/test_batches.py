"""Fixed shapes, padding rows, and that an evaluation sees every example once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_rmt.data import evaluation_batches, fingerprint, gather_batch


def example_arrays(num_examples=5, length=4):
    grid = np.arange(num_examples * length, dtype=np.int32).reshape(num_examples, length) + 10
    return {
        "input_ids": grid,
        "attention_mask": np.ones_like(grid),
        "label": np.arange(num_examples, dtype=np.float32) + 1,
        "mask_position": np.full(num_examples, 2, np.int32),
    }


def test_gathers_rows_and_pads():
    arrays = example_arrays()
    batch, is_padding_example = gather_batch(arrays, np.array([3, -1, 3, 0]))
    assert is_padding_example.tolist() == [False, True, False, False]
    for name, array in arrays.items():
        assert batch[name].dtype == array.dtype
        np.testing.assert_array_equal(batch[name][[0, 2, 3]], array[[3, 3, 0]])
    assert batch["input_ids"][1].tolist() == [0, 0, 0, 0]
    assert batch["attention_mask"][1].tolist() == [1, 0, 0, 0]
    assert (batch["label"][1], batch["mask_position"][1]) == (0, 0)


def test_does_not_change_the_data_set():
    arrays = example_arrays()
    before = fingerprint(arrays)
    batch, _ = gather_batch(arrays, np.array([-1, 4]))
    batch["input_ids"][:] = 7
    assert fingerprint(arrays) == before


def test_a_batch_of_padding_only():
    batch, is_padding_example = gather_batch(example_arrays(), np.full(3, -1))
    assert is_padding_example.all()
    assert batch["attention_mask"].sum() == 3


@given(st.integers(1, 23), st.integers(1, 9))
def test_evaluation_sees_every_example_once_in_order(num_examples, batch_size):
    labels, num_padding = [], 0
    for batch, is_padding_example in evaluation_batches(example_arrays(num_examples), batch_size):
        assert batch["input_ids"].shape == (batch_size, 4)
        labels += batch["label"][~is_padding_example].tolist()
        num_padding += int(is_padding_example.sum())
    assert labels == list(range(1, num_examples + 1))
    assert num_padding == -num_examples % batch_size


@pytest.mark.parametrize("indices", [[5], [-2], [0, 99]])
def test_indices_out_of_range(indices):
    with pytest.raises(IndexError, match="the data set has 5 examples"):
        gather_batch(example_arrays(), np.array(indices))


@pytest.mark.parametrize("indices", [np.array([0.0]), np.array([[[0]]]), np.array([True])])
def test_indices_that_are_no_indices(indices):
    with pytest.raises(ValueError, match="indices must be integers"):
        gather_batch(example_arrays(), indices)


def test_things_that_are_no_data_set():
    with pytest.raises(ValueError, match=r"same number of rows, got rows \{'a': 2, 'b': 3\}"):
        gather_batch({"a": np.zeros(2), "b": np.zeros(3)}, np.array([0]))
    with pytest.raises(ValueError, match="same number of rows"):
        gather_batch({}, np.array([0]))
    with pytest.raises(ValueError, match="no examples"):
        next(evaluation_batches({"a": np.zeros(0)}, 2))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(evaluation_batches(example_arrays(), 0))


def test_fingerprint_depends_on_everything_but_the_order_of_names():
    arrays = example_arrays()
    reference = fingerprint(arrays)
    assert len(reference) == 64
    assert fingerprint(dict(reversed(arrays.items()))) == reference
    assert fingerprint({name: np.asfortranarray(array) for name, array in arrays.items()}) == reference
    assert fingerprint(arrays | {"label": arrays["label"].astype(np.float64)}) != reference
    assert fingerprint(arrays | {"input_ids": arrays["input_ids"].T}) != reference
    assert fingerprint(arrays | {"input_ids": arrays["input_ids"].reshape(4, 5)}) != reference
    changed = arrays["input_ids"].copy()
    changed[4, 3] += 1
    assert fingerprint(arrays | {"input_ids": changed}) != reference
    assert fingerprint({name: array for name, array in arrays.items() if name != "label"}) != reference
    renamed = {("target" if name == "label" else name): array for name, array in arrays.items()}
    assert fingerprint(renamed) != reference


def test_fingerprint_is_the_same_on_every_machine():
    """A value written down once: a run on another machine, or of a later version, may resume."""
    assert fingerprint({"label": np.array([1, 0], ">i4")}) == fingerprint({"label": np.array([1, 0], "<i4")})
    expected = "fd90a38ac17e23e390bf1425b24b3f4315015f42f7cee4fafb7d84e58a0499ba"
    assert fingerprint({"label": np.array([1, 0], np.int32)}) == expected
