"""Checks that tokenised data fits the model: token ids are in the vocabulary, and labels are among the classes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def check_fits_model(
    arrays: Mapping[str, np.ndarray],
    *,
    name: str,
    vocab_size: int,
    num_labels: int | None = None,
    type_vocab_size: int | None = None,
) -> None:
    """Raises unless every token and every label is one that the model knows.

    An embedding is NaN beyond its end, and negative numbers count from its end. The cross-entropy of a label that is
    not a class is NaN, with a gradient that is finite and wrong. Clipping leaves such an example out, but nobody would
    be told which one.

    Args:
      arrays: the tokenised data, name -> (N, ...): ``input_ids``, and if present ``label`` and ``token_type_ids``.
      name: the name of the data in the message, such as "train".
      vocab_size: rows of the model's table of tokens.
      num_labels: the number of classes; None if labels are scores, or there are none.
      type_vocab_size: rows of the model's table of token types; None if it has none.

    Raises:
      ValueError: a number is out of range; the message has the data, the row and the value.

    >>> check_fits_model({"input_ids": np.array([[3, 1], [2, 9]])}, name="dev", vocab_size=9)
    Traceback (most recent call last):
    ValueError: dev, row 1 (counted from 0): input_ids has the value 9, but ... from 0 to 8 ...
    """
    limits = {
        "input_ids": (vocab_size, "tokens", "Take the tokenizer of this model, or extend the model's table of tokens"),
        "label": (num_labels, "classes", "Correct or remove the row, or set the number of labels of the task"),
        "token_type_ids": (type_vocab_size, "token types", "Take the tokenizer of this model"),
    }
    for key, (size, what, remedy) in limits.items():
        if size is None or key not in arrays:
            continue
        wrong = (arrays[key] < 0) | (arrays[key] >= size)
        if wrong.any():
            row = int(np.argwhere(wrong)[0][0])
            value = arrays[key][row][wrong[row]].flat[0]
            rows = np.count_nonzero(wrong.reshape(len(wrong), -1).any(axis=1))
            raise ValueError(
                f"{name}, row {row} (counted from 0): {key} has the value {value}, but the model has {what} from 0 to "
                f"{size - 1} ({rows} rows are so). {remedy}"
            )
