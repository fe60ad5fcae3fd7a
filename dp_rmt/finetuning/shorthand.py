"""A model, data and an epsilon in a few words, as `dp_rmt.finetune` and ``dp-rmt finetune`` take them.

Nothing here imports JAX, nor NumPy before there is data to look at: a mistyped word is answered at once.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_rmt.finetuning.data_settings import CAUSAL_TASKS, HUB, Data, GlueTaskName
from dp_rmt.finetuning.options import kinds, walk
from dp_rmt.finetuning.settings import Settings

_ON_THE_HUB = (*typing.get_args(GlueTaskName), "e2e", "dart")


def settings_from(
    model: str | None = None,
    train: Any = None,
    epsilon: float | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings of a run that is described in a few words; all else has its default.

    Args:
      model: folder, name on the hub, or package:NAME/FOLDER.
      train: what is trained on: a file of rows (CSV, TSV, JSON, JSON Lines, Parquet), a folder of such files or of .txt
        files, hub:NAME, rows from Python (a `datasets.Dataset` or dictionaries), the name of a published task, which
        then comes from the hub, or the folder of the task that `data.task` names.
      epsilon: the privacy budget.
      changes: any settings by name: nested, dotted, or the last part of a dotted name, if only one setting has it.

    Returns:
      The settings. Unless changed, one's own data gets the task that its columns say (see `own_task`), and a text or
      document task the head "causal_lm".

    Raises:
      ValueError: there is no such setting, or its value cannot be used.
      FileNotFoundError: there is neither a file nor a folder nor a task of this name.

    >>> settings = settings_from("roberta-base", "sst2", 3.0, {"num_steps": 100, "data": {"max_length": 32}})
    >>> settings.data.task, settings.model.path, settings.privacy.epsilon, settings.train.num_steps
    ('sst2', 'roberta-base', 3.0, 100)
    """
    return completed(changed_by_name(started(model, train, epsilon), changes or {}), train)


def changed_by_name(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings with changes by name, as `settings_from` takes them; its errors, too."""
    return settings.changed({_full_name(key): value for key, value in changes.items()})


def started(model: str | None, train: Any, epsilon: float | None) -> Settings:
    """The settings that follow from these three, before others are changed; errors as in `settings_from`."""
    changes: dict[str, Any] = {} if train is None else _data(train)
    changes |= {} if model is None else {"model.path": model}
    changes |= {} if epsilon is None else {"privacy.epsilon": epsilon}
    return Settings().changed(changes)


def completed(settings: Settings, train: Any = None) -> Settings:
    """The settings with a task and a decoder's head filled in where they are needed and not given.

    Args:
      settings: settings whose task may be "auto".
      train: rows from Python, if the data is no file.
    """
    if settings.data.task == "auto":
        source = train if is_in_memory(train) else settings.data.path
        settings = settings.changed({"data.task": own_task(settings.data, source)})
    if settings.data.task in CAUSAL_TASKS and settings.model.head == "classification":
        settings = settings.changed({"model.head": "causal_lm"})
    return settings


def is_in_memory(train: Any) -> bool:
    """Whether the training data is rows that a program holds, and neither a name nor a path."""
    return train is not None and not isinstance(train, str | os.PathLike)


def own_task(data: Data, source: Any) -> str:
    """The task of one's own data: what its columns say, unless settings of one task are given.

    Labelled text has the columns that `text_columns` and `label_column` name, "text" and "label" by default. Text from
    text has one of the shapes of `text_shapes`. Rows with a column "text" and no label, and folders of .txt files, are
    documents.

    Raises:
      ValueError: the columns say none of these.
    """
    defaults = Data()

    def is_given(*names: str) -> bool:
        return any(getattr(data, name) != getattr(defaults, name) for name in names)

    if is_given("text_columns", "label_column", "labels", "regression", "drop_labels"):
        return "labelled_table"
    if is_given("source_column", "target_column", "messages_column"):
        return "text_pairs"
    if isinstance(source, str) and next(Path(source).glob("**/*.txt"), None) is not None:
        return "documents"
    from dp_rmt.data.readers.tables import described, read_tables
    from dp_rmt.data.readers.text_shapes import KNOWN, recognised

    columns = {name for row in read_tables(source)["train"].rows for name in row.fields}
    if {"text", "label"} <= columns:
        return "labelled_table"
    if recognised(columns) is not None:
        return "text_pairs"
    if "text" in columns:
        return "documents"
    raise ValueError(
        f"{described(source)}: the columns {', '.join(map(repr, sorted(columns)))} do not say what to learn. Name "
        "them: --config.data.text_columns=\"('COLUMN',)\" and label_column for labelled text, source_column and "
        f"target_column for text from text; or rename them to text, label, or one of: {KNOWN}"
    )


def _full_name(key: str) -> str:
    """The dotted name of a setting that is given by its last part."""
    if "." in key or key in kinds(Settings):
        return key
    names = [name.split(".") for name, *_ in walk(Settings) if not name.startswith("synthetic.")]
    found = list(dict.fromkeys(".".join(name[: name.index(key) + 1]) for name in names if key in name[1:]))
    if len(found) > 1:
        raise ValueError(
            f"{key}: which of {', '.join(found)} is meant? Give the whole name, as in **{{{found[0]!r}: ...}}"
        )
    return found[0] if found else key


def _data(train: Any) -> dict[str, Any]:
    if is_in_memory(train):
        return {"data.task": "auto"}
    train = str(train)
    if train in _ON_THE_HUB:
        return {"data.task": train}
    if not train.startswith(HUB) and not Path(train).exists():
        raise FileNotFoundError(
            f"train={train!r}: there is no such file or folder, nor such a task; the hub has {', '.join(_ON_THE_HUB)}, "
            f"and other data sets are named {HUB}NAME"
        )
    return {"data.path": train, "data.task": "auto"}
