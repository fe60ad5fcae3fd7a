"""Labelled text of one's own: a CSV, TSV or JSONL file with columns for the text and for its label."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from dp_rmt.data.readers.glue import Examples
from dp_rmt.data.readers.text_files import open_text

SUFFIXES = (".csv", ".tsv", ".jsonl")
EVALUATIONS = ("dev", "test")
"""Files of a folder, beside train, that are evaluated on."""

Row = tuple[str, Mapping[str, str]]
"""Where a row stands, for messages, and its fields by column."""


@dataclasses.dataclass(frozen=True)
class LabelledTable:
    """Rows of text with class numbers.

    Attributes:
      train: the training rows; each is one example, the unit of privacy.
      evaluations: "dev" and "test", as far as there are files.
      labels: names of the classes, in the order of their numbers.
    """

    train: Examples
    evaluations: Mapping[str, Examples]
    labels: tuple[str, ...]


def load_labelled_table(
    path: str | os.PathLike[str],
    *,
    text_columns: Sequence[str] = ("text",),
    label_column: str = "label",
    labels: Sequence[str] = (),
    max_train_examples: int | None = None,
) -> LabelledTable:
    """Reads a file of labelled text, or a folder with train, and perhaps dev and test, as such files.

    CSV has a header line and quotes as usual; TSV has a header line and no quotes; JSONL has an object in each line.
    All are UTF-8.

    Args:
      path: ``FILE.csv``, ``FILE.tsv`` or ``FILE.jsonl``; or a folder that holds ``train.SUFFIX``.
      text_columns: names of the one or two columns with the texts.
      label_column: name of the column with the label.
      labels: the names of all classes; empty takes those that occur in the training rows, in alphabetical order. Which
        those are is then a fact about private data that no noise hides, and a warning says so.
      max_train_examples: keeps the first so many training rows; None keeps all.

    Returns:
      A `LabelledTable`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is malformed or a label unknown; the message has file, line and cure.
    """
    files = _files(pathlib.Path(path))
    if len(text_columns) not in (1, 2):
        raise ValueError(f"text_columns={tuple(text_columns)}: name one column of texts, or two for pairs of texts")
    rows = {split: list(_rows(file, (*text_columns, label_column))) for split, file in files.items()}
    rows["train"] = rows["train"][slice(max_train_examples)]
    if not labels:
        labels = sorted({fields[label_column] for _, fields in rows["train"]})
        logging.warning(
            "%s: the classes %s are those that occur in the training rows. That is a fact about private data, which "
            "the guarantee does not cover: where it is to be hidden, name the classes yourself (config.data.labels)",
            files["train"],
            ", ".join(labels),
        )
    if len(labels) < 2:
        raise ValueError(f"{files['train']}: there is one class alone, {labels[0]!r}; it takes two to tell them apart")
    numbers = {label: number for number, label in enumerate(labels)}
    splits = {split: _examples(found, text_columns, label_column, numbers) for split, found in rows.items()}
    return LabelledTable(splits.pop("train"), splits, tuple(labels))


def _files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of every split that there is."""
    if not path.is_dir():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: labelled text is read from files that end with {', '.join(SUFFIXES)}")
        return {"train": path}
    found: dict[str, pathlib.Path] = {}
    for split in ("train", *EVALUATIONS):
        files = [file for suffix in SUFFIXES if (file := path / f"{split}{suffix}").exists()]
        if len(files) > 1:
            raise ValueError(f"{path} has {' and '.join(file.name for file in files)}: leave one of them there")
        if files:
            found[split] = files[0]
    if "train" not in found:
        raise FileNotFoundError(
            f"{path} has no file train{', train'.join(SUFFIXES)}: give a folder that has one of them"
        )
    return found


def _rows(file: pathlib.Path, columns: Sequence[str]) -> Iterator[Row]:
    """Every row with the fields that are wanted; none of them is empty."""
    read = _json_rows if file.suffix == ".jsonl" else _separated_rows
    is_empty = True
    for where, fields in read(file):
        is_empty = False
        for column in columns:
            if column not in fields:
                raise ValueError(
                    f"{where}: there is no column {column!r}, only {', '.join(map(repr, fields))}; name the columns by "
                    "config.data.text_columns and config.data.label_column"
                )
            if not fields[column].strip():
                raise ValueError(f"{where}: column {column!r} is empty. Remove the row, or fill it in")
        yield where, {column: fields[column].strip() for column in columns}
    if is_empty:
        raise ValueError(f"{file} has no rows")


def _separated_rows(file: pathlib.Path) -> Iterator[Row]:
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
    with open_text(file, advice="give a file of labelled text (config.data.path)", newline="") as stream:
        reader = csv.reader(stream, strict=True, **options)
        try:
            header = next(reader)
            for fields in filter(None, reader):  # without blank lines
                if len(fields) != len(header):
                    raise ValueError(
                        f"{file}, line {reader.line_num}: {len(fields)} fields where the header has {len(header)} "
                        f"({', '.join(header)})"
                    )
                yield f"{file}, line {reader.line_num}", dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.line_num}: {error}") from None


def _json_rows(file: pathlib.Path) -> Iterator[Row]:
    with open_text(file, advice="give a file of labelled text (config.data.path)", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}, column {error.colno}: broken JSON: {error.msg}") from None
            if not isinstance(fields, dict):
                raise ValueError(f"{where}: expected an object, got a {type(fields).__name__}")
            yield where, {column: value if isinstance(value, str) else str(value) for column, value in fields.items()}


def _examples(
    rows: Sequence[Row], text_columns: Sequence[str], label_column: str, numbers: Mapping[str, int]
) -> Examples:
    for where, fields in rows:
        if fields[label_column] not in numbers:
            raise ValueError(
                f"{where}: unknown label {fields[label_column]!r} in column {label_column!r}; the classes are "
                f"{', '.join(map(repr, numbers))}"
            )
    texts = [tuple(fields[column] for _, fields in rows) for column in text_columns]
    labels = np.asarray([numbers[fields[label_column]] for _, fields in rows], np.int32)
    return Examples(texts[0], texts[1] if len(texts) > 1 else None, labels)
