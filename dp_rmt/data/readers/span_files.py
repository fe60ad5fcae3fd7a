"""Reads the sensitive spans of documents of one's own, one JSON object in each line."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections import defaultdict
from typing import Any

from dp_rmt.data.readers.documents import Document
from dp_rmt.data.readers.json_files import json_lines
from dp_rmt.data.readers.sensitive import Span, merged


def add_spans(documents: list[Document], file: str | os.PathLike[str]) -> list[Document]:
    """Reads a span file and gives each document its spans. Spans that it already has are kept.

    Keys of each line:
        line: the line of the document in its file, counted from 1.
        start, end: the characters [start, end) of the text, counted as Python does, in code points from 0.
        text: optional, the characters that stand there. They are checked, so that files that have drifted apart are
          found.

    Args:
        documents: from `read_own_documents`, of a JSONL file.
        file: the spans, in any order. A document without a line has none.

    Returns:
        The documents, in their order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a span does not fit its text; the message has file and line.
    """
    file = pathlib.Path(file)
    numbers = {document.where.rpartition(", line ")[2]: document for document in documents}
    spans: dict[str, list[Span]] = defaultdict(list)
    is_empty = file.is_file() and file.stat().st_size == 0  # an empty file says that nothing is sensitive
    advice = 'it must hold one JSON object per line with the keys "line", "start" and "end".'
    for where, row in [] if is_empty else json_lines(file, advice=advice):
        _check_keys(row, {"line": int, "start": int, "end": int}, {"text": str}, where)
        document = numbers.get(str(row["line"]))
        if document is None:
            raise ValueError(f"{where}: there is no document in line {row['line']} of the text file.")
        start, end = row["start"], row["end"]
        if not 0 <= start < end <= len(document.text):
            raise ValueError(
                f"{where}: the span [{start}, {end}) does not fit the text of {document.where}, which has "
                f"{len(document.text)} characters. Offsets count characters (code points) from 0; end is exclusive."
            )
        if "text" in row and document.text[start:end] != row["text"]:
            raise ValueError(
                f"{where}: characters [{start}, {end}) of {document.where} are {document.text[start:end]!r}, not "
                f"{row['text']!r}. Were the offsets made for another version of the text, or counted in bytes?"
            )
        spans[str(row["line"])].append((start, end))
    return [
        dataclasses.replace(document, spans=merged([*document.spans, *spans[line]]))
        for line, document in numbers.items()
    ]


def _check_keys(row: Any, needed: dict[str, type], optional: dict[str, type], where: str) -> None:
    keys = needed | optional
    if not isinstance(row, dict) or not needed.keys() <= row.keys() <= keys.keys():
        raise ValueError(
            f"{where}: expected an object with the keys {', '.join(needed)} (and {', '.join(optional)} if you like), "
            f"got {', '.join(map(str, row)) if isinstance(row, dict) else type(row).__name__}."
        )
    for name, value in row.items():
        if type(value) is not keys[name]:
            raise ValueError(f"{where}: {name!r} must be of type {keys[name].__name__}, got {value!r}.")
