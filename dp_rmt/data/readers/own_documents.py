"""Documents of one's own: a folder of .txt files, or rows with a column of text."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from dp_rmt.data.readers.documents import Document
from dp_rmt.data.readers.rows import Row, field_of, text_of
from dp_rmt.data.readers.tables import SPLITS, Extras, Source, read_tables, shared_out
from dp_rmt.data.readers.text_files import open_text

_ADVICE = "a folder of documents holds files that end with .txt, or folders train, dev and test of such files."
CANARY = "canary"
"""The column that is true for a planted document; it may be absent."""


def read_own_documents(
    source: Source, text_column: str, extras: Extras, user_column: str | None = None
) -> dict[str, list[Document]]:
    """Reads documents; each file of a folder, or each row, is ONE example: the unit of privacy.

    Args:
      source: a folder of .txt files (with folders train, dev and test of them, if there are several splits), or what
        else `read_tables` reads.
      text_column: the column of the text, where there are columns.
      extras: where other splits come from.
      user_column: the column of training rows that says whose they are; None if that is not read.

    Returns:
      "train", and "dev" and "test" as far as there are documents, without spans.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ValueError: a text is missing or no text; the message has file and line.
    """
    path = pathlib.Path(source) if isinstance(source, str | os.PathLike) else None
    if path is not None and path.suffix == ".txt":
        raise ValueError(
            f"{path}: a .txt file is one document, and one document is one example. Give a folder of such files, or a "
            f'JSONL file with {{"text": ...}} in each line'
        )
    found = None if path is None or extras.dev_path or extras.test_path else _text_files(path)
    if found is None:
        tables = read_tables(source, extras)
        users = {"train": user_column}
        found = {
            split: [_document(row, text_column, users.get(split)) for row in table.rows]
            for split, table in tables.items()
        }
    elif user_column is not None:
        raise ValueError(f"config.data.user_column={user_column!r}: {path} has text files, without columns")
    elif extras.dev_share is not None and "dev" in found:
        raise ValueError(f"config.data.dev_share={extras.dev_share}: {path} has a folder dev already; leave one out")
    if extras.dev_share is not None:
        planted = [document for document in found["train"] if document.is_canary]
        others = [document for document in found["train"] if not document.is_canary]
        found |= shared_out(others, extras.dev_share, lambda document: document.text)
        found["train"] += planted
    return found


def _text_files(folder: pathlib.Path) -> dict[str, list[Document]] | None:
    """The .txt files of every split of a folder; None if it holds none."""
    if not folder.is_dir():
        return None
    files = sorted(folder.glob("*.txt"))
    if files:
        return {"train": _documents(files)}
    found = {}
    for split, names in SPLITS.items():
        there = [name for name in names if any((folder / name).glob("*.txt"))]
        if len(there) > 1:
            raise ValueError(f"{folder} has the folders {' and '.join(there)}: leave one of them there")
        if there:
            found[split] = _documents(sorted((folder / there[0]).glob("*.txt")))
    if found and "train" not in found:
        raise FileNotFoundError(f"{folder} has no folder train with .txt files, only {', '.join(found)}")
    return found or None


def _documents(files: Sequence[pathlib.Path]) -> list[Document]:
    documents = []
    for file in files:
        with open_text(file, advice=_ADVICE) as stream:
            text = stream.read().strip()
        if not text:
            raise ValueError(f"{file} has nothing but blank lines. Remove the file.")
        documents.append(Document(text, f"{file}, line 1"))
    return documents


def _document(row: Row, text_column: str, user_column: str | None) -> Document:
    is_canary = row.fields.get(CANARY, False)
    if not isinstance(is_canary, bool):
        raise ValueError(f"{row.where}: {CANARY!r} must be true or false, got {is_canary!r}")
    text_of(row, text_column)  # checks it; spans count characters of the text as it is
    user = "" if user_column is None else text_of(row, user_column)
    return Document(str(field_of(row, text_column)), row.where, is_canary, user=user)
