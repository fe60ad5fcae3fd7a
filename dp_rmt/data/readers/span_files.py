"""Reads documents of one's own and their sensitive spans, one JSON object in each line."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections import defaultdict
from typing import Any

from dp_rmt.data.readers.documents import Document
from dp_rmt.data.readers.sensitive import Span, merged
from dp_rmt.data.readers.text_files import open_text


def read_documents(file: str | os.PathLike[str]) -> list[Document]:
    """Reads a JSONL file of documents; blank lines are skipped.

    Keys of each line:
        text: the document's text, a string.
        canary: optional, true for a planted document.

    Returns:
        One document for each line, in the order of the file, without spans.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not such an object; the message has file and line.
    """
    file = pathlib.Path(file)
    documents = []
    for number, row in _rows(file, advice='one JSON object per line with the key "text".'):
        where = f"{file}, line {number}"
        _check_keys(row, {"text": str}, {"canary": bool}, where)
        if not row["text"].strip():
            raise ValueError(f"{where}: the text is empty.")
        documents.append(Document(row["text"], where, row.get("canary", False)))
    if not documents:
        raise ValueError(f"{file} holds no documents. Write one JSON object per line.")
    return documents


def add_spans(documents: list[Document], file: str | os.PathLike[str]) -> list[Document]:
    """Reads a span file and gives each document its spans. Spans that it already has are kept.

    Keys of each line:
        line: the line of the document in its file, counted from 1.
        start, end: the characters [start, end) of the text, counted as Python does, in code points from 0.
        text: optional, the characters that stand there. They are checked, so that files that have drifted apart are
          found.

    Args:
        documents: from `read_documents`.
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
    advice = 'one JSON object per line with the keys "line", "start" and "end".'
    for number, row in [] if is_empty else _rows(file, advice=advice):
        where = f"{file}, line {number}"
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


def _rows(file: pathlib.Path, *, advice: str) -> list[tuple[int, Any]]:
    rows = []
    with open_text(file, advice=f"it must hold {advice}", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                if line.strip():
                    rows.append((number, json.loads(line.rstrip())))
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}, column {error.colno}: broken JSON: {error.msg}.") from None
    return rows


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
