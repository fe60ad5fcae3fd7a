"""Reads the GLUE tasks (Wang et al. 2019, arXiv 1804.07461) from folders of TSV files and from the hub.

A task's folder has GLUE's own layout: `train.tsv` and `dev.tsv` (MNLI: `dev_matched.tsv`,
`dev_mismatched.tsv`). Labels are numbered in the order of the hub's `nyu-mll/glue`, from wherever the rows come.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from dp_rmt.data.readers.glue_tasks import GLUE_TASKS, GlueTask
from dp_rmt.data.readers.hub import load_hub_dataset
from dp_rmt.data.readers.text_files import open_text

HUB_DATASET = "nyu-mll/glue"
# A file with more malformed rows than this is another file, not the published one with its few broken lines.
_MAX_DROPPED_FRACTION = 1e-3


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows of raw text, with or without labels.

    Attributes:
        texts: the N first (or only) texts.
        text_pairs: the N second texts; None for a single-sentence task.
        labels: int32 class numbers (N,), or float32 scores for a regression task; None for unlabelled text.
        users: of each row the id of the person whose it is; empty if that is not known.
    """

    texts: tuple[str, ...]
    text_pairs: tuple[str, ...] | None
    labels: np.ndarray | None
    users: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice) -> Examples:
        pairs = None if self.text_pairs is None else self.text_pairs[rows]
        labels = None if self.labels is None else self.labels[rows]
        return Examples(self.texts[rows], pairs, labels, self.users[rows])


@dataclasses.dataclass(frozen=True)
class GlueData:
    """The rows of one task: `train`, and `evaluations` by name ("dev", or "dev_matched" and "dev_mismatched")."""

    task: GlueTask
    train: Examples
    evaluations: Mapping[str, Examples]


def load_glue(
    task: str,
    *,
    path: str | os.PathLike[str] | None = None,
    max_train_examples: int | None = None,
    dropped: Sequence[str] = (),
) -> GlueData:
    """Loads one GLUE task from a folder of TSV files, or from the Hugging Face hub.

    Args:
        task: a name in `GLUE_TASKS`, such as "sst2".
        path: the task's own folder (the one that holds `train.tsv`); None downloads `nyu-mll/glue`.
        max_train_examples: how many training rows are kept, from the first on; None keeps all. The evaluations stay
          whole.
        dropped: labels whose rows are left out of the files, such as the "-" of MNLI's original ones, on which no two
          people agreed. A fixed rule for each row alone: the guarantee is for the rows that are kept.

    Returns:
        The rows. Labels are int32 class numbers in the hub's order (float32 scores for STS-B).

    Raises:
        ValueError: the task is unknown, or a file is malformed (the message has the file, the line counted from 1, and
          a cure).
        FileNotFoundError: a file of the task is missing from `path`.
        RuntimeError: the hub could not be read.
    """
    spec = get_task(task)
    if max_train_examples is not None and max_train_examples < 1:
        raise ValueError(f"max_train_examples must be at least 1 (or None for all rows), got {max_train_examples}.")
    if path is None:
        splits = _read_hub(spec)
    else:
        names = ("train", *spec.evaluation_names)
        splits = {name: read_tsv(spec, pathlib.Path(path) / f"{name}.tsv", dropped) for name in names}
    train = splits.pop("train")[slice(max_train_examples)]
    return GlueData(task=spec, train=train, evaluations=splits)


def get_task(name: str) -> GlueTask:
    """Looks up a GLUE task.

    Raises:
        ValueError: there is no such task; the message lists the names.

    >>> get_task("mnli").label_names
    ('entailment', 'neutral', 'contradiction')
    """
    if name not in GLUE_TASKS:
        raise ValueError(f"Unknown GLUE task {name!r}: choose one of {', '.join(GLUE_TASKS)}.")
    return GLUE_TASKS[name]


