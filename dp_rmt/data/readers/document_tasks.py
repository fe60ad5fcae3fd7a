"""Loads CustomerSim, or documents of one's own, with the sensitive spans in them."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

from absl import logging

from dp_rmt.data.readers.customersim import ARCHIVE, DATABASE, read_customersim
from dp_rmt.data.readers.documents import Document
from dp_rmt.data.readers.sensitive import (
    PATTERNS,
    Finder,
    attribute_finder,
    merged,
    pattern_finder,
    presidio_finder,
    read_attributes,
)
from dp_rmt.data.readers.span_files import add_spans, read_documents

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
    """

    task: str
    train: tuple[Document, ...]
    evaluations: Mapping[str, tuple[Document, ...]]
    source: str


def load_documents(
    task: str,
    *,
    path: str | os.PathLike[str] | None,
    sensitive: Sequence[str],
    max_train_examples: int | None = None,
    skip_lines: int = 0,
) -> DocumentSet:
    """Reads the documents of a task and finds what is sensitive in them.

    Args:
        task: "customersim" (a folder with its archive and database), or "documents" (a folder with train.jsonl, and
            dev.jsonl and test.jsonl if there are any; the span file of each is called like train.spans.jsonl).
        path: the folder.
        sensitive: names of `SENSITIVE`, whose spans are united. If it is empty, nothing is marked.
        max_train_examples: how many documents are kept, from the first on; canaries are all kept. None keeps all.
        skip_lines: lines of each dialogue of CustomerSim that are left out, see `read_customersim`.

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
    folder = pathlib.Path(path)
    other = "spans" if task == "customersim" else "attributes"
    if other in sensitive:
        raise ValueError(f"config.data.sensitive: {other!r} does not go with the task {task!r}.")
    if task == "customersim":
        splits, source = read_customersim(folder, skip_lines=skip_lines), str(folder / ARCHIVE)
    else:
        splits, source = _own(folder, with_spans="spans" in sensitive), str(folder / "train.jsonl")
    train = splits["train"]
    ordinary = [document for document in train if not document.is_canary][slice(max_train_examples)]
    splits["train"] = [*ordinary, *(document for document in train if document.is_canary)]
    finders = [_finder(name, folder) for name in sensitive if name != "spans"]
    marked = {split: tuple(_marked(document, finders) for document in rows) for split, rows in splits.items()}
    found = DocumentSet(task, marked.pop("train"), marked, source)
    if sensitive and not any(document.spans for document in found.train):
        raise ValueError(
            f"{source}: none of the {len(found.train)} training documents has a sensitive character by "
            f"config.data.sensitive={tuple(sensitive)} ({_where_from(sensitive, folder)}): there is nothing to "
            "measure. Name other sources, or mend the files."
        )
    count = sum(bool(document.spans) for document in found.train)
    logging.info("%d of %d training documents hold something sensitive.", count, len(found.train))
    return found


def _own(folder: pathlib.Path, *, with_spans: bool) -> dict[str, list[Document]]:
    splits = {}
    for split in ("train", "dev", "test"):
        file = folder / f"{split}.jsonl"
        if split == "train" or file.exists():
            splits[split] = read_documents(file)
            if with_spans:
                splits[split] = add_spans(splits[split], folder / f"{split}.spans.jsonl")
    return splits


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
