"""Labelled text of one's own: rows with one or two columns of text and a column of classes or scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from dp_rmt.data.readers.glue import Examples
from dp_rmt.data.readers.rows import Row, field_of, is_empty, text_of
from dp_rmt.data.readers.tables import ONLY_THE_SOURCE, Extras, Source, described, read_tables, shared_out


@dataclasses.dataclass(frozen=True)
class LabelledTable:
    """Rows of text with class numbers, or with scores.

    Attributes:
      train: the training rows; each is one example, the unit of privacy.
      evaluations: "dev" and "test", as far as there are rows.
      labels: names of the classes, in the order of their numbers; empty for scores.
      notes: what was found, in sentences for the user.
    """

    train: Examples
    evaluations: Mapping[str, Examples]
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Columns:
    """What a labelled table's columns mean.

    Attributes:
      texts: names of the one or two columns with the texts.
      label: name of the column with the label.
      labels: the names of all classes. If empty, they are those that the data set declares (`datasets.ClassLabel`), or
        else those of the training rows in alphabetical order. Which those are is then a fact about private data that no
        noise hides, and a warning says so.
      regression: labels are numbers to be predicted, and not classes.
      dropped: labels whose rows are left out, such as the "-" of MNLI. That is a fixed rule for each row alone, so that
        the guarantee is for the rows that are kept, and neighbours still differ in one row.
      user: name of the column of training rows that says whose they are; None if that is not read.
    """

    texts: Sequence[str] = ("text",)
    label: str = "label"
    labels: Sequence[str] = ()
    regression: bool = False
    dropped: Sequence[str] = ()
    user: str | None = None

    def __post_init__(self) -> None:
        if len(self.texts) not in (1, 2):
            raise ValueError(f"text_columns={tuple(self.texts)}: name one column of texts, or two for pairs of texts")
        if self.regression and self.labels:
            raise ValueError(
                f"labels={tuple(self.labels)} are names of classes, and regression has scores; leave one out"
            )


def load_labelled_table(
    source: Source,
    columns: Columns = Columns(),
    *,
    extras: Extras = ONLY_THE_SOURCE,
    max_train_examples: int | None = None,
) -> LabelledTable:
    """Reads labelled text.

    Args:
      source: a file, a folder that holds ``train.SUFFIX``, or what else `read_tables` reads.
      columns: what the columns mean.
      extras: where other splits come from.
      max_train_examples: keeps the first so many training rows; None keeps all.

    Returns:
      A `LabelledTable`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is malformed or a label unknown; the message has file, line and cure.
    """
    tables = read_tables(source, extras)
    declared = tables["train"].classes.get(columns.label, ())
    splits, notes = {}, []
    for split, table in tables.items():
        if split != "train" and all(is_empty(row.fields.get(columns.label)) for row in table.rows):
            notes.append(f"{split} has no labels, and is left out")
            continue
        kept = [row for row in table.rows if _label(row, columns) not in columns.dropped]
        if not kept:
            raise ValueError(f"{split}: all rows have a label of config.data.drop_labels={tuple(columns.dropped)}")
        of_split = columns if split == "train" else dataclasses.replace(columns, user=None)
        splits[split] = _with_known_fields(kept, of_split)
    if extras.dev_share is not None:
        splits |= shared_out(
            splits["train"], extras.dev_share, lambda row: "\n".join(row.fields[name] for name in columns.texts)
        )
    splits["train"] = splits["train"][slice(max_train_examples)]
    labels = () if columns.regression else _labels(splits["train"], columns, declared, described(source))
    numbers = {label: number for number, label in enumerate(labels)}
    examples = {split: _examples(rows, columns, numbers) for split, rows in splits.items()}
    what = "a number" if columns.regression else f"{len(labels)} classes ({', '.join(labels)})"
    notes.insert(0, f"labelled text: {' and '.join(map(repr, columns.texts))} -> {columns.label!r}, {what}")
    return LabelledTable(examples.pop("train"), examples, labels, tuple(notes))


def _label(row: Row, columns: Columns) -> str:
    """The label's name. A whole number is that number, even where a table of numbers with gaps made it 1.0."""
    value = field_of(row, columns.label)
    if isinstance(value, float) and value.is_integer() and not columns.regression:
        return str(int(value))
    return text_of(row, columns.label)


def _with_known_fields(rows: Sequence[Row], columns: Columns) -> list[Row]:
    """The rows with texts, label and user alone, all of which are there."""
    texts = (*columns.texts, *([] if columns.user is None else [columns.user]))
    return [
        Row(row.where, {**{name: text_of(row, name) for name in texts}, columns.label: _label(row, columns)})
        for row in rows
    ]


def _labels(rows: Sequence[Row], columns: Columns, declared: Sequence[str], source: str) -> tuple[str, ...]:
    labels = tuple(columns.labels) or tuple(name for name in declared if name not in columns.dropped)
    if not labels:
        labels = tuple(sorted({row.fields[columns.label] for row in rows}))
        logging.warning(
            "%s: the classes %s are those that occur in the training rows. That is a fact about private data, which "
            "the guarantee does not cover: where it is to be hidden, name the classes yourself (config.data.labels)",
            source,
            ", ".join(labels),
        )
    if len(labels) < 2:
        raise ValueError(f"{source}: there is one class alone, {labels[0]!r}; it takes two to tell them apart")
    if len(set(labels)) < len(labels):
        raise ValueError(f"config.data.labels={labels}: a class is named twice")
    return labels


def _examples(rows: Sequence[Row], columns: Columns, numbers: Mapping[str, int]) -> Examples:
    texts = [tuple(row.fields[name] for row in rows) for name in columns.texts]
    read = _score if columns.regression else _class_number
    labels = np.asarray([read(row, columns, numbers) for row in rows], np.float32 if columns.regression else np.int32)
    users = tuple(row.fields[columns.user] for row in rows if columns.user is not None and columns.user in row.fields)
    return Examples(texts[0], texts[1] if len(texts) > 1 else None, labels, users)


def _class_number(row: Row, columns: Columns, numbers: Mapping[str, int]) -> int:
    label = row.fields[columns.label]
    if label not in numbers:
        raise ValueError(
            f"{row.where}: unknown label {label!r} in column {columns.label!r}; the classes are "
            f"{', '.join(map(repr, numbers))}. Correct it, name the class (config.data.labels), or leave out all rows "
            f"that are labelled so: --config.data.drop_labels=\"('{label}',)\""
        )
    return numbers[label]


def _score(row: Row, columns: Columns, numbers: Mapping[str, int]) -> float:
    text = row.fields[columns.label]
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(
            f"{row.where}: the score {text!r} in column {columns.label!r} is not a finite number. Correct it, or leave "
            "config.data.regression out if it names a class"
        )
    return score
