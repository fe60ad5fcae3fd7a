"""Loads E2E and DART as rows of text: pairs to train on, references to evaluate with."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping

from absl import logging

from dp_rmt.data.readers.dart import read_dart_hub, read_dart_split
from dp_rmt.data.readers.e2e import read_e2e_hub, read_e2e_split
from dp_rmt.data.readers.text_pairs import Record, TextPairs, TextReferences, evaluation_rows, training_rows


@dataclasses.dataclass(frozen=True)
class TableToText:
    """The rows of one task.

    Attributes:
        task: "e2e" or "dart".
        train: the training pairs. Each pair is one example, the unit of privacy (see `TextPairs`).
        evaluations: "dev" and "test", each source with all its references. The split that is trained on is left out.
        train_split: the split that `train` comes from. State it with every result if it is not "train".
    """

    task: str
    train: TextPairs
    evaluations: Mapping[str, TextReferences]
    train_split: str


@dataclasses.dataclass(frozen=True)
class _Reader:
    """The way in which one task is read.

    Attributes:
        read_split: a function (folder, split) -> records.
        read_hub: reads all splits from the hub.
        merge: as in `evaluation_rows`.
    """

    read_split: Callable[[pathlib.Path, str], list[Record]]
    read_hub: Callable[[], dict[str, list[Record]]]
    merge: bool


_READERS = {
    "e2e": _Reader(read_e2e_split, read_e2e_hub, merge=True),
    "dart": _Reader(read_dart_split, read_dart_hub, merge=False),
}
TABLE_TO_TEXT_TASKS = tuple(_READERS)


def load_table_to_text(
    task: str,
    *,
    path: str | os.PathLike[str] | None = None,
    max_train_examples: int | None = None,
    train_split: str = "train",
) -> TableToText:
    """Loads one table-to-text task from local files in their original format, or from the Hugging Face hub.

    Each (source, reference) pair of the training split is ONE example, the unit of privacy. One meaning representation
    may therefore appear in several examples.

    Args:
        task: "e2e" (CSV) or "dart" (JSON or XML).
        path: the task's own folder; None downloads it.
        max_train_examples: how many training pairs are kept, from the first on; None keeps all. The evaluations stay
          whole.
        train_split: "train", or "dev" if the training file is not to be had. The dev split is then trained on, and is
            no longer among the evaluations.

    Returns:
        The rows.

    Raises:
        ValueError: the task or split is unknown, or a file is malformed (the message has the file, the line or entry,
          and a cure).
        FileNotFoundError: a file is missing from `path`.
        RuntimeError: the hub could not be read.
    """
    if task not in _READERS:
        raise ValueError(f"Unknown table-to-text task {task!r}: choose one of {', '.join(_READERS)}.")
    if train_split not in ("train", "dev"):
        raise ValueError(f"train_split must be 'train' or 'dev', got {train_split!r}; test is never trained on.")
    if max_train_examples is not None and max_train_examples < 1:
        raise ValueError(f"max_train_examples must be at least 1 (or None for all rows), got {max_train_examples}.")
    reader = _READERS[task]
    records = _read(reader, path, train_split)
    train = training_rows(records.pop(train_split))[slice(max_train_examples)]
    if train_split != "train":
        records.pop("train", None)
        logging.warning("%s: training on the %s split; state it with the results.", task, train_split)
    evaluations = {name: evaluation_rows(rows, merge=reader.merge) for name, rows in records.items()}
    return TableToText(task=task, train=train, evaluations=evaluations, train_split=train_split)


def _read(reader: _Reader, path: str | os.PathLike[str] | None, train_split: str) -> dict[str, list[Record]]:
    if path is None:
        return reader.read_hub()
    splits = [train_split, *(split for split in ("dev", "test") if split != train_split)]
    return {split: reader.read_split(pathlib.Path(path), split) for split in splits}