def read_tsv(task: GlueTask, file: str | os.PathLike[str], dropped: Sequence[str] = ()) -> Examples:
    """Reads a TSV file of a task. It is UTF-8 and tab-separated, and quotes are ordinary characters.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, lacks a column or has a malformed row.
    """
    file = pathlib.Path(file)
    rows = _numbered_rows(task, file)
    header = list(task.columns) if task.columns is not None else next(rows, (0, None))[1]
    if header is None:
        raise ValueError(f"{file} is empty: expected a header line with {_names(task)}. Download the file again.")
    missing = [name for name in (*task.text_columns, task.label_column) if name not in header]
    if missing:
        raise ValueError(
            f"{file}, line 1: no column {', '.join(map(repr, missing))} in the header {header}; the task"
            f" {task.name!r} needs {_names(task)}. Is this GLUE's file of that task (its test.tsv has no"
            " labels)?"
        )
    columns = [header.index(name) for name in (*task.text_columns, task.label_column)]
    texts, labels, malformed = [], [], 0
    for line, fields in rows:
        try:
            *row_texts, label = _select_fields(fields, columns, header)
        except ValueError as error:
            if not task.drop_malformed_rows:
                raise ValueError(f"{file}, line {line}: {error}") from None
            malformed += 1
            continue
        if label.strip() in dropped:
            continue
        texts.append(row_texts)
        labels.append(_parse_label(task, label, f"{file}, line {line}"))
    if malformed > _MAX_DROPPED_FRACTION * (len(texts) + malformed) + 1:
        raise ValueError(
            f"{file}: {malformed} of {len(texts) + malformed} rows are malformed; the published file of"
            f" {task.name!r} has only a few. Download it again, and write it without quoting or line breaks"
            " inside a field."
        )
    if malformed:
        logging.warning("%s: dropped %d malformed rows of %d.", file, malformed, malformed + len(texts))
    if not texts:
        raise ValueError(f"{file} has a header but no examples. Download the file again.")
    return _examples(task, texts, labels)


def _numbered_rows(task: GlueTask, file: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number from 1, fields). The last line may end with or without a line break."""
    wanted = ", ".join(f"{name}.tsv" for name in ("train", *task.evaluation_names))
    advice = (
        f"the folder of GLUE task {task.name!r} must hold {wanted}. Set --config.data.path to that folder, or leave it"
        " unset to download from the Hugging Face hub."
    )
    # With newline="\n" a stray carriage return inside a field is not a line break. Splitting at tabs alone is
    # csv.QUOTE_NONE without the csv module's surprises.
    with open_text(file, advice=advice, newline="\n") as stream:
        for line, text in enumerate(stream, start=1):
            if text.strip():  # a file may end with a blank line
                yield line, text.rstrip("\r\n").split("\t")


def _select_fields(fields: Sequence[str], columns: Sequence[int], header: Sequence[str]) -> list[str]:
    """Returns the texts and the label of one row. A ValueError says what is wrong with the row."""
    if len(fields) != len(header):
        raise ValueError(
            f"{len(fields)} tab-separated fields where the layout has {len(header)} ({', '.join(header)})."
            " Remove tabs and line breaks from inside the fields."
        )
    selected = [fields[column] for column in columns]
    for column, text in zip(columns[:-1], selected, strict=False):
        if not text.strip():
            raise ValueError(f"the text in column {header[column]!r} is empty. Remove the row, or give it its text.")
    return selected


def _parse_label(task: GlueTask, label: str, where: str) -> int | float:
    if task.is_regression:
        try:
            score = float(label)
        except ValueError:
            score = float("nan")
        if not np.isfinite(score):
            raise ValueError(f"{where}: the score {label!r} in column {task.label_column!r} is not a finite number.")
        return score
    label = label.strip()
    if label not in task.tsv_labels:
        raise ValueError(
            f"{where}: unknown label {label!r} in column {task.label_column!r};"
            f" {task.name!r} has {', '.join(map(repr, task.tsv_labels))}. Correct it, or leave out all rows that are"
            f" labelled so: --config.data.drop_labels=\"('{label}',)\""
        )
    return task.tsv_labels.index(label)


def _read_hub(task: GlueTask) -> dict[str, Examples]:
    loaded = load_hub_dataset(
        HUB_DATASET,
        task.hub_name,
        what="GLUE",
        advice="download GLUE's TSV files yourself and point --config.data.path at the task's folder.",
    )
    splits = {"train": "train"} | {name: name.replace("dev", "validation") for name in task.evaluation_names}
    return {name: _hub_examples(task, loaded[hub_split]) for name, hub_split in splits.items()}


def _hub_examples(task: GlueTask, split: Mapping[str, Sequence]) -> Examples:
    columns = [list(split[column]) for column in task.hub_text_columns]
    return _examples(task, list(zip(*columns, strict=True)), list(split["label"]))


def _examples(task: GlueTask, texts: Sequence[Sequence[str]], labels: Sequence[int | float]) -> Examples:
    # Stray spaces at the ends (SST-2 has them) would be tokens of their own to a byte-level BPE.
    columns = tuple(tuple(text.strip() for text in column) for column in zip(*texts, strict=True))
    dtype = np.float32 if task.is_regression else np.int32
    return Examples(columns[0], columns[1] if len(columns) > 1 else None, np.asarray(labels, dtype))


def _names(task: GlueTask) -> str:
    return ", ".join(map(repr, (*task.text_columns, task.label_column)))
