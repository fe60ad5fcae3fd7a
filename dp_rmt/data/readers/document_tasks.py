"""Loads CustomerSim, or documents of one's own, with the sensitive spans in them."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

from absl import logging

from dp_rmt.data.readers.customersim import ARCHIVE, DATABASE, read_customersim
from dp_rmt.data.readers.documents import Document
from dp_rmt.data.readers.own_documents import read_own_documents
from dp_rmt.data.readers.sensitive import (
    PATTERNS,
    Finder,
    attribute_finder,
    merged,
    pattern_finder,
    presidio_finder,
    read_attributes,
)
from dp_rmt.data.readers.span_files import add_spans
from dp_rmt.data.readers.tables import ONLY_THE_SOURCE, Extras, Source, described

DOCUMENT_TASKS = ("customersim", "documents")
SENSITIVE = ("attributes", "spans", *PATTERNS, "presidio")
"""The sources of sensitive spans: CustomerSim's database, span files, patterns, Presidio."""


@dataclasses.dataclass(frozen=True)
class DocumentSet:
    """One task's documents.

    Attributes:
        task: one of `DOCUMENT_TASKS`.
        train: the documents to train on. Each is one example, the unit of privacy. Canaries come last.
        evaluations: "dev" and "test", if there are files of them.
        source: the file that `train` was read from, for messages.
        notes: what was found, in sentences for the user.
    """

    task: str
    train: tuple[Document, ...]
    evaluations: Mapping[str, tuple[Document, ...]]
    source: str
    notes: tuple[str, ...] = ()


def load_documents(
    task: str,
    *,
    path: Source | None,
    sensitive: Sequence[str],
    max_train_examples: int | None = None,
    skip_lines: int = 0,
    text_column: str = "text",
    extras: Extras = ONLY_THE_SOURCE,
    user_column: str | None = None,
) -> DocumentSet:
    """Reads the documents of a task and finds what is sensitive in them.

    Args:
        task: "customersim" (a folder with its archive and database), or "documents" (what `read_own_documents` reads;
            of a folder with train.jsonl, the span file is called train.spans.jsonl, and so for dev and test).
        path: the folder; of documents also a file, hub:NAME or rows.
        sensitive: names of `SENSITIVE`, whose spans are united. If it is empty, nothing is marked.
        max_train_examples: how many documents are kept, from the first on; canaries are all kept. None keeps all.
        skip_lines: lines of each dialogue of CustomerSim that are left out, see `read_customersim`.
        text_column: of documents, the column of the text.
        extras: of documents, where other splits come from.
        user_column: whose each training document is. Of documents, the column that says so; of CustomerSim, a column of
            its database, such as "name", whose first value in a dialogue says so. None if that is not read.

    Returns:
        The documents.

    Raises:
        ValueError: a file is malformed, or nothing sensitive was found in the training data. The message has the file
            and, if there is one, the line.
        FileNotFoundError: a file is missing.
        ImportError: Presidio is named and not installed.
    """
    if task not in DOCUMENT_TASKS:
        raise ValueError(f"Unknown task of documents {task!r}: choose one of {', '.join(DOCUMENT_TASKS)}.")
    if path is None:
        raise ValueError(f"The task {task!r} reads local files: set --config.data.path to their folder.")
    folder = pathlib.Path(path) if isinstance(path, str | os.PathLike) else pathlib.Path()
    other = "spans" if task == "customersim" else "attributes"
    if other in sensitive:
        raise ValueError(f"config.data.sensitive: {other!r} does not go with the task {task!r}.")
    if task == "customersim":
        splits, source = read_customersim(folder, skip_lines=skip_lines), str(folder / ARCHIVE)
        if user_column is not None:
            find = attribute_finder(read_attributes(folder / DATABASE, user_column))
            splits["train"] = [_of_customer(document, find) for document in splits["train"]]
    else:
        splits, source = read_own_documents(path, text_column, extras, user_column), described(path)
        if "spans" in sensitive:
            splits = {split: add_spans(rows, folder / f"{split}.spans.jsonl") for split, rows in splits.items()}
    train = splits["train"]
    ordinary = [document for document in train if not document.is_canary][slice(max_train_examples)]
    splits["train"] = [*ordinary, *(document for document in train if document.is_canary)]
    finders = [_finder(name, folder) for name in sensitive if name != "spans"]
    marked = {split: tuple(_marked(document, finders) for document in rows) for split, rows in splits.items()}
    train_documents = marked.pop("train")
    notes = (f"documents: {len(train_documents)}, each one example of its own and one sequence, whatever its length",)
    found = DocumentSet(task, train_documents, marked, source, notes)
    if sensitive and not any(document.spans for document in found.train):
        raise ValueError(
            f"{source}: none of the {len(found.train)} training documents has a sensitive character by "
            f"config.data.sensitive={tuple(sensitive)} ({_where_from(sensitive, folder)}): there is nothing to "
            "measure. Name other sources, or mend the files."
        )
    count = sum(bool(document.spans) for document in found.train)
    logging.info("%d of %d training documents hold something sensitive.", count, len(found.train))
    return found


def _of_customer(document: Document, find: Finder) -> Document:
    """The document with its customer; a dialogue in which nobody of the database is named is somebody else's."""
    spans = find(document.text)
    user = document.text[slice(*spans[0])] if spans else document.where
    return dataclasses.replace(document, user=user)


def _finder(name: str, folder: pathlib.Path) -> Finder:
    if name == "attributes":
        return attribute_finder(read_attributes(folder / DATABASE))
    return presidio_finder() if name == "presidio" else pattern_finder(name)


def _marked(document: Document, finders: Sequence[Finder]) -> Document:
    spans = [*document.spans, *(span for find in finders for span in find(document.text))]
    return dataclasses.replace(document, spans=merged(spans))


def _where_from(sensitive: Sequence[str], folder: pathlib.Path) -> str:
    files = {"attributes": folder / DATABASE, "spans": folder / "train.spans.jsonl"}
    return ", ".join(str(files.get(name, f"pattern {name!r}" if name in PATTERNS else name)) for name in sensitive)
