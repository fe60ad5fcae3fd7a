"""Data that does not fit its model is refused when they meet, with the data, the row and the value."""

from __future__ import annotations

import numpy as np
import pytest

from dp_rmt.data import check_fits_model

ARRAYS = {
    "input_ids": np.array([[2, 3, 0], [4, 8, 7]], np.int32),
    "attention_mask": np.array([[1, 1, 0], [1, 1, 1]], np.int32),
    "token_type_ids": np.array([[0, 0, 0], [0, 1, 1]], np.int32),
    "label": np.array([1, 0], np.int32),
}
SIZES = {"name": "train", "vocab_size": 9, "num_labels": 2, "type_vocab_size": 2}


def changed(key, value):
    array = ARRAYS[key].copy()
    array[(1,) * array.ndim] = value
    return {**ARRAYS, key: array}


def test_fitting_data_passes():
    check_fits_model(ARRAYS, **SIZES)
    check_fits_model({"input_ids": ARRAYS["input_ids"]}, **SIZES)
    scores = {**ARRAYS, "label": np.array([4.5, -1.0], np.float32)}  # of a regression
    check_fits_model(scores, **{**SIZES, "num_labels": None})
    check_fits_model(changed("token_type_ids", 7), **{**SIZES, "type_vocab_size": None})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("label", 2, r"train, row 1 \(counted from 0\): label has the value 2, but the model has classes from 0 to 1"),
        ("label", -1, "row 1 .*label has the value -1"),
        ("label", -100, "row 1 .*label has the value -100.*remove the row"),
        ("input_ids", 9, "row 1 .*input_ids has the value 9, but the model has tokens from 0 to 8.*tokenizer"),
        ("input_ids", -1, "row 1 .*input_ids has the value -1"),
        ("token_type_ids", 2, "row 1 .*token_type_ids has the value 2"),
    ],
)
def test_numbers_out_of_range_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        check_fits_model(changed(key, value), **SIZES)
