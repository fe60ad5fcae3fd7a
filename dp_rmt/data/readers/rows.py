"""Rows of a table: CSV, TSV, JSON, JSON Lines and Parquet files become rows whose place is known."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dp_rmt.data.readers.json_files import json_lines, json_list
from dp_rmt.data.readers.text_files import check_text, open_text
from dp_rmt.extras import extra

_ADVICE = "give a file of rows by --train, or by --config.data.path."
_LONGEST_FIELD = 2**31 - 1  # a cell may hold a whole document; the csv module stops at 2^17 characters by default


class Row(NamedTuple):
    """One row: where it stands, for messages, and its fields by column."""

    where: str
    fields: Mapping[str, Any]


def read_rows(file: pathlib.Path) -> list[Row]:
    """Reads a file of rows.

    CSV has a header line and quotes as usual. TSV has a header line, and quotes are ordinary characters in it. JSONL
    has an object in each line, JSON a list of objects. Text is UTF-8, with or without a byte-order mark, and blank
    lines are skipped.

    Args:
      file: ends with one of `SUFFIXES`.

    Returns:
      The rows in the order of the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is of another kind, malformed or without rows; the message has file, line and cure.
    """
    if file.suffix not in _READERS:
        raise ValueError(f"{file}: rows are read from files that end with {', '.join(SUFFIXES)}. Convert it.")
    rows = _READERS[file.suffix](file)
    if not rows:
        raise ValueError(f"{file} has no rows. Give a file with a row for each example.")
    return rows


def as_row(where: str, value: Any) -> Row:
    """A row of what should be an object.

    Raises:
      ValueError: it is something else, or a text in it is no text.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected an object with a field for each column, got a {type(value).__name__}")
    check_text(value, where)
    return Row(where, value)


def text_of(row: Row, column: str) -> str:
    """The text of one field, without spaces at its ends.

    Raises:
      ValueError: there is no such column, or nothing in it, or no text.
    """
    value = field_of(row, column)
    if isinstance(value, Mapping | list | tuple | bytes):
        raise ValueError(f"{row.where}: column {column!r} holds a {type(value).__name__}, and not text")
    return str(value).strip()


def is_empty(value: Any) -> bool:
    """Whether a field has nothing in it: None, NaN, or a text of spaces.

    >>> [is_empty(value) for value in (None, float("nan"), " ", 0, [])]
    [True, True, True, False, False]
    """
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def field_of(row: Row, column: str) -> Any:
    """One field as it is.

    Raises:
      ValueError: there is no such column, or nothing in it.
    """
    if column not in row.fields:
        raise ValueError(
            f"{row.where}: there is no column {column!r}, only {', '.join(map(repr, row.fields))}. Name the columns by "
            "--config.data.text_columns and label_column, or source_column and target_column"
        )
    value = row.fields[column]
    if is_empty(value):
        raise ValueError(f"{row.where}: column {column!r} is empty. Fill it in, or remove the row from the file")
    return value


def _separated(file: pathlib.Path) -> list[Row]:
    is_tsv = file.suffix == ".tsv"
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {}
    csv.field_size_limit(_LONGEST_FIELD)
    rows = []
    with open_text(file, advice=_ADVICE, newline="") as stream:
        reader = csv.reader(stream, strict=True, **options)
        line = 1
        try:
            header = [name.strip() for name in next(reader)]
            if len(set(header)) < len(header):
                raise ValueError(f"{file}, line 1: a column comes twice among {', '.join(header)}. Rename one of them.")
            line = reader.line_num + 1
            for fields in reader:
                if fields and len(fields) != len(header):
                    cure = (
                        "remove tabs from inside the fields" if is_tsv else "put a text with a comma in double quotes"
                    )
                    raise ValueError(
                        f"{file}, line {line}: {len(fields)} fields where the header has {len(header)} "
                        f"({', '.join(header)}): {cure}"
                    )
                if fields:  # a blank line has none
                    rows.append(Row(f"{file}, line {line}", dict(zip(header, fields, strict=True))))
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{file}, line {line}: {error}. Mend the quotes of this row.") from None
    return rows


def _json_lines(file: pathlib.Path) -> list[Row]:
    return [as_row(where, value) for where, value in json_lines(file, advice=_ADVICE)]


def _json_list(file: pathlib.Path) -> list[Row]:
    return [as_row(where, value) for where, value in json_list(file, advice=_ADVICE)]


def _parquet(file: pathlib.Path) -> list[Row]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: {_ADVICE}")
    with extra("finetune"):
        import pyarrow  # here, since other formats need no package
        import pyarrow.parquet

    try:
        # Not through `datasets`, whose cache on disk would be a second copy of private rows.
        values = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{file} is no Parquet file that can be read ({error}). Write or download it again."
        ) from error
    return [as_row(f"{file}, row {number}", value) for number, value in enumerate(values, start=1)]


_READERS: dict[str, Callable[[pathlib.Path], list[Row]]] = {
    ".csv": _separated,
    ".tsv": _separated,
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".parquet": _parquet,
}
SUFFIXES = tuple(_READERS)
"""The ends of the names of files that `read_rows` reads."""
