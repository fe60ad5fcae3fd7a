"""JSON with a place for every mistake: one object in each line, or one list in a file."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from dp_rmt.data.readers.text_files import check_text, open_text


def json_lines(file: pathlib.Path, *, advice: str) -> Iterator[tuple[str, Any]]:
    """Yields ``("FILE, line NUMBER", value)`` for every line that is not blank.

    Args:
      file: the file.
      advice: as in `open_text`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is broken JSON, or a text in it is no text; the message has file and line.
    """
    with open_text(file, advice=advice, newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                value = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}, column {error.colno}: broken JSON: {error.msg}. Write one whole object in each line."
                ) from None
            check_text(value, where)
            yield where, value


def json_list(file: pathlib.Path, *, advice: str) -> list[tuple[str, Any]]:
    """Reads a file that holds one list; returns ``("FILE, entry NUMBER", value)`` for every entry, counted from 1.

    Args:
      file: the file.
      advice: as in `open_text`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the JSON is broken (with file and line), is no list, or a text in it is no text (with file and entry).
    """
    with open_text(file, advice=advice) as stream:
        try:
            entries = json.load(stream)
        except json.JSONDecodeError as error:
            is_lines = error.msg == "Extra data" and error.lineno > 1
            cure = f"Rename it to {file.stem}.jsonl, as it has an object in each line" if is_lines else "Correct it"
            raise ValueError(
                f"{file}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}. {cure}, or download it "
                "again."
            ) from None
    if not isinstance(entries, list):
        raise ValueError(f"{file} holds a JSON {type(entries).__name__}, and not a list of entries. Write [..., ...].")
    places = [f"{file}, entry {number}" for number in range(1, len(entries) + 1)]
    for place, entry in zip(places, entries, strict=True):
        check_text(entry, place)
    return list(zip(places, entries, strict=True))
